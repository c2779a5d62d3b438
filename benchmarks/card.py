"""How the GPU of this machine is measured: events, bandwidth beside its peak, what the driver is asked for, memory."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import common
from cascade_fast.planning.devices import DEVICES

GPU = torch.device("cuda")
Line = dict[str, Any]  # of a table: "seconds" are p20, p50, p80


def why_no_gpu() -> str | None:
    """Why CUDA cannot be used, in one line; None if it can."""
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no CUDA device"
    try:
        torch.ones(2, device=GPU).sum().item()
    except Exception as error:  # of any kind: no kernel for this card, a driver that is too old
        return f"CUDA does not start: {next(iter(str(error).splitlines()), type(error).__name__)}"
    return None


def event_seconds(run: Callable[[], object], times: int) -> float:
    """Of one of ``times`` runs in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def in_turns(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each variant returns in each round; the first round is thrown away."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            taken[name].append(run())
    return {name: values[1:] for name, values in taken.items()}


def timed(variants: dict[str, Callable[[], object]], rounds: int, times: int) -> dict[str, Line]:
    """A line for each variant."""
    bursts = {name: lambda run=run: event_seconds(run, times) for name, run in variants.items()}
    return {n: {"seconds": common.percentiles(values)} for n, values in in_turns(bursts, rounds).items()}


def with_bandwidth(lines: dict[str, Line], moved: dict[str, int]) -> dict[str, Line]:
    """The lines, those of ``moved`` with GB/s and its share of the card's peak."""
    peak = peak_bandwidth()
    for name, count in moved.items():
        rate = count / lines[name]["seconds"]["p50"]
        lines[name] |= {"GB/s": rate / 1e9, "of peak": rate / peak if peak else None}
    return lines


def peak_bandwidth() -> float | None:
    """Bytes a second, from the clock and the width of the card's memory, or from the table of known cards."""
    properties = torch.cuda.get_device_properties(0)
    if getattr(properties, "memory_bus_width", 0) > 0:
        return 2e3 * properties.memory_clock_rate * properties.memory_bus_width / 8  # kHz, two a clock
    return next((d.bytes_per_second for d in DEVICES.values() if d.name == properties.name), None)


def counted(run: Callable[[], object]) -> Line:
    """How many kernels, copies and waits one ``run`` asks of the driver; None where no profiler can tell."""
    activities = torch.profiler.ProfilerActivity
    if activities.CUDA not in torch.profiler.supported_activities():
        return dict.fromkeys(("kernels", "copies", "waits"))
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    calls = Counter(event.name() for event in profile.profiler.kineto_results.events())  # type: ignore[union-attr]

    def of(*prefixes: str) -> int:
        return sum(count for name, count in calls.items() if name.startswith(prefixes))

    waits = of("cudaStreamSynchronize", "cudaEventSynchronize")  # of the device waits the profiler itself
    return {"kernels": of("cudaLaunch", "cuLaunch"), "copies": of("cudaMemcpy", "cuMemcpy"), "waits": waits}


def memory_of(run: Callable[[], object], before: int) -> int:
    """Peak of the memory that tensors take during ``run``, beyond ``before`` bytes."""
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def show(title: str, lines: dict[str, Line]) -> None:
    columns = [c for c in dict.fromkeys(c for line in lines.values() for c in line) if c not in ("seconds", "tokens")]
    print(f"\n{title:<46}{'ms':>10}{'p20':>10}{'p80':>10}" + "".join(f"{column:>14}" for column in columns))
    for name, line in lines.items():
        times = (f"{line['seconds'][p] * 1e3:>10.3f}" for p in ("p50", "p20", "p80"))
        numbers = (line.get(column) for column in columns)
        rest = ("-" if v is None else f"{v:,.0f}" if v >= 1000 else f"{v:.4g}" for v in numbers)
        print(f"  {name:<44}" + "".join(times) + "".join(f"{text:>14}" for text in rest), flush=True)
