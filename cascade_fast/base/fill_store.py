"""The base over the sequences of a split: what it leaves of each token, in a hidden store."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cascade_fast.base.cache_name import with_cache
from cascade_fast.base.expanded_heads import expanded_heads
from cascade_fast.base.fused_norms import fused_norms
from cascade_fast.base.fused_rotation import fused_rotation
from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.base.sequences import Sequences
from cascade_fast.criteria import Criterion, TokensAtExit
from cascade_fast.runtime.compute import HostCopies, sent
from cascade_fast.runtime.console import Progress
from cascade_fast.selection import check_finite

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}
FLOAT16_MAX = 65504.0
TOO_LARGE = "too large"  # whether a hidden state is beyond it
SAVE_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class BaseNeeds:
    """What the base pass keeps for stages of a kind, beside scores and losses.

    Attributes:
        reads: the hidden state that the stages start from: ``residual`` (the residual stream) or ``last_hidden`` (after
            the final norm).
        last_layers: how many of the base's last layers the stages copy: their weights are kept, and the residual
            stream before them; 0: none, and the residual stream before the final norm.
        keys_and_values: whether those of these layers are kept, too.
        context: whether tokens without a label are kept, for others to attend to.
        all_enter: whether every token with a label enters the first stage, whatever its score. Where every token has
            one, nobody then reads the base's keys and values, and the layers from those that the stages copy on are not
            run over training text at all.
    """

    reads: str
    last_layers: int = 0
    keys_and_values: bool = False
    context: bool = False
    all_enter: bool = False


def last_layers(model: Any, needs: BaseNeeds) -> list[Any]:
    """The base's layers that the stages copy."""
    return list(model.model.layers[len(model.model.layers) - needs.last_layers :])


@contextlib.contextmanager
def _first_layers(model: Any, count: int) -> Iterator[None]:
    """The base with its first ``count`` layers alone."""
    layers = model.model.layers
    model.model.layers = layers[:count]
    try:
        yield
    finally:
        model.model.layers = layers


def batches_of(sequences: Sequences, device: torch.device) -> Iterator[slice]:
    """What the base reads at once. What it computes of a token may depend, in the last bits, on who is beside it."""
    return sequences.batches(TOKENS_AT_ONCE.get(device.type, 2048))


@torch.inference_mode()
def fill_store(
    model: Any,
    sequences: Sequences,
    store: HiddenStore,
    needs: BaseNeeds,
    criterion: Criterion,
    progress: Progress,
    batches: Iterable[slice] | None = None,
) -> bool:
    """Runs the sequences that the store does not have yet; False as soon as a hidden state does not fit its dtype.

    ``batches``: those of :func:`batches_of` whose tokens the store holds; None: all.
    On a GPU a batch is stored while the next one is read.
    With ``needs.all_enter`` only the layers before those that the stages copy are run, and tokens get no score.
    """
    from transformers import DynamicCache

    device = model.device
    residual: dict[str, Tensor] = {}
    copied = last_layers(model, needs)
    begins = copied[0] if copied and not needs.all_enter else model.model.norm
    hook = begins.register_forward_pre_hook(lambda _module, args: residual.update(hidden=args[0]))
    last_saved, rows = time.monotonic(), 0
    layers = len(model.model.layers) - (len(copied) if needs.all_enter else 0)
    waiting: list[_Left] = []

    def keep(left: _Left) -> bool:
        nonlocal last_saved
        arrays = left.arrays()
        if arrays is None:
            return False
        store.append(arrays)
        progress.advance(left.tokens)
        if time.monotonic() - last_saved > SAVE_PROGRESS_SECONDS:
            store.save_progress()
            last_saved = time.monotonic()
        return True

    with contextlib.ExitStack() as ends:
        ends.callback(hook.remove)
        ends.enter_context(_first_layers(model, layers))
        ends.enter_context(fused_norms(model))
        ends.enter_context(fused_rotation(model))
        ends.enter_context(expanded_heads(model))
        for some in batches_of(sequences, device) if batches is None else batches:
            padded = sequences.padded(some)
            kept = _Kept(padded.real_BS if needs.context else padded.labelled_BS, padded.labelled_BS, device)
            rows += kept.rows
            read = int(padded.real_BS.sum())
            if rows <= store.rows:  # read before the pass was interrupted
                progress.restart(progress.done + read)
                continue
            embedded_BSD = model.model.embed_tokens(sent(padded.input_BS, device))
            # One without a configuration keeps every key, whatever the sliding window.
            cache = DynamicCache() if "kv" in store else None
            output = model.model(inputs_embeds=embedded_BSD, use_cache=cache is not None, **with_cache(cache))
            last_BSD = output.last_hidden_state
            wide = {"hidden": kept(residual["hidden"] if needs.reads == "residual" else last_BSD)}
            if "kv" in store:
                wide["kv"] = kept.of_rows(_keys_and_values(cache, len(copied)))
            coming = {name: tensor.to(store.hidden.dtype) for name, tensor in wide.items()}
            if store.hidden.dtype == torch.float16:
                coming[TOO_LARGE] = torch.stack([t.abs().max() > FLOAT16_MAX for t in wide.values()]).any()
            tokens = TokensAtExit(kept(embedded_BSD, labelled=True), kept(last_BSD, labelled=True))
            label_N = padded.label_BS.flatten()[kept.row_N]
            if "loss" in store and not needs.all_enter:
                label_J = sent(label_N[kept.labelled_N], device)
                coming["score"], coming["loss"] = criterion.score_with_losses(
                    tokens, tokens.after_ND, model.lm_head.weight, label_J, dtype=model.dtype
                )
            elif not needs.all_enter:
                coming["score"] = criterion.score(tokens)
            places = {
                "label": label_N,
                "sequence": some.start + kept.row_N // padded.input_BS.shape[1],
                "position": kept.row_N % padded.input_BS.shape[1],
            }
            waiting.append(_Left(kept, places, HostCopies(coming), read))
            if len(waiting) > (device.type != "cpu") and not keep(waiting.pop(0)):
                return False
    return all(keep(left) for left in waiting)


@dataclass(frozen=True)
class _Left:
    """What a batch leaves for the store; ``tokens`` were read for it."""

    kept: "_Kept"
    places: dict[str, Tensor]
    coming: HostCopies
    tokens: int

    def arrays(self) -> dict[str, Tensor] | None:
        """The next rows of the store; None where a hidden state does not fit its dtype.

        Raises:
            NonFiniteScores: names sequence and position.
        """
        arrived = self.coming.wait()
        if bool(arrived.pop(TOO_LARGE, False)):
            return None
        if "score" in arrived:
            check_finite(arrived["score"], *(self.places[n][self.kept.labelled_N] for n in ("sequence", "position")))
        else:
            arrived["score"] = torch.full((int(self.kept.labelled_N.sum()),), torch.nan)
        for name in arrived.keys() & {"score", "loss"}:
            arrived[name] = self.kept.spread(arrived[name])
        return {**arrived, **self.places}


class _Kept:
    """Which of a batch's ``B * S`` places are kept, and which of them have a label. All of them: nothing is gathered.

    Attributes:
        row_N: places that are kept, int64 on the CPU.
    """

    def __init__(self, kept_BS: Tensor, labelled_BS: Tensor, device: torch.device) -> None:
        self.row_N = kept_BS.flatten().nonzero().squeeze(1)
        self.labelled_N = labelled_BS.flatten()[self.row_N]
        self._all, self._all_labelled = bool(kept_BS.all()), bool(self.labelled_N.all())
        self._row_N = None if self._all else sent(self.row_N, device)
        self._row_J = self._row_N if self._all_labelled else sent(self.row_N[self.labelled_N], device)

    @property
    def rows(self) -> int:
        return len(self.row_N)

    def __call__(self, of_BSD: Tensor, *, labelled: bool = False) -> Tensor:
        """``(N, D)``, or of those with a label ``(J, D)``."""
        return self.of_rows(of_BSD.flatten(0, 1), labelled=labelled)

    def of_rows(self, of_BS: Tensor, *, labelled: bool = False) -> Tensor:
        index = self._row_J if labelled else self._row_N
        return of_BS if index is None else of_BS[index]

    def spread(self, of_J: Tensor) -> Tensor:
        """``(N,)`` of what is on the CPU: NaN where there is no label."""
        if self._all_labelled:
            return of_J
        return of_J.new_full((self.rows,), torch.nan).masked_scatter_(self.labelled_N, of_J)


def _keys_and_values(cache: Any, layers: int) -> Tensor:
    """``(N, L, 2, G, E)`` of the last ``layers`` layers of transformers' cache."""
    kv_L2BGSE = torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers[-layers:]])
    return kv_L2BGSE.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)
