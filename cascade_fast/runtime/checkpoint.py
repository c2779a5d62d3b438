"""The checkpoints of a training: ``checkpoint-<step>.safetensors``, of which the last two are kept.

A newest one that is damaged is noticed, and the one before it is used.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from cascade_fast.runtime.console import say
from cascade_fast.runtime.files import DamagedFile, load_tensors, save_tensors

KEEP = 2


class Checkpoints:
    """The checkpoints of one thing being trained, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("checkpoint-*.safetensors"))

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Writes the checkpoint of ``step`` and removes all but the last two."""
        save_tensors(self.folder / f"checkpoint-{step:09d}.safetensors", tensors, state)
        for old in self._paths()[:-KEEP]:
            old.unlink()

    def load(
        self, check: Callable[[dict[str, Any]], object] = lambda _state: None
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint that is whole, or None; damaged ones are named in a line and passed over.

        ``check``: raises DamagedFile for a state whose other files are not whole.
        """
        for path in reversed(self._paths()):
            try:
                tensors, state = load_tensors(path)
                if not state:
                    raise DamagedFile(f"{str(path)!r} holds no state")
                check(state)
                return tensors, state
            except DamagedFile as error:
                say(f"  {error}; going back to the checkpoint before it")
        return None
