"""What a run keeps on record: of itself (``config.json``), of an epoch, of a stage, and its results (``results.json``).

Each record is a dataclass whose fields are the keys of the JSON file: :meth:`Record.to_dict` gives what is written,
:meth:`Record.from_dict` reads what was, by this version or an earlier one. Losses are in nats.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cascade_fast.input_checks import InputError, check_type

AnyRecord = TypeVar("AnyRecord", bound="Record")
# Of a field that earlier versions, or another kind of run, do not have; its default is not written.
LATER = {"later": True}


@dataclass(frozen=True, kw_only=True)
class Record:
    """The object of a JSON file, or one within it."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = {f.name: (f, getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {n: _plain(v) for n, (f, v) in values.items() if not f.metadata.get("later") or v != f.default}

    @classmethod
    def from_dict(cls: type[AnyRecord], given: Any, where: str = "") -> AnyRecord:
        """What :meth:`to_dict` has given. Names that are not known are passed over.

        Args:
            where: begins the messages: which part of a file ``given`` is.

        Raises:
            InputError: no map, a field is missing, or its value is of another type.
        """
        check_type(where or "it", given, dict)
        fields = dataclasses.fields(cls)
        missing = [f.name for f in fields if f.name not in given and not f.metadata.get("later")]
        if missing:
            raise InputError(f"{where}: has no {', '.join(missing)}" if where else f"has no {', '.join(missing)}")
        kinds, begin = typing.get_type_hints(cls), f"{where}: " if where else ""
        return cls(**{f.name: _read(kinds[f.name], given[f.name], begin + f.name) for f in fields if f.name in given})


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.to_dict() if isinstance(value, Record) else value


def _read(kind: Any, given: Any, where: str) -> Any:
    """``given`` as the annotation ``kind`` says: a value, a record, or a list or map of them."""
    kinds = typing.get_args(kind)
    if type(None) in kinds:
        return None if given is None else _read(kinds[0], given, where)
    if typing.get_origin(kind) is list:
        check_type(where, given, list)
        return [_read(kinds[0], one, f"{where} {number}") for number, one in enumerate(given, 1)]
    if typing.get_origin(kind) is dict:
        check_type(where, given, dict)
        return {name: _read(kinds[1], one, f"{where}: {name}") for name, one in given.items()}
    if isinstance(kind, type) and issubclass(kind, Record):
        return kind.from_dict(given, where)
    check_type(where, given, kind)
    return given


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """What ``config.json`` says of a run. ``kv``: what ``kv: auto`` was settled to when the run began."""

    settings: dict[str, Any]
    fingerprints: dict[str, str]  # of base and data
    versions: dict[str, Any]
    machine: dict[str, Any]
    kv: str | None = field(default=None, metadata=LATER)


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Epoch(Record):
    """Of an epoch of training; ``val_loss`` and ``val_ppl`` are of what is trained, on its validation tokens."""

    epoch: int
    tokens: int
    train_loss: float
    val_loss: float
    val_ppl: float
    seconds: float
    tokens_per_second: float
    skipped_steps: int | None = field(default=None, metadata=LATER)  # float16 steps that overflowed; of stages


@dataclass(frozen=True, kw_only=True)
class Work(Record):
    """A line of the compute ledger. ``layer_tokens``: tokens times layers they went through."""

    tokens: int
    layer_tokens: int
    flops: float
    seconds: float
    mfu: float | None


@dataclass(frozen=True, kw_only=True)
class StageRecord(Record):
    """Of a stage whose training is over, kept or not.

    Attributes:
        threshold: at or below which a training token was hard; where those trained on were chosen by another score
            (``train_criterion``), as many tokens are at or below it.
        exit_threshold: at or below which a token enters.
        train_hard, train_total: training tokens that were hard, of those that arrived.
        best_val_ppl: on hard validation tokens, as the epochs'.
        all_token_val_ppl: of the cascade with this stage, over every validation token at its own exit.
    """

    stage: int
    threshold: float
    exit_threshold: float
    train_hard: int
    train_total: int
    val_hard: int
    added_parameters: int
    trainable_parameters: int
    epochs: list[Epoch]
    best_epoch: int
    best_val_ppl: float | None
    seconds: float
    compute: Work | None = field(default=None, metadata=LATER)
    accepted: bool
    verdict: str
    stopped: str
    all_token_val_ppl: float | None
    exit_share: dict[str, float]

    @classmethod
    def from_dict(cls, given: Any, where: str = "") -> "StageRecord":
        """A stage from before there was ``exit_threshold`` had the threshold that it was trained with."""
        if isinstance(given, dict) and "threshold" in given:
            given = {"exit_threshold": given["threshold"], **given}
        return super().from_dict(given, where)


@dataclass(frozen=True, kw_only=True)
class FinishedStage(Record):
    """What marks the training of a stage as over. ``metrics_size``: bytes of ``metrics.jsonl`` by then."""

    record: StageRecord
    metrics_size: int


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BaseRecord(Record):
    name: str
    source: str
    parameters: int
    layers: int
    val_ppl: float


@dataclass(frozen=True, kw_only=True)
class SplitTokens(Record):
    """Tokens that are predicted, of each split."""

    train: int
    val: int
    test: int

    @property
    def total(self) -> int:
        return self.train + self.val + self.test


@dataclass(frozen=True, kw_only=True)
class General(Record):
    """Of other text than that of training, ``dataset``: what training did to the loss there.

    Attributes:
        tokens: that are measured.
        base_loss: mean of the base, in nats.
        rise: mean loss of what was trained, less the base's; above 0 it has become worse.
        merged_rise: the same of the merged model (see :class:`Merged`).
    """

    dataset: str
    tokens: int
    base_loss: float
    rise: float
    merged_rise: float | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class Merged(Record):
    """Of the plain model that base and stage make where every token goes through the stage: the base's layers before
    the stage, then the stage's. ``layers_per_token``: all of them."""

    all_token_val_ppl: float
    all_token_test_ppl: float | None
    layers_per_token: float


@dataclass(frozen=True, kw_only=True)
class Final(Record):
    """What came of a run, and what it took. Test numbers are None where there is no test split."""

    all_token_val_ppl: float
    all_token_test_ppl: float | None
    base_test_ppl: float | None
    base_pass_seconds: float
    base_pass_reused: bool
    seconds: float
    peak_rss_bytes: int
    general: General | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class CascadeFinal(Final):
    exit_share: dict[str, float]  # of validation
    stages_kept: int
    stages_asked: int
    total_parameters: int
    merged: Merged | None = field(default=None, metadata=LATER)  # None where there is no such model


@dataclass(frozen=True, kw_only=True)
class ComparedWork(Record):
    tokens: int
    layer_tokens: int
    flops: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Compared(Record):
    """Stage 1 beside a dense stage of its kind and shape, trained on every token for as many epochs, and beside the
    original recipe's stage on the same tokens."""

    stage_1: ComparedWork
    dense_stage: ComparedWork
    seed_recipe: ComparedWork


@dataclass(frozen=True, kw_only=True)
class Ledger(Record):
    """The compute ledger. ``training``: of all stages. ``compared``: None where no epoch was finished."""

    matmul_flops_per_second: float
    base_pass: Work
    training: Work
    compared: Compared | None

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "compared": {} if self.compared is None else self.compared.to_dict()}

    @classmethod
    def from_dict(cls, given: Any, where: str = "") -> "Ledger":
        if isinstance(given, dict) and given.get("compared") == {}:
            given = {**given, "compared": None}
        return super().from_dict(given, where)


@dataclass(frozen=True, kw_only=True)
class PlannedMemory(Record):
    peak_bytes: int
    needed_bytes: int
    phase: str  # in which the peak is
    phases: dict[str, int]
    micro_batch_tokens: int | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class Memory(Record):
    planned: PlannedMemory
    measured_peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class RunResults(Record):
    """``results.json`` of a cascade. ``settings`` are as the run had them, which may have been fewer then."""

    base: BaseRecord
    tokens: SplitTokens
    settings: dict[str, Any]
    stages: list[StageRecord]
    final: CascadeFinal
    compute: Ledger | None = field(default=None, metadata=LATER)
    memory: Memory | None = field(default=None, metadata=LATER)

    @property
    def epochs(self) -> list[Epoch]:
        """Of every stage."""
        return [epoch for stage in self.stages for epoch in stage.epochs]

    @property
    def layers_per_token(self) -> float:
        """Of validation: the base's, and a stage's for each stage that a token goes through."""
        entered = sum(number * share for number, share in enumerate(self.final.exit_share.values()))
        return float(self.base.layers + self.settings["layers_per_stage"] * entered)

    @property
    def better_merged(self) -> bool:
        """Whether the merged model is at least as good on validation; it never has more layers."""
        merged, final = self.final.merged, self.final
        return merged is not None and merged.all_token_val_ppl <= final.all_token_val_ppl


@dataclass(frozen=True, kw_only=True)
class FinetuneResults(Record):
    """``results.json`` of a fine-tune of the whole base. Epoch 0 is the base.

    Attributes:
        method: ``full`` or ``lora``.
        trained_parameters: None: all of the base's.
    """

    method: str = field(default="full", metadata=LATER)
    base: BaseRecord
    tokens: SplitTokens
    settings: dict[str, Any]
    fingerprints: dict[str, str] | None = field(default=None, metadata=LATER)
    epochs: list[Epoch]
    best_epoch: int
    stopped: str
    trained_parameters: int | None = field(default=None, metadata=LATER)
    final: Final


def any_results(given: dict[str, Any]) -> RunResults | FinetuneResults:
    """``results.json`` of either. Raises InputError as :meth:`Record.from_dict`."""
    return RunResults.from_dict(given) if "stages" in given else FinetuneResults.from_dict(given)


def trained_by(settings: Any) -> str:
    """Name of the criterion that chooses the tokens to train on.

    Args:
        settings: of a run: :class:`RunSettings`, or what its results have of them, which may be an earlier version's.
    """
    return _asked_for(settings, "train_criterion")


def routed_by(settings: Any) -> str:
    """Name of the criterion that says which tokens enter a stage. ``settings``: as :func:`trained_by` takes them."""
    return _asked_for(settings, "route_criterion")


def _asked_for(settings: Any, name: str) -> str:
    given = settings if isinstance(settings, Mapping) else settings.to_dict()
    return str(given.get(name) or given["criterion"])


def training_size(settings: dict[str, Any]) -> tuple[str, int]:
    """The flag and the number that say how much a run was trained on. ``settings``: as its results have them."""
    blocks = settings.get("train_blocks")
    return ("--train-tokens", settings["train_tokens"]) if blocks is None else ("--train-blocks", blocks)


def training_text(settings: dict[str, Any]) -> str:
    """How much a run was trained on, in words. ``settings``: as its results have them."""
    flag, size = training_size(settings)
    what = "tokens in sequences of at most" if flag == "--train-tokens" else "blocks of"
    return f"{size:,} {what} {settings['seq_len']}" + (" tokens" if flag == "--train-blocks" else "")
