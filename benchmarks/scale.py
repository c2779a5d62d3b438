"""Hard tokens of a very large text, selected out of core: ``python -m benchmarks.scale [--tokens N] [--processes W]``.

A simulation without a model: W processes write shards of random scores, float32, as a base pass would leave them (of a
normal distribution, rounded, so that many are equal), and select the hardest together. Each reads its own shards alone,
a piece at a time, and writes the rows of its own hard tokens to a file, as int64: no process ever holds all of either.
The processes exchange counts, by torch.distributed over gloo.

Printed and recorded are the seconds of both parts, the slowest process's, and *peak growth*: the highest resident set
of a process, with the pages of the shard that it has mapped, over its resident set before it began to select. It must
not grow with ``--tokens``.
With ``--check`` one process selects from all scores at once, and the files must say the same.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.several import mapped_scores, start
from cascade_fast.runtime.compute import peak_rss_bytes, resident_bytes
from cascade_fast.runtime.processes import Processes, end_processes, start_processes
from cascade_fast.selection import hard_count, select_hardest
from cascade_fast.stages.parallel_select import (
    Piece,
    find_cut,
    hard_rows,
    histogram,
    least_above,
    pieces,
    score_of,
    tally,
)

SHARD = 2**24  # scores in a file: 64 MiB
AT_ONCE = 2**20  # made at once


class Part:
    """The shards of one process."""

    def __init__(self, folder: Path, tokens: int, these: Processes) -> None:
        self.folder, self.these, self.rows = folder, these, these.part(tokens)

    def shards(self) -> Iterator[tuple[int, Path]]:
        """The row that each begins with, and its file."""
        for first in range(self.rows.start, self.rows.stop, SHARD):
            yield first, self.folder / f"scores-{first:015d}.bin"

    def write(self) -> None:
        generator = torch.Generator().manual_seed(self.these.rank)
        for first, path in self.shards():
            last = min(first + SHARD, self.rows.stop)
            with path.open("wb") as file:
                for begin in range(first, last, AT_ONCE):
                    scores = torch.randn(min(AT_ONCE, last - begin), generator=generator)
                    file.write(memoryview(scores.mul_(2**16).round_().numpy()))

    def pieces(self) -> Iterator[Piece]:
        """Of a mapped shard, which leaves memory before the next one comes."""
        for first, path in self.shards():
            for piece in pieces(mapped_scores(path), None, slice(None)):
                yield replace(piece, first_row=first + piece.first_row)

    def hard_file(self) -> Path:
        return self.folder / f"hard-{self.these.rank:03d}.bin"

    def select(self, hard_ratio: float, tokens: int) -> dict[str, Any]:
        """Writes this part's hard rows; what all of them share."""
        these, sums = self.these, []

        def of_all(level: int, key: int) -> torch.Tensor:
            own = histogram(self.pieces(), level, key)
            sums.append(own.clone())
            return these.sum_(own)

        assert these.sum_(tally(self.pieces())).tolist() == [tokens, 0]
        k = hard_count(hard_ratio, tokens)
        cut = find_cut(k, of_all)
        (least,) = these.largest([-least_above(self.pieces(), cut.key)])
        ties = self.ties(int(sums[-1][cut.key & 255]), cut.ties)
        with self.hard_file().open("wb") as file:
            for rows in hard_rows(self.pieces(), cut, ties):
                file.write(memoryview(rows.numpy()))
        return {"hard": k, "kth": score_of(cut.key), "next_above": score_of(-least), "ties": [cut.ties, cut.equal]}

    def ties(self, own: int, taken: int) -> int:
        """How many of this part's ``own`` tokens at the cut are hard, where of all of them the first ``taken`` are."""
        before = int(self.these.rows(torch.tensor([own]))[: self.these.rank].sum())
        return max(0, min(own, taken - before))


def work(folder: Path, tokens: int, hard_ratio: float) -> None:
    """What each of the processes does; the first one leaves ``scale.json``."""
    these = start_processes()
    part = Part(folder, tokens, these)
    these.wait()
    started = time.perf_counter_ns()
    part.write()
    written = time.perf_counter_ns() - started
    these.wait()
    before, started = resident_bytes(), time.perf_counter_ns()
    selected = part.select(hard_ratio, tokens)
    taken, growth = time.perf_counter_ns() - started, peak_rss_bytes() - before
    write_ns, select_ns = these.largest([written, taken])
    each = these.rows(torch.tensor([[before, growth]])).tolist()
    if these.first:
        told = {
            **selected,
            "write_seconds": write_ns / 1e9,
            "select_seconds": select_ns / 1e9,
            "bytes_before": [row[0] for row in each],
            "peak_growth_bytes": [row[1] for row in each],
        }
        (folder / "scale.json").write_text(json.dumps(told))
    end_processes()


def check(folder: Path, hard_ratio: float, told: dict[str, Any]) -> None:
    """One process, everything in memory."""
    scores_N = torch.cat([mapped_scores(path) for path in sorted(folder.glob("scores-*.bin"))])
    expected = select_hardest(scores_N, hard_ratio).index_K
    found = b"".join(path.read_bytes() for path in sorted(folder.glob("hard-*.bin")))
    if not torch.equal(torch.frombuffer(bytearray(found), dtype=torch.int64), expected):
        raise SystemExit("the processes have not selected what one process does")


def measure(tokens: int, hard_ratio: float, count: int, where: Path | None, checked: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=where) as name:
        folder = Path(name)
        asked = ["--worker", name, "--tokens", str(tokens), "--hard-ratio", str(hard_ratio)]
        start("benchmarks.scale", count, asked)
        told = json.loads((folder / "scale.json").read_text())
        found = sum(path.stat().st_size for path in folder.glob("hard-*.bin")) // 8
        if found != told["hard"]:
            raise SystemExit(f"{found} rows are written, not {told['hard']}")
        if checked:
            check(folder, hard_ratio, told)
    return {"tokens": tokens, "hard_ratio": hard_ratio, "processes": count, "checked": checked, **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10**8, help="(default: %(default)s)")
    parser.add_argument("--hard-ratio", type=float, default=0.3, help="(default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to write to; default: the system's temporary one")
    parser.add_argument("--check", action="store_true", help="compare with one process, which needs 12 bytes a token")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return work(args.worker, args.tokens, args.hard_ratio)
    result = measure(args.tokens, args.hard_ratio, args.processes, args.folder, args.check)
    for name, value in result.items():
        print(f"{name}: {value}")
    result = {"environment": {**common.environment(), "threads": 1}, **result}
    if not args.no_record:
        print(f"\nrecorded in {common.record('scale', result).relative_to(common.ROOT)}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
