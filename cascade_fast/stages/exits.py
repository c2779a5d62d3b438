"""Dynamic exit: every token leaves the cascade as early as it can, with the logits of where it leaves."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.base.sequences import NO_LABEL
from cascade_fast.criteria import Criterion, Places, TokensAtExit
from cascade_fast.input_checks import one_line
from cascade_fast.losses import perplexity, token_losses
from cascade_fast.runtime.compute import Compute, HostCopies, sent
from cascade_fast.runtime.files import DamagedFile, load_tensors, save_tensors
from cascade_fast.runtime.processes import processes
from cascade_fast.selection import EVERY_TOKEN, Selection, check_finite, select_below, select_hardest
from cascade_fast.stages.kind import get_kind
from cascade_fast.stages.parallel_select import select_hardest_in_parts
from cascade_fast.stages.stage import Stage, StageConfig
from cascade_fast.stages.tokens import Recompute, SequencePack, StageTokens

TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class ExitStage:
    """A trained stage and its exit threshold: a token enters iff ``score <= threshold``, else it exits before."""

    stage: Stage
    threshold: float

    def save(self, folder: Path) -> None:
        """Writes the weights, ``model.safetensors``; shape and threshold are the cascade's to keep."""
        save_tensors(folder / "model.safetensors", self.stage.state_dict())

    @classmethod
    def load(cls, folder: Path, config: StageConfig, threshold: float, head_VD: Tensor) -> "ExitStage":
        """What :meth:`save` has written. Raises DamagedFile."""
        stage = get_kind(config.kind).empty(config, head_VD)
        path = folder / "model.safetensors"
        try:
            stage.load_state_dict(load_tensors(path)[0])
        except RuntimeError as error:  # another shape or other names: one without a checksum that is another stage's
            raise DamagedFile(f"{str(path)!r} does not fit the stage: {one_line(error)}") from error
        return cls(stage.eval(), threshold)


def hardest_of_store(store: HiddenStore, hard_ratio: float) -> Selection:
    """As :func:`select_hardest`, of the tokens with a label; ``index_K`` are rows of the store. Of several processes
    all call it, with the same store.

    Raises:
        NonFiniteScores: names sequence and position.
    """
    if hard_ratio != 1 and processes().several:
        names = ("label", "sequence", "position")
        return select_hardest_in_parts(
            store["score"], hard_ratio, processes(), **{f"{name}_N": store[name] for name in names}
        )
    labelled_J = store.labelled_index()
    if hard_ratio == 1:  # every token enters, at inference too
        return Selection(labelled_J, EVERY_TOKEN)
    score_J = store["score"][labelled_J]
    check_finite(score_J, store["sequence"][labelled_J], store["position"][labelled_J])
    selection = select_hardest(score_J.to(store.device), hard_ratio)
    return Selection(labelled_J[selection.index_K.cpu()], selection.threshold)


@dataclass(frozen=True)
class StageOutput:
    """What a stage says of K tokens: ``hidden`` for the next stage and, where tokens attend, their keys and values;
    ``score`` and ``loss`` (K,), on the CPU. Float32."""

    hidden_KD: Tensor
    score_K: Tensor
    loss_K: Tensor
    kv_KL2GE: Tensor | None = None


@torch.inference_mode()
def run_stage(
    stage: Stage,
    inputs: Tensor | SequencePack,
    label_K: Tensor,
    *,
    criterion: Criterion,
    compute: Compute,
    places: Places | None = None,
    wide_on: torch.device | None = None,
) -> StageOutput:
    """Takes K tokens through ``stage``. Their scores are of the stage's input and output, and of its own logits.

    ``wide_on``: where hidden states, keys and values are wanted; None: on the CPU.
    """
    with compute.autocast():
        ran = stage.run(inputs.to(compute.device))
    score_K, loss_K = criterion.score_with_losses(
        TokensAtExit(ran.entered_KD.float(), ran.output_KD.float(), places=places),
        ran.normed_KD,
        stage.head,
        label_K.to(compute.device),
        dtype=compute.dtype,
    )
    wide = {"hidden_KD": ran.next_KD.float()}
    if ran.kv_KL2GE is not None:
        wide["kv_KL2GE"] = ran.kv_KL2GE
    left = {"score_K": score_K, "loss_K": loss_K}
    if wide_on is None or wide_on.type == "cpu":  # all of it in one wait
        return StageOutput(**HostCopies({**left, **wide}).wait())
    return StageOutput(**wide, **HostCopies(left).wait())


def advance(
    stage: Stage,
    tokens: StageTokens,
    picked: Tensor,
    *,
    criterion: Criterion,
    compute: Compute,
) -> dict[str, Tensor]:
    """The units ``picked`` of ``tokens`` after ``stage``, as arrays of the next hidden store; their order is kept.
    The wide ones are on the device of the tokens' store."""
    inputs, label_K = tokens.batch(picked, compute.device)
    store, row_K = tokens.store, tokens.rows(picked)
    arrays = {name: store[name][row_K] for name in ("label", "sequence", "position")}
    places = Places(
        arrays["sequence"],
        arrays["position"],
        seed=store.meta["seed"],
        split=store.meta["split"],
        stage=store.meta.get("stage", 0) + 1,
    )
    result = run_stage(
        stage, inputs, label_K, criterion=criterion, compute=compute, places=places, wide_on=store.device
    )
    wide = {"hidden": result.hidden_KD, "kv": result.kv_KL2GE}
    arrays |= {n: wide_K.to(store.device, store.handed_on_dtype) for n, wide_K in wide.items() if wide_K is not None}
    arrays |= {"score": result.score_K, "loss": result.loss_K}
    return arrays


@dataclass(frozen=True)
class ExitEvaluation:
    """Of every token with a label, in the order of the base pass's store.

    Attributes:
        loss_N: cross-entropy at its own exit.
        exit_N: 0 for the base, k for stage k.
        score_NP: its score before each of P stages, NaN where it did not come so far; without stages, the base's.
        base_loss_N: cross-entropy of the base.
        sequence_N, position_N: where it is.
    """

    loss_N: Tensor
    exit_N: Tensor
    score_NP: Tensor
    base_loss_N: Tensor
    sequence_N: Tensor
    position_N: Tensor

    @property
    def perplexity(self) -> float:
        """Over all tokens: the number that counts."""
        return perplexity(self.loss_N.double().mean())

    def shares(self, stages: int) -> dict[str, float]:
        """Share of the tokens that leaves at each exit."""
        counts = torch.bincount(self.exit_N, minlength=stages + 1).double() / max(len(self.exit_N), 1)
        names = ["base", *(f"stage_{k}" for k in range(1, stages + 1))]
        return dict(zip(names, counts.tolist(), strict=True))


def evaluate_exits(
    stages: list[ExitStage],
    store: HiddenStore,
    *,
    criterion: Criterion,
    compute: Compute,
    recompute: Recompute | None = None,
) -> ExitEvaluation:
    """Sends every token of a base pass's store through the cascade.

    A token whose score is above stage 1's threshold keeps the base's loss; otherwise it enters stage 1, and so on;
    the last stage takes all that is left. A token without a label enters none and is not among the results.
    ``recompute``: see :class:`SequenceTokens`.
    """
    loss_N = store["loss"].clone()
    exit_N = torch.zeros(len(store), dtype=torch.int64)
    score_NP = torch.full((len(store), max(len(stages), 1)), torch.nan)
    score_NP[:, 0] = store["score"]
    mine = _own_sequences(store) if stages else []
    for first, end in mine:
        kind = get_kind(stages[0].stage.config.kind)
        stores = [store.part(slice(first, end))]
        token_K = torch.arange(first, end)  # where the tokens still on their way are
        for number, exit_stage in enumerate(stages, 1):
            hard_J = select_below(stores[-1]["score"], exit_stage.threshold)
            if len(hard_J) == 0:
                break
            tokens = kind.tokens(stores, hard_J, recompute)
            arrays = advance(exit_stage.stage, tokens, torch.arange(tokens.units), criterion=criterion, compute=compute)
            token_K = token_K[hard_J]
            loss_N[token_K], exit_N[token_K] = arrays["loss"], number
            if number < len(stages):
                score_NP[token_K, number] = arrays["score"]
            stores.append(HiddenStore(store.folder, arrays, {**store.meta, "stage": number}))
    if stages and processes().several:
        loss_N, exit_N, score_NP = _of_all(mine, loss_N, exit_N, score_NP)
    labelled_J = store.labelled_index()
    results = (loss_N, exit_N, score_NP, store["loss"], store["sequence"], store["position"])
    return ExitEvaluation(*(of_N[labelled_J] for of_N in results))


@torch.inference_mode()
def merged_losses(stage: Stage, store: HiddenStore, *, compute: Compute, recompute: Recompute | None = None) -> Tensor:
    """Cross-entropy of every token with a label ``(J,)``, float32 on the CPU, in the plain model that the base and a
    mergeable ``stage`` make (see :meth:`StageKind.mergeable`).

    Every token of a base pass's store goes through the stage, those without a label, too: no token attends to what the
    base has left. Where all have a label that is :func:`evaluate_exits` with an open threshold.
    """
    kind, losses = get_kind(stage.config.kind), list[Tensor]()
    for first, end in _own_sequences(store):
        tokens = kind.tokens([store.part(slice(first, end))], torch.arange(end - first), recompute)
        inputs, label_K = tokens.batch(torch.arange(tokens.units), compute.device)
        with compute.autocast():
            normed_KD = stage.run(inputs.to(compute.device)).normed_KD
        # Told by the store's labels, not by the batch's, which are on the device.
        labelled_K = tokens.store["label"][tokens.rows(torch.arange(tokens.units))] != NO_LABEL
        labelled_J = sent(labelled_K.nonzero().squeeze(1), compute.device)
        loss_J, _ = token_losses(normed_KD[labelled_J], stage.head, label_K[labelled_J], dtype=compute.dtype)
        losses.append(loss_J)
    return processes().rows(torch.cat(losses).cpu() if losses else torch.empty(0))


def _own_sequences(store: HiddenStore) -> list[tuple[int, int]]:
    """This process's part of :func:`_whole_sequences`."""
    parts = list(_whole_sequences(store))
    return parts[processes().part(len(parts))]


def _of_all(mine: list[tuple[int, int]], *results: Tensor) -> list[Tensor]:
    """What all processes have found, of every row: ``results`` are right in the rows ``mine`` of this one."""
    rows = slice(mine[0][0], mine[-1][1]) if mine else slice(0)
    return [processes().rows(of_N[rows]) for of_N in results]


def _whole_sequences(store: HiddenStore) -> Iterator[tuple[int, int]]:
    """Rows from and to: whole sequences of about ``TOKENS_AT_ONCE`` tokens, one at least."""
    first = end = 0
    for count in torch.unique_consecutive(store["sequence"], return_counts=True)[1].tolist():
        if end > first and end + count - first > TOKENS_AT_ONCE:
            yield first, end
            first = end
        end += count
    if end > first:
        yield first, end
