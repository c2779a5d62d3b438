"""``metrics.jsonl``: what happens in a run, as it happens."""

import json
import time
from pathlib import Path
from typing import Any

from cascade_fast.runtime.files import room_for
from cascade_fast.runtime.processes import processes
from cascade_fast.runtime.trackers import Trackers


class MetricsLog:
    """``metrics.jsonl``: one JSON record a line, appended and flushed. ``trackers`` are told each, too. Of several
    processes the first writes.

    ``size`` and ``truncate`` let a resumed run drop what came after its checkpoint, so that no epoch is told twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trackers = Trackers()  # none

    def write(self, event: str, **fields: Any) -> None:
        if not processes().first:
            return
        record = {"event": event, "time": time.time(), **fields}
        line = json.dumps(record, allow_nan=False)
        with room_for(self.path, len(line)), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
        self.trackers.tell(record)

    def records(self) -> list[dict[str, Any]]:
        """What was written; lines that are no records are passed over."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # a process may have died within it
                continue
            if isinstance(record, dict) and "event" in record:
                found.append(record)
        return found

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
        if not self.path.exists() or not processes().first:
            return
        with self.path.open("rb+") as file:
            kept = file.read(size)
            file.truncate(kept.rfind(b"\n") + 1)
        self.trackers.go_back(self.records())
