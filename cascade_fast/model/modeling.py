"""``CascadeForCausalLM``: base and stages as one Hugging Face causal language model with real skipping.

The base reads every token; a stage computes only the tokens that enter it, and each token's logits are those of the
exit where it leaves. An appended stage sees each token alone: the key/value cache is the base's, and it runs on the
kept positions only. A second look attends to the text before a token: it runs on every hard token, and leaves its keys
and values in the cache for those to come (see ``cascade_cache.py``).

Shape legend: B sequences, S sequence length, T kept positions of a sequence, N tokens that the stages may see (B * T
for appended ones, B * S for a second look), K those of them that have come to an exit, M = B * T tokens that get
logits, D hidden size, V vocabulary, E stages.
"""

import copy
import functools
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from cascade_fast import ops
from cascade_fast.base.cache_name import cache_of, one_cache, with_cache
from cascade_fast.criteria import TokensAtExit, get_criterion
from cascade_fast.input_checks import InputError
from cascade_fast.model.cache import StageContext, open_cache
from cascade_fast.model.card import base_license, render_card
from cascade_fast.model.configuration import CascadeConfig
from cascade_fast.model.exit_logits import ExitLogits
from cascade_fast.model.labels import ShiftedLabels, may_enter
from cascade_fast.model.weights import (
    check_safetensors,
    checked_load,
    find_base_of,
    load_thin,
    local_folder,
    write_stages,
)
from cascade_fast.presets import STAGE_KINDS
from cascade_fast.runtime.compute import Compute
from cascade_fast.runtime.files import atomic_write_text
from cascade_fast.selection import select_below
from cascade_fast.stages.kind import get_kind


@dataclass
class CascadeOutput(CausalLMOutputWithPast):
    """Also, where asked for with ``output_exits``:

    ``exits``: (B, T) int64, 0 for the base, k for stage k, -1 for padding and for context (see ``forward``).
    ``scores``: (B, T, E) float32, the score before stage 1, 2, ..., low = hard; NaN where the token did not come so
    far.
    """

    exits: Tensor | None = None
    scores: Tensor | None = None


class CascadeForCausalLM(PreTrainedModel, GenerationMixin):
    """A cascade. ``base`` is the base model as transformers has it, ``stages`` the trained stages in order."""

    config_class = CascadeConfig
    config: CascadeConfig
    _no_split_modules = [get_kind(name).layer_class.__name__ for name in STAGE_KINDS]  # noqa: RUF012 (as transformers has it)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # As in training: norms in float32, whatever the dtype of the matrices.
    _keep_in_fp32_modules_strict = ["stages.*norm"]  # noqa: RUF012

    def __init__(self, config: CascadeConfig) -> None:
        super().__init__(config)
        self.base = AutoModelForCausalLM.from_config(config.base_config, trust_remote_code=False)
        self.stages = nn.ModuleList(
            get_kind(config.kind).empty(config.stage_config(n)) for n in range(1, len(config.stages) + 1)
        )
        self.lend_layers()
        self.base_folder: str | None = None  # where the base was found; its tokenizer is there
        self.post_init()

    def lend_layers(self) -> None:
        """Lends stages with adapters the base's layers: they are in memory once."""
        for stage in self.stages:
            get_kind(self.config.kind).lend_base(stage, self.base)  # type: ignore[arg-type]

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    # --- forward -----------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_exits: bool = False,
        thresholds: Sequence[float] | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CascadeOutput:
        """Every token's logits at its own exit.

        Args:
            input_ids: (B, S); or ``inputs_embeds`` (B, S, D).
            attention_mask: (B, past + S), 0 for padding, on either side. Padding enters no stage.
            labels: (B, S); the loss is transformers': shifted, -100 ignored, the mean over what is left. As in training
                a token without a label is context only: where the *next* token's label is -100, the position enters no
                stage, its exit is -1, its logits are the base's, and its keys and values stay for the others. The last
                position, whose next token is not in ``labels``, may enter. Without ``labels`` every token may.
            cache, past_key_values: two names of one argument, the new and the old one of transformers. A second look
                needs its ``DynamicCache``, which is what ``generate`` makes.
            logits_to_keep: the last so many positions (0: all), or their indices; the others get no logits and enter
                no stage but a second look, whose keys and values later tokens attend to.
            output_exits: also return the exit of every token and its scores.
            kwargs: as transformers' models take them. ``shift_labels`` (B, S): of every position, the last included,
                the label of the next token; they stand for ``labels`` shifted. Alone they only say what is context,
                and no loss is computed.
            thresholds: instead of the trained ones, one for each stage; -inf closes a stage and those behind it.

        Returns:
            :class:`CascadeOutput`; ``logits`` (B, T, V).

        Raises:
            InputError: another number of thresholds than stages, or NaN among them.
            ValueError: neither or both of ``input_ids`` and ``inputs_embeds``; labels of another shape than (B, S),
                whatever ``logits_to_keep`` is; a cache under both its names; for a second look another cache, an
                attention mask that is not 2D, or positions of several texts in one row.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: give exactly one of them")
        thresholds = self._exit_thresholds(thresholds)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        # Not an argument by name: transformers' Trainer would then take it for a column that every batch must have.
        shifted = ShiftedLabels.from_labels(
            labels, kwargs.pop("shift_labels", None), (inputs_embeds.shape[0], inputs_embeds.shape[1])
        )
        attends = self.config.attends
        given = one_cache(cache, past_key_values)
        cache, keeps_cache = given, self.base.config.use_cache if use_cache is None else use_cache
        if attends and (thresholds or keeps_cache or cache is not None):  # stages read the base's keys and values
            cache = open_cache(cache, self.config.base_config, inputs_embeds.shape[1], position_ids, attention_mask)
        with self._stages_input() as entered:
            read = self.base.model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **with_cache(cache),
                **kwargs,
            )
        context = self._context(cache, inputs_embeds, position_ids, attention_mask) if attends else None
        logits_BTV, exit_BT, score_BTE = self._exits(
            inputs_embeds,
            read.last_hidden_state,
            entered[0] if self.config.reads == "residual" else read.last_hidden_state,
            may_enter(attention_mask, shifted, inputs_embeds),
            logits_to_keep,
            thresholds,
            context,
        )
        loss = None
        if labels is not None and shifted is not None:
            label_BT = shifted.label_BS[:, _kept(logits_to_keep)].contiguous()
            loss = self.loss_function(
                logits=logits_BTV, labels=labels, shift_labels=label_BT, vocab_size=self.config.vocab_size, **kwargs
            )
        left = cache_of(read)
        if context is not None:
            left = context.close() if keeps_cache or given is not None else None
        return CascadeOutput(
            loss=loss,
            logits=logits_BTV,
            **with_cache(left),
            hidden_states=read.hidden_states,
            attentions=read.attentions,
            exits=exit_BT if output_exits else None,
            scores=score_BTE if output_exits else None,
        )

    def _exit_thresholds(self, asked: Sequence[float] | None) -> list[float]:
        """The thresholds in use, up to the first that lets no token in."""
        thresholds = self.config.thresholds if asked is None else [float(t) for t in asked]
        if len(thresholds) != len(self.stages) or any(math.isnan(t) for t in thresholds):
            raise InputError(f"thresholds: {thresholds}; must be {len(self.stages)} numbers, one for each stage")
        return thresholds[: thresholds.index(-math.inf)] if -math.inf in thresholds else thresholds

    def _context(
        self, cache: Any, inputs_embeds: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None
    ) -> StageContext | None:
        """What the stages' tokens attend to; None where nobody keeps keys and values."""
        if cache is None:
            return None
        return StageContext(
            cache,
            base_layers=self.config.num_hidden_layers,
            stages=len(self.stages),
            depth=self.config.stages[0]["layers"],
            shape=(inputs_embeds.shape[0], inputs_embeds.shape[1]),
            position_ids=position_ids,
            attention_mask=attention_mask,
        )

    @contextmanager
    def _stages_input(self) -> Iterator[list[Tensor]]:
        """The base's residual stream where stages that read it begin: before its final norm, or before the layers that
        the stages copy. transformers does not return it as it is."""
        kept: list[Tensor] = []
        entry = self.config.entry_layer
        module = self.base.model.norm if entry is None else self.base.model.layers[entry]
        hook = module.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
        try:
            yield kept
        finally:
            hook.remove()

    def _exits(
        self,
        embedded_BSD: Tensor,
        last_BSD: Tensor,
        reads_BSD: Tensor,
        enters_BS: Tensor | None,
        logits_to_keep: int | Tensor,
        thresholds: list[float],
        context: StageContext | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the positions that get logits: these (B, T, V), exits (B, T) and scores (B, T, E)."""
        batch, new = last_BSD.shape[:2]
        kept = _kept(logits_to_keep)
        attends = self.config.attends
        ran = slice(None) if attends else kept  # later tokens attend to those that get no logits
        column_T = None  # positions that get logits; None: all that the stages see
        if attends and not (isinstance(logits_to_keep, int) and (logits_to_keep == 0 or logits_to_keep >= new)):
            column_T = torch.arange(new, device=last_BSD.device)[kept]
        last_BSD = last_BSD[:, ran]
        logits = ExitLogits(batch, last_BSD.shape[1], column_T, vocab_size=self.config.vocab_size)
        exit_N, score_NE = self._cascade(
            embedded_BSD[:, ran].flatten(0, 1),
            last_BSD.flatten(0, 1),
            reads_BSD[:, ran].flatten(0, 1),
            None if enters_BS is None else enters_BS[:, ran].flatten(),
            thresholds,
            logits,
            context,
        )
        exit_BT, score_BTE = (of_N.unflatten(0, last_BSD.shape[:2]) for of_N in (exit_N, score_NE))
        if column_T is not None:
            exit_BT, score_BTE = exit_BT[:, column_T], score_BTE[:, column_T]
        return logits.together(), exit_BT, score_BTE

    def _cascade(
        self,
        embedded_ND: Tensor,
        last_ND: Tensor,
        reads_ND: Tensor,
        enters_N: Tensor | None,
        thresholds: list[float],
        logits: ExitLogits,
        context: StageContext | None,
    ) -> tuple[Tensor, Tensor]:
        """Sends N tokens through base and stages: exits (N,) and scores (N, E); their logits go to ``logits``."""
        criterion = get_criterion(self.config.criterion)
        n, device = last_ND.shape[0], last_ND.device
        exit_N = torch.zeros(n, dtype=torch.int64, device=device)
        if enters_N is not None:
            exit_N.masked_fill_(~enters_N, -1)
        score_NE = torch.full((n, len(self.stages)), math.nan, device=device)
        token_K = torch.arange(n, device=device)  # which tokens have come this far
        before_KD, after_KD, normed_KD, hidden_KD = embedded_ND, last_ND, last_ND, reads_ND
        for number, threshold in enumerate([*thresholds, None]):
            head = functools.partial(self._head, number)
            if threshold is None:  # the last exit takes all that is left
                logits.put(head, normed_KD, token_K)
                break
            before_KD, after_KD = before_KD.detach(), after_KD.detach()
            if criterion.needs_logits:
                score = functools.partial(criterion.score_chunk, TokensAtExit(before_KD, after_KD))
                score_K = logits.put(head, normed_KD, token_K, score=score)
            else:
                with torch.no_grad():
                    score_K = criterion.score(TokensAtExit(before_KD.float(), after_KD.float()))
            if enters_N is not None and number == 0:
                score_K = score_K.masked_fill(~enters_N, math.nan)  # NaN is below no threshold: it enters no stage
            score_NE[token_K, number] = score_K
            hard_J = select_below(score_K, threshold)
            easy = len(token_K) - len(hard_J)
            if easy and not criterion.needs_logits:  # logits only of those that leave: nobody asks for the others'
                easy_J = torch.nonzero_static(~(score_K <= threshold), size=easy).squeeze(1)  # waits for no device
                logits.put(head, normed_KD[easy_J], token_K[easy_J])
            if len(hard_J) == 0:
                break
            before_KD, (token_K,) = ops.gather_rows(hidden_KD, hard_J, (token_K,))
            exit_N.index_fill_(0, token_K, number + 1)
            output_KD, normed_KD, hidden_KD = self._run_stage(number, before_KD, token_K, last_ND.dtype, context)
            before_KD, after_KD = before_KD.float(), output_KD.float()
        return exit_N, score_NE

    def _head(self, exit_: int, normed_KD: Tensor) -> Tensor:
        """Logits of the base (exit 0) or of stage ``exit_``; a stage without a head of its own uses the base's."""
        stage: Any = self.stages[exit_ - 1] if exit_ else None
        head = self.base.lm_head if stage is None or stage.lm_head is None else stage.lm_head
        return head(normed_KD.to(head.weight.dtype))

    def _run_stage(
        self, index: int, hidden_KD: Tensor, token_K: Tensor, dtype: torch.dtype, context: StageContext | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Takes K tokens through a stage: its output, what its head takes, and what the next stage reads.

        As in training: matrix products in the base's dtype, everything else in float32, and what is handed on in
        bfloat16 if the base computes so, else in float32.
        """
        stage: Any = self.stages[index]
        inputs = hidden_KD if context is None else context.pack(index + 1, hidden_KD, token_K)
        with Compute(hidden_KD.device, dtype).autocast():
            ran = stage.run(inputs)
        if context is not None and ran.kv_KL2GE is not None:
            context.leave(index + 1, token_K, ran.kv_KL2GE)
        handed_on = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return ran.output_KD, ran.normed_KD, ran.next_KD.to(handed_on)

    # --- loading and saving ------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *args: Any, base_path: str | None = None, **kwargs: Any
    ) -> Any:
        """Loads the folder of a finished run, or what :meth:`save_pretrained` wrote, from disk or the hub.

        Args:
            base_path: for a folder without the base's weights: where the base is now, if not where it was in training
                (hub id, folder, .gguf file). Its fingerprint is checked either way.
            kwargs: as in transformers (``dtype``, ``device_map``, ...); the default dtype is the one of training.

        Weights are only ever read from safetensors or GGUF, and no code of a repository is run, whatever is asked.

        Raises:
            InputError: no finished cascade there, one that is damaged or without safetensors, a base that is not found
                or whose fingerprint differs, or stages that do not fit it.
        """
        config = kwargs.pop("config", None)
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, config=config, **kwargs)
        hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}
        if not isinstance(config, CascadeConfig):
            config = CascadeConfig.from_pretrained(config or pretrained_model_name_or_path, **hub)
        where = f"cascade: {str(pretrained_model_name_or_path)!r}"
        with_info = kwargs.pop("output_loading_info", False)
        load = functools.partial(checked_load, super().from_pretrained, where)
        if config.self_contained:
            check_safetensors(where, pretrained_model_name_or_path)
            model, info = load(pretrained_model_name_or_path, *args, config=config, **kwargs)
            model.base_folder = str(pretrained_model_name_or_path)
            return (model, info) if with_info else model
        folder = local_folder(pretrained_model_name_or_path, **hub)
        base = find_base_of(config, base_path)
        config = copy.deepcopy(config)
        config.base_config = copy.deepcopy(base.config)  # what the fingerprint stands for, whatever the file says
        config.check()
        plain = {name: value for name, value in kwargs.items() if name not in hub}
        dtype = plain.pop("dtype", None) or plain.pop("torch_dtype", None) or config.dtype or torch.float32
        model, info = load_thin(load, folder, config, base, *args, dtype=dtype, **plain)
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        return (model, info) if with_info else model

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], *, self_contained: bool = True, **kwargs: Any
    ) -> None:
        """Writes the cascade, its tokenizer and a model card: a folder that can be uploaded as it is.

        Args:
            self_contained: with the base's weights, as sharded safetensors (``kwargs`` as in transformers, such as
                ``max_shard_size``); otherwise only the stages, and a reference to the base with its fingerprint.

        Raises:
            InputError: without the base's weights, but it is not known where the base came from; or with them, but
                they are in 4 bit.
        """
        folder = Path(save_directory)
        if self_contained and self.config.quantization != "none":
            raise InputError(
                f"self_contained: True; the stages were trained on a base in 4 bit (base_quantization "
                f"{self.config.quantization}), whose weights are not saved: must be False"
            )
        if not self_contained and not self.config.base.get("fingerprint"):
            raise InputError("self_contained: False; needs to know where the base came from, and this model does not")
        before, self.config = self.config, copy.deepcopy(self.config)
        try:
            self.config.self_contained, self.config.settings = self_contained, before.portable_settings()
            if self_contained:
                super().save_pretrained(folder, **kwargs)
            else:
                self.config.architectures, self.config.dtype = [type(self).__name__], self.dtype
                self.config.save_pretrained(folder)
                self.generation_config.save_pretrained(folder)
                write_stages(folder, self.config, self.stages)
            self._save_tokenizer(folder)
            license = base_license(self.config, self.base_folder)
            # Not those of the whole: numel() of a 4-bit weight counts bytes, which only the base knows.
            parameters = self.base.num_parameters() + sum(p.numel() for p in self.stages.parameters())
            atomic_write_text(folder / "README.md", render_card(self.config, parameters=parameters, license=license))
        finally:
            self.config = before

    def _save_tokenizer(self, folder: Path) -> None:
        if self.base_folder is None:
            return
        with suppress(OSError, ValueError):  # the base has none: the model is whole without it
            AutoTokenizer.from_pretrained(self.base_folder, trust_remote_code=False).save_pretrained(folder)

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, *, self_contained: bool = True, private: bool | None = None, token: Any = None
    ) -> str:
        """Uploads what :meth:`save_pretrained` writes, model card included; the address of the commit."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, self_contained=self_contained)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload cascade"))


def _kept(logits_to_keep: int | Tensor) -> slice | Tensor:
    """The positions that get logits."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


AutoModelForCausalLM.register(CascadeConfig, CascadeForCausalLM, exist_ok=True)
