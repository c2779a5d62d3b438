"""From the host's memory to a GPU's: in large pinned pieces, so that nobody waits for a copy."""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]  # by name
PIECE_BYTES = 64 * 2**20
ALIGNED = 16  # bytes: kernels read words of so many


def upload(array: Tensor, device: torch.device) -> Tensor:
    """``array`` on a GPU: copied once, in pieces of about ``PIECE_BYTES``."""
    there = torch.empty(array.shape, dtype=array.dtype, device=device)
    row_bytes = max(1, array[:1].numel() * array.element_size())
    rows = max(1, PIECE_BYTES // row_bytes)
    for into, part in zip(there.split(rows), array.split(rows), strict=True):
        # Torch hands pinned memory out again only once the copies from it are done.
        into.copy_(torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part), non_blocking=True)
    return there


def send(parts: Sequence[Tensors], device: torch.device) -> list[Tensors]:
    """Tensors of the host's memory on a GPU, all of them in one pinned buffer and one copy that nobody waits for. For
    the CPU: as they are."""
    if device.type == "cpu":
        return list(parts)
    places, size = list[int](), 0
    for tensor in (t for part in parts for t in part.values()):
        places.append(size)
        size += -(-tensor.nbytes // ALIGNED) * ALIGNED
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for begin, tensor in zip(places, (t for part in parts for t in part.values()), strict=True):
        _view(buffer, begin, tensor).copy_(tensor)
    copied, at = buffer.to(device, non_blocking=True), iter(places)
    return [{name: _view(copied, next(at), tensor) for name, tensor in part.items()} for part in parts]


def _view(buffer: Tensor, begin: int, like: Tensor) -> Tensor:
    return buffer[begin : begin + like.nbytes].view(like.dtype).view(like.shape)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the whole process: freed memory serves only the stream that it was taken on."""
    return torch.cuda.Stream(device)


def send_ahead(
    make: Callable[[Any], tuple[Tensors, Any]], items: Sequence[Any], device: torch.device
) -> Iterator[tuple[Tensors, Any]]:
    """What ``make`` gives for each of ``items``: tensors, which arrive on a GPU, and something of the host's.

    While one is in use, a thread makes the next one and sends it, on a stream of its own. Whoever asks for the next one
    has given the GPU all it has to do with the one before.
    """
    stream = _side_stream(device)

    def made(item: Any) -> tuple[Tensors, Any, Any]:
        with torch.cuda.stream(stream):
            tensors, more = make(item)
            (there,) = send([tensors], device)
            return there, more, stream.record_event()

    with ThreadPoolExecutor(1) as thread:
        coming = [thread.submit(made, item) for item in items[:1]]
        for number in range(len(items)):
            there, more, arrived = coming.pop().result()
            coming += [thread.submit(made, item) for item in items[number + 1 : number + 2]]
            using = torch.cuda.current_stream(device)
            using.wait_event(arrived)
            try:
                yield dict(there), more
            finally:  # ``there`` has kept the memory; it goes back to the stream, which waits for those who read it
                stream.wait_event(using.record_event())
