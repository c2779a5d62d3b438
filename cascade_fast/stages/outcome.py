"""What is measured once, at the end of a run, beside the cascade's own numbers: the merged model, and other text."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.criteria import Criterion
from cascade_fast.losses import perplexity
from cascade_fast.records import General, Merged
from cascade_fast.runtime.compute import Compute
from cascade_fast.settings import GENERAL, RunSettings
from cascade_fast.stages.exits import ExitStage, evaluate_exits, merged_losses
from cascade_fast.stages.kind import get_kind
from cascade_fast.stages.tokens import Recompute


def measure_outcome(
    settings: RunSettings,
    stages: Sequence[ExitStage],
    stores: Mapping[str, HiddenStore],
    base_layers: int,
    *,
    criterion: Criterion,
    compute: Compute,
    recompute: Recompute | None = None,
) -> tuple[General | None, Merged | None]:
    """What came of a cascade on other text, and of the plain model that it can be merged into; None where there is no
    such text or model.

    Args:
        stages: those that are kept.
        stores: of the base pass; ``general`` is among them where other text has been read.
    """
    mergeable = get_kind(settings.stage_kind).mergeable([kept.stage.config for kept in stages])

    def merged(split: str) -> Tensor:
        return merged_losses(stages[0].stage, stores[split], compute=compute, recompute=recompute)

    def merged_perplexity(split: str) -> float:
        return perplexity(merged(split).double().mean())

    general_record, merged_record = None, None
    if mergeable:
        merged_record = Merged(
            all_token_val_ppl=merged_perplexity("val"),
            all_token_test_ppl=merged_perplexity("test") if len(stores["test"]) else None,
            layers_per_token=float(base_layers),
        )
    if GENERAL in stores and settings.general_text is not None:
        whole = evaluate_exits(list(stages), stores[GENERAL], criterion=criterion, compute=compute, recompute=recompute)
        general_record = General(
            dataset=settings.general_text,
            tokens=len(whole.loss_N),
            base_loss=whole.base_loss_N.double().mean().item(),
            rise=_rise(whole.loss_N, whole.base_loss_N),
            merged_rise=_rise(merged(GENERAL), whole.base_loss_N) if mergeable else None,
        )
    return general_record, merged_record


def _rise(loss_N: Tensor, base_loss_N: Tensor) -> float:
    """Of the mean; exactly 0 where every token has kept the base's loss."""
    return (loss_N.double() - base_loss_N.double()).mean().item()
