"""Data parallel training with torch's DistributedDataParallel: each process runs its part of a batch, and the gradient
is that of the batch's mean over all its tokens, as one process has it.
"""

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cascade_fast.runtime.processes import Processes
from cascade_fast.training.sharding import is_sharded


def replica(module: nn.Module, these: Processes, without_gradient: Iterable[Tensor]) -> Any:
    """What steps call in place of ``module``: with several processes its gradients are summed over them while the
    backward pass runs. One that is spread over them (see ``sharding.py``) does that by itself.

    Args:
        without_gradient: parameters that no loss reaches; nobody waits for them.
    """
    if not these.several or is_sharded(module):
        return module
    left_out = set(map(id, without_gradient))
    ignored = [name for name, p in module.named_parameters() if id(p) in left_out or not p.requires_grad]
    ignored += [name for name, _ in module.named_buffers()]  # the output head among them: all have read the same
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
    made = DistributedDataParallel(module, gradient_as_bucket_view=True)
    # A process's loss is its tokens' share of the mean: shares add up, whatever the number of tokens of each.
    made.register_comm_hook(None, _sum)
    return made


def _sum(_state, bucket):  # type: ignore[no-untyped-def]  # a build of torch without torch.distributed lacks the types
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def sums_with(module: Any, *, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Around forward and backward of a part of a batch: gradients are summed over processes with the last one."""
    if is_sharded(module):
        module.set_requires_gradient_sync(last)
    return contextlib.nullcontext() if last or not isinstance(module, DistributedDataParallel) else module.no_sync()


def own_chunks(chunks: Sequence[Tensor], these: Processes, module: Any) -> list[tuple[Tensor, bool]]:
    """This process's of ``chunks``, and whether they count. Where ``module`` is spread over the processes, all of them
    run it as often as any: some once more, for nothing."""
    own = [(chunk, True) for chunk in chunks[these.part(len(chunks))]]
    if is_sharded(module):
        own += [(chunks[0], False)] * (-(-len(chunks) // these.count) - len(own))
    return own


def own_parts(picked: Tensor, most: int, these: Processes) -> list[tuple[Tensor, bool]]:
    """This process's units of a batch's, ``most`` at a time, and whether they count. All processes have as many parts,
    as all have to come to the sum; where one has fewer units, it runs some that do not count."""
    own = picked[these.part(len(picked))]
    parts = [(some, True) for some in own.split(most) if len(some)]
    largest_share = -(-len(picked) // these.count)
    return parts + [(picked[:1], False)] * (-(-largest_share // most) - len(parts))
