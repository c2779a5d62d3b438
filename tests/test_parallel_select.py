"""Hard tokens selected by several processes: those of one, whatever the parts."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torchrun import together

from cascade_fast.runtime.processes import Processes
from cascade_fast.selection import NonFiniteScores, Selection, select_hardest
from cascade_fast.stages import parallel_select
from cascade_fast.stages.parallel_select import Piece, find_cut, histogram, score_of, select_hardest_in_parts


class Joined:
    """Stands in for torch.distributed between threads."""

    def __init__(self, count: int) -> None:
        self.given: list = [None] * count
        self.barrier = threading.Barrier(count, timeout=60)

    def all_of(self, rank: int, value):
        self.given[rank] = value
        self.barrier.wait()
        values = list(self.given)
        self.barrier.wait()
        return values


class Thread(Processes):
    """One of several 'processes', which are threads; ``store`` joins them."""

    def sum_(self, tensor):
        return tensor.copy_(sum(self.store.all_of(self.rank, tensor.clone())))

    def largest(self, numbers):
        return [max(column) for column in zip(*self.store.all_of(self.rank, numbers), strict=True)]


def by_threads(count: int, scores: torch.Tensor, ratio: float, **arrays) -> list[Selection]:
    joined = Joined(count)
    with ThreadPoolExecutor(count) as pool:
        each = [Thread(rank, count, rank, joined) for rank in range(count)]
        return [f.result() for f in [pool.submit(select_hardest_in_parts, scores, ratio, x, **arrays) for x in each]]


def cases() -> dict[str, tuple[torch.Tensor, list[float]]]:
    g = torch.Generator().manual_seed(0)
    largest = torch.finfo(torch.float32).max
    return {
        "plain": (torch.randn(101, generator=g), [0.001, 0.29, 0.9, 1.0]),  # K = 1 and K = N among them
        "ties across parts": (torch.randint(-2, 3, (83,), generator=g).float(), [0.05, 0.3, 0.5, 0.77]),
        "all equal": (torch.full((23,), -1.5), [0.001, 0.5, 1.0]),
        "zeros": (torch.tensor([0.0, -0.0, 1.0, -0.0, 0.0, -1.0, -0.0, 0.0, -0.0]), [0.2, 0.3, 0.5, 0.7, 0.9]),
        "subnormal": (torch.arange(-20, 21)[torch.randperm(41, generator=g)] * 1e-45, [0.1, 0.48, 0.5, 0.6]),
        "extreme": (torch.tensor([largest, -largest, 1e-45, -1e-45, 0.0, largest, -largest]), [0.1, 0.3, 0.6, 1.0]),
        "one": (torch.tensor([3.0]), [0.5]),
    }


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("labels", ["all", "some"])
def test_any_number_of_parts_selects_what_one_process_does(name, labels, monkeypatch):
    monkeypatch.setattr(parallel_select, "PIECE_ROWS", 7)
    scores, ratios = cases()[name]
    labelled, label_N = torch.arange(len(scores)), None
    if labels == "some":  # rows without a label lie between; their scores are NaN of either sign, as in a store
        labelled = 2 * labelled + (labelled % 3 == 0)
        wide = torch.full((2 * len(scores) + 5,), torch.nan).copysign(torch.tensor(-1.0))
        wide[::4] = torch.nan
        label_N = torch.full(wide.shape, -100)
        wide[labelled], label_N[labelled] = scores, 1
        scores, one = wide, scores
    else:
        one = scores
    for ratio in ratios:
        expected = select_hardest(one, ratio)
        for count in range(1, 6):
            for selection in by_threads(count, scores, ratio, label_N=label_N):
                assert torch.equal(selection.index_K, labelled[expected.index_K]), (ratio, count)
                assert selection.threshold == expected.threshold, (ratio, count)


def test_mistakes_are_those_of_one_process():
    scores = torch.tensor([0.0, 1.0, torch.nan, 3.0, torch.inf])
    places = {"sequence_N": torch.tensor([5, 6, 7, 8, 9]), "position_N": torch.tensor([0, 1, 2, 3, 4])}
    with pytest.raises(NonFiniteScores, match="2 of 5 are not finite, the first at sequence 7, position 2"):
        by_threads(3, scores, 0.5, **places)
    with pytest.raises(NonFiniteScores, match="1 of 4 are not finite, the first at sequence 9, position 4"):
        by_threads(2, scores, 0.5, label_N=torch.tensor([1, 1, -100, 1, 1]), **places)
    with pytest.raises(ValueError, match="scores: empty"):
        by_threads(2, torch.zeros(3), 0.5, label_N=torch.full((3,), -100))
    with pytest.raises(ValueError, match=r"hard_ratio: 0.0; must be in \(0, 1\]"):
        by_threads(2, torch.zeros(3), 0.0)


def test_counts_beyond_32_bits():
    """Each of 11 scores 2^33 times: what the histograms of so many tokens would be."""
    scores, times = torch.randn(11, generator=torch.Generator().manual_seed(1)), 2**33
    ordered = scores.sort().values.tolist()
    for k in (1, times, times + 1, 7 * times, 11 * times):
        cut = find_cut(k, lambda level, key: times * histogram([Piece(0, scores)], level, key))
        above = (k - 1) // times
        assert score_of(cut.key) == ordered[above]
        assert (cut.ties, cut.equal) == (k - above * times, times)


SCRIPT = """
import torch
from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.runtime.processes import end_processes, processes, start_processes
from cascade_fast.selection import select_hardest
from cascade_fast.stages.exits import hardest_of_store

start_processes()
g = torch.Generator().manual_seed(0)
n = 300_001
score = (torch.randn(n, generator=g) * 500).round() / 500  # with ties
label = torch.randint(0, 20, (n,), generator=g).masked_fill_(torch.rand(n, generator=g) < 0.1, -100)
score[label == -100] = torch.nan
arrays = {"label": label, "score": score, "hidden": torch.zeros(n, 0)}
arrays |= {name: torch.arange(n, dtype=torch.int32) for name in ("sequence", "position")}
store = HiddenStore(None, arrays, {})
labelled = store.labelled_index()
for ratio in (0.00001, 0.3, 0.9, 1.0):
    found, expected = hardest_of_store(store, ratio), select_hardest(score[labelled], ratio)
    assert torch.equal(found.index_K, labelled[expected.index_K]), ratio
    assert ratio == 1 or found.threshold == expected.threshold, ratio
if processes().first:
    print("same", processes().count)
end_processes()
"""


@pytest.mark.parametrize("count", [2, 3])
def test_processes_select_what_one_does(server, count, tmp_path):
    script = tmp_path / "same_selection.py"
    script.write_text(SCRIPT)
    done = together(server, count, script)
    assert done.returncode == 0, done.stderr
    assert f"same {count}" in done.stdout
