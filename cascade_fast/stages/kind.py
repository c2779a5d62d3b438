"""A stage kind: one way to build, feed, run and count stages.

Whatever depends on the kind is asked of its object; nothing else names one. A new kind is a file of this folder that
defines ``KIND``, and an entry in ``presets.STAGE_KINDS``.
"""

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from cascade_fast.base.base_pass import BasePass
from cascade_fast.base.fill_store import BaseNeeds
from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.base.model import BaseModel, find_base
from cascade_fast.input_checks import ALL, InputError, shown
from cascade_fast.presets import STAGE_KINDS
from cascade_fast.runtime.compute import Compute
from cascade_fast.settings import RunSettings
from cascade_fast.stages.counts import StageCounts, StageMemory
from cascade_fast.stages.stage import Stage, StageConfig
from cascade_fast.stages.tokens import Recompute, StageTokens


class StageKind(ABC):
    """A kind of stages. The defaults are those of a stage that takes each token by itself.

    Attributes:
        name: as ``settings.stage_kind`` has it.
        config_class: of its stages' shapes.
        layer_class: of its stages' layers.
        attends: whether its tokens attend to their text: their keys and values go from exit to exit, and every store
            so far is read.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[StageConfig]] = StageConfig
    layer_class: ClassVar[type[nn.Module]]
    attends: ClassVar[bool] = False

    def describe(self, config: StageConfig) -> str:
        """What the stages are, after "n stage(s), ...", in Markdown."""
        return "new layers trained on its *hard* tokens"

    # --- the base -----------------------------------------------------------------------------------------------------

    def check(self, base: str, base_config: Any, settings: RunSettings) -> None:  # noqa: B027 (most bases will do)
        """Raises InputError where there can be no such stage on ``base`` with transformers' ``base_config``."""

    def needs(self, settings: RunSettings) -> BaseNeeds:
        """What the base pass has to keep."""
        return BaseNeeds(settings.reads)

    def recompute(
        self, settings: RunSettings, base_config: Any, passed: BasePass, compute: Compute
    ) -> Recompute | None:
        """The base's keys and values ``(B, S, L, 2, G, E)`` anew, from its residual stream ``(B, S, D)`` and positions
        ``(B, S)``; None where nobody needs them or the base pass has kept them."""
        return None

    # --- the stage ----------------------------------------------------------------------------------------------------

    def shape(self, base_config: Any, *, layers: int, init: str, head: str, reads: str, **more: Any) -> StageConfig:
        """Of a stage on a base with transformers' ``base_config``. ``more``: what a kind of its own has."""
        shape = self.config_class.from_base(base_config, layers=layers, init=init, head=head, reads=reads, **more)
        return dataclasses.replace(shape, kind=self.name)

    def config(self, settings: RunSettings, base_config: Any) -> StageConfig:
        """The shape that ``settings`` ask for."""
        s = settings
        return self.shape(base_config, layers=s.layers_per_stage, init=s.init, head=s.head, reads=s.reads)

    @abstractmethod
    def new(
        self, settings: RunSettings, base_config: Any, passed: BasePass, before: Stage | None, number: int
    ) -> Stage:
        """Stage ``number`` (from 1) as training begins with it; ``before`` is the stage before it."""

    @abstractmethod
    def empty(self, config: StageConfig, head_VD: Tensor | None = None) -> Stage:
        """A stage that trained weights are about to be loaded into."""

    def lend(self, stage: Stage, passed: BasePass) -> None:  # noqa: B027 (most have none)
        """Lends ``stage`` the frozen layers that it has adapters for, as the base pass has kept them."""

    def lend_base(self, stage: Stage, base: Any) -> None:  # noqa: B027
        """As :meth:`lend`, those of transformers' model ``base``."""

    def tokens(
        self,
        stores: Sequence[HiddenStore],
        index_K: Tensor,
        recompute: Recompute | None = None,
        *,
        easy_too: bool = False,
    ) -> StageTokens:
        """The tokens ``index_K`` of the last of ``stores``, handed out as its stages take them.

        Args:
            stores: the base's, then what each stage so far has left.
            recompute: see :meth:`recompute`.
            easy_too: of a kind that attends, whether the other tokens go through the stage, too.
        """
        return StageTokens(stores[-1], index_K)

    def mergeable(self, stages: Sequence[StageConfig]) -> bool:
        """Whether base and ``stages`` make one plain model where every token goes through the stage: its layers, norm
        and head then take the place of the base's last layers, norm and head."""
        return False

    # --- what it takes ------------------------------------------------------------------------------------------------

    def counts(self, config: StageConfig) -> StageCounts:
        """Parameters and FLOPs."""
        return StageCounts(config)

    def memory(self, settings: RunSettings, config: StageConfig, width: int, *, all_enter: bool = False) -> StageMemory:
        """Bytes beyond what every stage takes. ``width``, ``all_enter``: of :class:`StageMemory`."""
        return StageMemory(settings, self.counts(config), width, all_enter)


def get_kind(name: Any) -> StageKind:
    """The kind of that name. Raises InputError where there is none."""
    if not isinstance(name, str) or name not in STAGE_KINDS:
        raise InputError(f"stage_kind: {shown(name)}; must be one of {', '.join(STAGE_KINDS)}")
    return importlib.import_module(f"cascade_fast.stages.{name.replace('-', '_')}").KIND


def base_needs(settings: RunSettings) -> BaseNeeds:
    """What the base pass keeps for stages as ``settings`` have them."""
    return get_kind(settings.stage_kind).needs(settings)


def find_base_for_stages(settings: RunSettings) -> BaseModel:
    """The base, found and checked for stages of the kind of ``settings``. Raises InputError."""
    base = find_base(settings)
    get_kind(settings.stage_kind).check(base.name, base.config, with_layers(settings, base.config))
    return base


def with_layers(settings: RunSettings, base_config: Any) -> RunSettings:
    """``settings`` with the number of layers that ``layers_per_stage: all`` means on a base with transformers'
    ``base_config``."""
    if settings.layers_per_stage != ALL:
        return settings
    return dataclasses.replace(settings, layers_per_stage=base_config.num_hidden_layers)
