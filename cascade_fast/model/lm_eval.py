"""``CascadeLM``: a trained cascade as a model of lm-evaluation-harness.

Shape legend: B sequences, S sequence length, V vocabulary.
"""

import math
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from cascade_fast.input_checks import InputError
from cascade_fast.model.loading import load_model
from cascade_fast.settings import DTYPES


class CascadeLM(HFLM):
    """lm-eval's Hugging Face model with a cascade in it, its base's tokenizer, and a choice of exits.

    Args:
        pretrained: folder of a finished run, a saved cascade, or its hub id.
        exits: ``all``; ``base``, which closes every stage; or the number of stages that stay open.
        base_path: where the base is now, if not where it was in training.
        device: cpu, cuda, cuda:1, ...; auto, or a GPU where there is none: the best there is.
        dtype: compute dtype; auto: that of training.
        kwargs: of ``HFLM``: ``batch_size``, ``max_length``, ``add_bos_token``, ``prefix_token_id``, ...

    Log-softmax is taken in float32, as the cascade's own loss does; ``HFLM`` alone would take it in the logits' dtype.

    Raises:
        InputError: ``exits`` or ``dtype`` that there is not, or a folder that is no cascade.
    """

    def __init__(
        self,
        pretrained: str,
        exits: str | int = "all",
        base_path: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        **kwargs: Any,
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"dtype: {dtype!r}; must be one of {', '.join(DTYPES)}")
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "auto"  # lm-eval says cuda:0 when nothing is asked for, and means: a GPU if there is one
        model, tokenizer = load_model(pretrained, device=device, dtype=dtype, base_path=base_path)
        self.thresholds = open_exits(model.config.thresholds, exits)
        kwargs = {"softmax_dtype": "float32", "backend": "causal", **kwargs}
        super().__init__(pretrained=model, tokenizer=tokenizer, **kwargs)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Token ids (B, S), padded on the right, to logits (B, S, V). Nothing looks at what the padding gives."""
        with torch.no_grad():
            return self.model(inps, thresholds=self.thresholds).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        return super()._model_generate(context, max_length, stop, thresholds=self.thresholds, **generation_kwargs)


def open_exits(thresholds: list[float], exits: str | int) -> list[float]:
    """The trained thresholds, with those behind the ``exits`` asked for closed: -inf lets no token in."""
    stages = len(thresholds)
    named = {"all": stages, "base": 0}
    count = named.get(str(exits), exits)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= stages:
        raise InputError(f"exits: {exits!r}; must be all, base, or a number of stages from 0 to {stages}")
    return [threshold if n < count else -math.inf for n, threshold in enumerate(thresholds)]
