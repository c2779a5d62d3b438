"""What a cascade gains and what it costs, measured on tokens: perplexity, accuracy, exits, layers, FLOPs, time.

Perplexity, accuracy and exits are of the tokens with a label. Those without one are context: the base reads them, no
stage does, and nothing is measured of them but their cost.

Layers and FLOPs are counted from what ran, not from a formula: layers by hooks on every decoder layer, FLOPs by torch's
counter of matrix products and attention (a causal mask is counted as the kernel's full square). Padding is not counted,
context is, in what ran and in the tokens that it is divided by.

Shape legend: B sequences, S predictions of the longest of a batch, N tokens with a label, V vocabulary, E stages.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cascade_fast.base.sequences import Sequences
from cascade_fast.losses import chunk_tokens, perplexity
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.runtime.compute import sent, wait_for
from cascade_fast.runtime.console import Progress
from cascade_fast.runtime.processes import processes
from cascade_fast.selection import select_hardest
from cascade_fast.stages.kind import get_kind

BOOTSTRAP_SAMPLES = 2000
CONFIDENCE = 0.95
MERGED = "merged"  # the name of a row


@dataclass(frozen=True)
class Measured:
    """A cascade over some sequences.

    Attributes:
        loss_N: of every token with a label, in order, the loss in nats.
        correct_N: whether its likeliest token was right.
        exit_N, score_NE: its exit and its scores.
        sequence_N: the number of its sequence.
        tokens: all that were predicted, with or without a label.
        layers: decoder layers that ran; a layer on a token is one.
        flops: where they were counted.
        seconds: of forward passes, padding included.
    """

    loss_N: Tensor
    correct_N: Tensor
    exit_N: Tensor
    score_NE: Tensor
    sequence_N: Tensor
    tokens: int
    layers: int
    flops: int | None
    seconds: float

    @property
    def perplexity(self) -> float:
        return _perplexity(self.loss_N)

    def row(self, stages: int) -> dict[str, Any]:
        """The numbers as plain values: perplexity, accuracy and ``exit_share`` (of the base, stage 1, ...) of tokens
        with a label; layers, FLOPs and time of all tokens, as context is read, too."""
        exits = torch.bincount(self.exit_N, minlength=stages + 1) / len(self.exit_N)
        return {
            "perplexity": self.perplexity,
            "accuracy": self.correct_N.double().mean().item(),
            "exit_share": exits.tolist(),
            "layers_per_token": self.layers / self.tokens,
            "flops_per_token": None if self.flops is None else self.flops / self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
        }


@torch.inference_mode()
def measure(
    model: CascadeForCausalLM,
    sequences: Sequences,
    thresholds: Sequence[float],
    *,
    batch_tokens: int = 1024,
    count_flops: bool = False,
    context_enters: bool = False,
    name: str = "evaluating",
) -> Measured:
    """Runs ``sequences`` through the cascade with these thresholds, each token with a label at its own exit.

    Sequences of about one length run together, padded on the right: under the causal mask no token sees padding, and
    without a label it enters no stage, unless ``context_enters``. Where FLOPs are counted, only sequences of one length
    run together, as torch's counter would count padding.

    Counting FLOPs slows the forward passes: take times from a run without it.
    """
    these = processes()
    parts: list[tuple[Tensor, ...]] = []  # on the device until the end
    labelled, sequence = list[Tensor](), list[Tensor]()
    seconds, padding = 0.0, 0
    with ExitStack() as stack:
        layers = stack.enter_context(_counted_layers(model))
        progress = stack.enter_context(Progress(name, sequences.tokens))
        flops = stack.enter_context(_counter()) if count_flops else None
        batches = list(sequences.batches(batch_tokens, equal=count_flops))
        own = batches[these.part(len(batches))]
        for some in own or batches[:1]:  # one that does not count, to have something to give the others
            padded = sequences.padded(some)
            labelled_BS = padded.labelled_BS
            input_BS, label_BS = (sent(of_BS, model.device) for of_BS in (padded.input_BS, padded.label_BS))
            every = context_enters or bool(labelled_BS.all())
            labels = {} if every else {"shift_labels": label_BS}
            wait_for(model.device)
            started = time.perf_counter()
            output = model(input_BS, **labels, thresholds=thresholds, output_exits=True, use_cache=False)
            wait_for(model.device)
            seconds += time.perf_counter() - started
            loss_BS, correct_BS = judge(output.logits, label_BS)
            results = (loss_BS, correct_BS, output.exits, output.scores)
            parts.append(tuple(of_BS.flatten(0, 1) for of_BS in results))
            labelled.append(labelled_BS.flatten())
            sequence.append(torch.arange(len(sequences))[some, None].expand_as(labelled_BS)[labelled_BS])
            read = int(padded.real_BS.sum())
            padding += labelled_BS.numel() - read
            progress.advance(read)
        total = 0 if flops is None else flops.get_total_flops()
    # Padding is read by the base alone.
    ran = layers[0] - padding * len(model.base.model.layers)
    ran, total = these.sum_(torch.tensor([ran, total]) * bool(own)).tolist()
    seconds = these.largest([round(seconds * 1e9)])[0] / 1e9 if these.several else seconds
    of_N = [torch.cat(tensors).cpu()[torch.cat(labelled)] for tensors in zip(*parts, strict=True)]
    of_all = (these.rows(t if own else t[:0]) for t in (*of_N, torch.cat(sequence)))
    loss_N, correct_N, exit_N, score_NE, sequence_N = of_all
    counted = total if count_flops else None
    return Measured(loss_N, correct_N, exit_N, score_NE, sequence_N, sequences.tokens, ran, counted, seconds)


def judge(logits_BSV: Tensor, label_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of every token, ``(B, S)`` or ``(N,)`` as the labels, and whether its likeliest token is the label; float32
    logits of a chunk at a time. Zero and False where there is no label."""
    losses, correct = [], []
    step = chunk_tokens(logits_BSV.shape[-1], torch.float32)
    for logits_CV, label_C in zip(logits_BSV.flatten(0, -2).split(step), label_BS.flatten().split(step), strict=True):
        losses.append(nn.functional.cross_entropy(logits_CV.float(), label_C, reduction="none"))
        correct.append(logits_CV.argmax(-1) == label_C)
    return torch.cat(losses).view(label_BS.shape), torch.cat(correct).view(label_BS.shape)


@contextmanager
def _counted_layers(model: CascadeForCausalLM) -> Iterator[list[int]]:
    """A list of one number: decoder layers times the tokens they ran on, base and stages alike."""
    count = [0]

    def add(_layer: nn.Module, args: tuple[Any, ...], _output: object) -> None:
        count[0] += args[0].shape[:-1].numel()

    stages: list[Any] = list(model.stages)
    layers = [*model.base.model.layers, *(layer for stage in stages for layer in stage.layers)]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


def _counter() -> FlopCounterMode:
    """torch's counter, and the CPU's attention kernel, which it does not know."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        batch, heads, queries, size = query
        return 2 * batch * heads * queries * key[2] * (size + value[3])

    cpu_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={cpu_kernel: attention})


def _perplexity(loss: Tensor) -> float:
    return perplexity(loss.double().mean().item())  # NaN of no tokens


def bootstrap_difference(
    loss_N: Tensor, base_N: Tensor, sequence_N: Tensor, *, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> Any:
    """95 % interval of ``perplexity - base's perplexity``, by drawing sequences with replacement (Efron's percentiles).

    Sequences, not tokens: the tokens of a sequence are not independent. (low, high); NaN for fewer than two sequences.

    Args:
        loss_N, base_N: losses of the same N tokens.
        sequence_N: the number of each token's sequence, ascending.
    """
    count_B = torch.unique_consecutive(sequence_N, return_counts=True)[1]
    sequences = len(count_B)
    if sequences < 2:
        return math.nan, math.nan
    drawn = torch.randint(sequences, (samples, sequences), generator=torch.Generator().manual_seed(seed))
    # A long sequence weighs more; all weigh exactly 1 where they are equally long.
    weight_B = count_B / count_B.double().mean()
    weight_R = weight_B[drawn].mean(1)

    def perplexities(of_N: Tensor) -> Tensor:
        total_B = nn.utils.rnn.pad_sequence(of_N.double().split(count_B.tolist()), batch_first=True).sum(1)
        return ((total_B / count_B * weight_B)[drawn].mean(1) / weight_R).exp()

    tail = (1 - CONFIDENCE) / 2
    at = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.quantile(perplexities(loss_N) - perplexities(base_N), at).tolist()
    return low, high


def evaluate_cascade(
    model: CascadeForCausalLM, sequences: Sequences, *, batch_tokens: int = 1024, count_flops: bool = True
) -> dict[str, Any]:
    """The base alone, with stage 1, with stages 1-2, ...: a row each, and what every exit's easy and hard tokens are.

    Args:
        sequences: with at least one label.
        count_flops: runs everything a second time, as counting disturbs the clock.

    Returns:
        ``rows``: see :meth:`Measured.row`, and the perplexity's difference to the base with its interval.
        Where the cascade is one plain model with an open threshold (see :meth:`StageKind.mergeable`), ``rows`` ends
        with that model, ``merged``: what it costs is what the base costs, which has as many layers of the same shape.
        ``exits``: for each exit but the last, tokens and perplexity of those that left there, and of those that went
        on: had they left there, and where they did leave.
    """
    trained, stages = model.config.thresholds, len(model.stages)
    all_measured, rows = list[Measured](), list[dict[str, Any]]()

    def add_row(name: str, measured: Measured, **costs: Any) -> None:
        base = (*all_measured, measured)[0]
        low, high = bootstrap_difference(measured.loss_N, base.loss_N, base.sequence_N)
        row = {"name": name, **measured.row(stages), **costs, "difference": measured.perplexity - base.perplexity}
        row |= {"difference_low": low, "difference_high": high}
        rows.append({name: None if value != value else value for name, value in row.items()})  # NaN is no JSON

    for used in range(stages + 1):
        thresholds = [*trained[:used], *[-math.inf] * (stages - used)]
        how: dict[str, Any] = {"batch_tokens": batch_tokens, "name": cascade_name(used)}
        measured, costs = measure(model, sequences, thresholds, **how), {}
        if count_flops:
            counted = measure(model, sequences, thresholds, **how, count_flops=True)
            costs["flops_per_token"] = counted.row(stages)["flops_per_token"]
        add_row(cascade_name(used), measured, **costs)
        all_measured.append(measured)
    if get_kind(model.config.kind).mergeable([model.config.stage_config(n + 1) for n in range(stages)]):
        how = {"batch_tokens": batch_tokens, "name": MERGED, "context_enters": True}
        of_base = {name: rows[0][name] for name in ("layers_per_token", "flops_per_token")}
        untimed = {"seconds": None, "tokens_per_second": None}  # what ran is the base and then the stage
        add_row(MERGED, measure(model, sequences, [math.inf], **how), **of_base, **untimed)
    return {"rows": rows, "exits": _exits(all_measured)}


def cascade_name(stages: int) -> str:
    return "base" if stages == 0 else "+ stage 1" if stages == 1 else f"+ stages 1-{stages}"


def _exits(all_measured: list[Measured]) -> list[dict[str, Any]]:
    """With k stages every token that comes as far as exit k leaves there: what it would have lost had it stayed."""
    whole = all_measured[-1]
    exits = []
    for exit_, here in enumerate(all_measured[:-1]):
        left, on = whole.exit_N == exit_, whole.exit_N > exit_
        row = {
            "exit": "base" if exit_ == 0 else f"stage {exit_}",
            "easy_tokens": int(left.sum()),
            "easy_perplexity": _perplexity(whole.loss_N[left]),
            "hard_tokens": int(on.sum()),
            "hard_perplexity_here": _perplexity(here.loss_N[on]),
            "hard_perplexity_at_its_exit": _perplexity(whole.loss_N[on]),
        }
        exits.append({name: None if value != value else value for name, value in row.items()})
    return exits


def sweep_threshold(
    model: CascadeForCausalLM, sequences: Sequences, *, points: int = 9, batch_tokens: int = 1024
) -> list[dict[str, Any]]:
    """Moves the exit threshold of stage 1 from closed to open; the others stay as trained. A row for each point.

    The points are equal shares of the tokens with a label, so that cost grows evenly; ``trained`` marks the row of the
    trained threshold.

    Raises:
        ValueError: a cascade without stages, or fewer than two points.
    """
    stages = len(model.stages)
    if stages == 0 or points < 2:
        raise ValueError(f"points: {points}, stages: {stages}; needs at least two points and one stage")
    first, *others = model.config.thresholds
    how: dict[str, Any] = {"batch_tokens": batch_tokens, "count_flops": True}

    def row(threshold: float, measured: Measured, trained: bool = False) -> dict[str, Any]:
        values = measured.row(stages)
        del values["seconds"], values["tokens_per_second"]  # not taken while counting
        return {"trained": trained, "threshold": threshold, **values}

    trained = measure(model, sequences, [first, *others], **how, name="trained threshold")
    score_N = trained.score_NE[:, 0]
    rows = [row(first, trained, trained=True)]
    for share in (n / (points - 1) for n in range(points)):
        threshold = select_hardest(score_N, share).threshold if share > 0 else -math.inf
        measured = measure(model, sequences, [threshold, *others], **how, name=f"share {share:.3f}")
        rows.append(row(threshold, measured))
    return sorted(rows, key=lambda r: r["threshold"])
