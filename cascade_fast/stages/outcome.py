"""What is measured once, at the end of a run, beside the cascade's own numbers: the merged model, and other text."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.losses import perplexity
from cascade_fast.records import General, Merged
from cascade_fast.runtime.compute import Compute
from cascade_fast.runtime.console import say
from cascade_fast.settings import GENERAL, RunSettings
from cascade_fast.stages.exits import ExitEvaluation, ExitStage, merged_losses
from cascade_fast.stages.kind import get_kind
from cascade_fast.stages.tokens import Recompute


def measure_outcome(
    settings: RunSettings,
    stages: Sequence[ExitStage],
    stores: Mapping[str, HiddenStore],
    evaluated: Mapping[str, ExitEvaluation],
    base_layers: int,
    *,
    compute: Compute,
    recompute: Recompute | None = None,
) -> tuple[General | None, Merged | None]:
    """What came of a cascade on other text, and of the plain model that it can be merged into; None where there is no
    such text or model, or a loss is not finite: tokens get here that the stage was not trained on.

    Args:
        stages: those that are kept.
        stores: of the base pass; ``general`` is among them where other text has been read.
        evaluated: of the cascade, on every one of these but that of training.
    """
    merged_of: dict[str, Tensor] = {}  # losses, by split
    if get_kind(settings.stage_kind).mergeable([kept.stage.config for kept in stages]):
        for split, found in evaluated.items():
            if len(found.exit_N) == len(stores[split]) and bool((found.exit_N == 1).all()):
                merged_of[split] = found.loss_N  # every token has gone through the stage anyway
            else:
                merged_of[split] = merged_losses(stages[0].stage, stores[split], compute=compute, recompute=recompute)
        if not all(bool(loss_J.isfinite().all()) for loss_J in merged_of.values()):
            say("note: merged into a plain model a loss is not finite; that model is left out")
            merged_of = {}
    general, merged = None, None
    if merged_of:
        ppl = {split: perplexity(loss_J.double().mean()) for split, loss_J in merged_of.items()}
        layers = float(base_layers)
        merged = Merged(all_token_val_ppl=ppl["val"], all_token_test_ppl=ppl.get("test"), layers_per_token=layers)
    if GENERAL in evaluated and settings.general_text is not None:
        general = _general(settings.general_text, evaluated[GENERAL], merged_of.get(GENERAL))
    return general, merged


def _general(dataset: str, found: ExitEvaluation, merged_J: Tensor | None) -> General | None:
    """Of the cascade's losses, and the merged model's."""
    base_J = found.base_loss_N.double()

    def rise(loss_J: Tensor) -> float:
        """Of the mean; exactly 0 where every token has kept the base's loss."""
        return (loss_J.double() - base_J).mean().item()

    if not math.isfinite(rise(found.loss_N)):
        say("note: on other text a loss is not finite; it is left out")
        return None
    return General(
        dataset=dataset,
        tokens=len(base_J),
        base_loss=base_J.mean().item(),
        rise=rise(found.loss_N),
        merged_rise=None if merged_J is None else rise(merged_J),
    )
