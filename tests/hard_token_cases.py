"""Inputs shared by the tests of HardTokenGather and its criteria."""

import torch

from cascade_fast import ops

CPU = torch.device("cpu")
BACKENDS = [
    name for name in ("reference", "cpp") if all(ops.why_not(op, CPU, name) is None for op in ops.SELECTION_OPS)
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def as_given(h_in_ND, h_out_ND, *, logits=None):
    """A criterion for tests that want certain scores: they are the first feature."""
    return h_out_ND[:, 0].float()


def with_scores(*scores):
    h = torch.randn(*torch.tensor(scores).shape, 3)
    h[..., 0] = torch.tensor(scores)
    return h


def hidden(*shape, dtype=torch.float32):
    return torch.randn(*shape, 12).to(dtype), torch.randn(*shape, 12).to(dtype)


def some_mask(b, s):
    lengths = torch.arange(b) * 3 % (s + 1)  # begins with a sequence of padding only
    return torch.arange(s) < lengths.unsqueeze(1), lengths.tolist()
