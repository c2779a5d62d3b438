"""``metrics.jsonl``: what happens in a run, as it happens."""

import json
import time
from pathlib import Path
from typing import Any

from cascade_fast.runtime.files import room_for


class MetricsLog:
    """``metrics.jsonl``: one JSON record a line, appended and flushed.

    ``size`` and ``truncate`` let a resumed run drop what came after its checkpoint, so that no epoch is told twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, "time": time.time(), **fields}, allow_nan=False)
        with room_for(self.path, len(line)), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def first_line_size(self) -> int:
        """Bytes of the first line; 0 if there is none that is whole."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            line = file.readline()
        return len(line) if line.endswith(b"\n") else 0

    def truncate(self, size: int) -> None:
        """Keeps the whole lines among the first ``size`` bytes: a process may have died within the one after them."""
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            kept = file.read(size)
            file.truncate(kept.rfind(b"\n") + 1)
