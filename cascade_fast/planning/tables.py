"""A plan in words and numbers: what ``python -m cascade_fast.plan`` prints."""

from typing import Any

from cascade_fast.planning.counts import Shape
from cascade_fast.planning.memory import CONTEXT_BYTES, MemoryPlan, largest_batch_tokens
from cascade_fast.planning.plan import RunPlan, gib
from cascade_fast.planning.several import share_of_batch
from cascade_fast.runtime.compute import dtype_name
from cascade_fast.runtime.visible import visible


def plan_record(plan: RunPlan) -> dict[str, Any]:
    """For programs: bytes and seconds."""
    shape = Shape.from_settings(plan.settings, plan.base_config)
    return {
        **plan.memory.to_dict(),
        "device": plan.device.name,
        "fits": plan.fits,
        "largest_batch_tokens": _largest_batch(plan),
        "base_pass_seconds": plan.base_pass.seconds,
        "base_pass_limit": plan.base_pass.limit,
        "epoch_seconds": plan.epoch.seconds,
        "epoch_limit": plan.epoch.limit,
        "store": None if plan.device.on_cpu else plan.settings.store,
        "store_on_gpu_bytes": round(plan.memory.store_on_gpu),
        "kv": plan.settings.kv if shape.kind.attends else None,
        **_several_record(plan),
    }


def _several_record(plan: RunPlan) -> dict[str, Any]:
    several = plan.several
    if several is None:
        return {"gpus": 1}
    names = ("gradient_bytes", "all_reduce_bytes", "stage_bytes", "sharded_bytes", "written_bytes", "read_bytes")
    return {
        "gpus": several.gpus,
        "steps": several.steps,
        **{name: round(getattr(several, name)) for name in names},
        "all_reduce_seconds": several.all_reduce_seconds,
        "stage_fits_one_gpu": several.fits_one,
    }


def plan_text(plan: RunPlan) -> str:
    """For people: what is planned, a table of memory, what follows from it, times and what they assume."""
    memory, verdict = _memory_table(plan.memory), _verdict(plan)
    return "\n".join([_what(plan), "", *memory, "", *verdict, *_times(plan), *_several(plan), _assumed(plan)])


def _what(plan: RunPlan) -> str:
    shape = Shape.from_settings(plan.settings, plan.base_config)
    layers, count = plan.base_config.num_hidden_layers, f"{plan.gpus} x " if plan.several else ""
    return (
        f"{visible(plan.settings.base)}: {shape.base_parameters():,} parameters, {layers} layers\n"
        f"a stage: {shape.stage.layers} layers, {shape.counts.parameters():,} parameters of its own\n"
        f"{count}{plan.device.name}, {dtype_name(plan.device.dtype)}"
    )


def _memory_table(memory: MemoryPlan) -> list[str]:
    """Markdown, a line for each thing that takes room."""

    def line(where: str, what: str, size: str) -> str:
        return f"| {where:<16} | {what:<38} | {size:>7} |"

    lines = [line("phase", "what", "GiB"), f"|{'-' * 18}|{'-' * 40}|{'-' * 8}:|"]
    for phase in memory.phases:
        for kind, parts in (("", phase.lasting), ("", phase.passing), (" (mapped)", phase.mapped)):
            lines += [line(phase.name, name + kind, gib(size)) for name, size in parts.items()]
        lines.append(line(phase.name, "**peak**", gib(phase.peak)))
    lines += [line("host RAM", name, gib(size)) for name, size in memory.ram.items()]
    if memory.ram:
        lines.append(line("host RAM", "while base or a new stage is loaded", gib(memory.ram_loading)))
        lines.append(line("host RAM", "hidden stores (mapped)", gib(memory.ram_mapped)))
    return lines + [line("disk", name, gib(size)) for name, size in memory.disk.items()]


def _verdict(plan: RunPlan) -> list[str]:
    memory, device = plan.memory, plan.device
    context = "" if device.on_cpu else f", {gib(CONTEXT_BYTES)} GiB of it the CUDA context's"
    lines = [f"{plan.peak_line}{context}"]
    if memory.ram:
        lines.append(f"host RAM: {gib(memory.ram_needed)} GiB of {gib(device.ram_bytes)}")
    each = share_of_batch(plan.settings, plan.gpus).batch_tokens
    of_each = f", {each} on each GPU" if plan.several else ""
    lines.append(
        f"batch: {plan.settings.batch_tokens} tokens{of_each}, {memory.micro_batch_tokens} at once; the largest that "
        f"fits: {_largest_batch(plan):,}"
    )
    return [*lines, *(line for line in (plan.store_line, plan.kv_line) if line is not None)]


def _times(plan: RunPlan) -> list[str]:
    return [
        f"{what}: at least {taken.seconds:.1f} s, limited by {taken.limit} (FLOPs {taken.flops:.1f} s, bytes "
        f"{taken.bytes:.1f} s, launches {taken.launches:.1f} s"
        + (f", all-reduces {taken.all_reduces:.1f} s)" if taken.all_reduces else ")")
        for what, taken in (("base pass", plan.base_pass), ("an epoch of stage 1", plan.epoch))
    ]


def _several(plan: RunPlan) -> list[str]:
    """What only several GPUs have; each one's."""
    several = plan.several
    if several is None:
        return []
    rate = several.read_bytes / plan.epoch.seconds
    fits = "which one GPU has room for"
    if not several.fits_one:
        fits = f"too much for one GPU: --shard fsdp, with which each holds {gib(several.sharded_bytes)} GiB"
    return [
        f"all-reduce: {gib(several.gradient_bytes)} GiB of gradients; {gib(several.all_reduce_bytes)} GiB sent by each "
        f"GPU and step, {several.all_reduce_seconds * 1e3:.1f} ms; {several.steps} steps an epoch",
        f"hidden states: {gib(several.written_bytes)} GiB written by each GPU; {gib(several.read_bytes)} GiB read in "
        f"an epoch, {rate / 1e9:.2f} GB/s",
        f"weights, gradients and optimizer state of a stage: {gib(several.stage_bytes)} GiB, {fits}",
    ]


def _assumed(plan: RunPlan) -> str:
    device = plan.device
    return (
        f"assumed: {device.rate / 1e12:.2f} TFLOP/s ({device.flops_fraction:.0%} of peak), "
        f"{device.bandwidth / 1e9:.0f} GB/s ({device.bandwidth_fraction:.0%}), "
        f"{device.launch_seconds * 1e6:.0f} us a launch"
        + (f", {plan.several.link / 1e9:.1f} GB/s between GPUs" if plan.several else "")
        + (f", {gib(device.ram_bytes)} GiB of host RAM" if device.ram_assumed else "")
    )


def _largest_batch(plan: RunPlan) -> int:
    device = plan.device
    return largest_batch_tokens(
        plan.settings, plan.base_config, device.memory_bytes, dtype=device.dtype, on_cpu=device.on_cpu
    )
