"""What looking up costs: ``python -m benchmarks.neighbors MODEL [--rounds N]``, of a model with neighbors beside it.

A forward pass over 8 texts of 128 tokens, and 16 tokens generated one by one after each, with and without neighbors in
turns. MODEL is a folder of ``cascade_fast.export`` after ``cascade_fast.neighbors``. The text is CPython's manual; how
many of its tokens are hard is in the result.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import common
from cascade_fast.criteria import token_entropy
from cascade_fast.model.neighbors import HardTokenNeighbors
from cascade_fast.runtime.compute import Compute


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    args = parser.parse_args()
    from pydoc_data.topics import topics

    compute = Compute.choose("cpu", "auto")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=compute.dtype, trust_remote_code=False)
    model.eval().requires_grad_(False)
    of = HardTokenNeighbors.from_pretrained(args.model)
    tokens = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)("\n".join(topics.values()))[
        "input_ids"
    ][: 8 * 128]
    ids = torch.tensor(tokens).view(8, 128)

    def read() -> torch.Tensor:
        return model(ids, use_cache=False).logits

    def write() -> torch.Tensor:
        return model.generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)

    def attached(work):
        def with_neighbors():
            of.attach(model)
            try:
                return work()
            finally:
                of.detach()

        return with_neighbors

    plain, mixed = read(), attached(read)()
    hard = token_entropy(plain) >= -of.config.threshold
    assert torch.equal(mixed.flatten(0, 1)[~hard], plain.flatten(0, 1)[~hard])
    assert not torch.equal(mixed, plain)
    works = {"read": read, "read with": attached(read), "write": write, "write with": attached(write)}
    seconds = common.interleaved(works, args.rounds)
    common.print_table("work", [(name, common.percentiles(taken)) for name, taken in seconds.items()], "ms", 1e3)
    result = {
        "environment": common.environment(), "model": Path(args.model).name,
        "kept_tokens": len(of.get_buffer("label_M")), "bytes": of.bytes, "hard_share": hard.double().mean().item(),
        "read with / read": common.ratio(seconds, "read with", "read")["p50"],
        "write with / write": common.ratio(seconds, "write with", "write")["p50"],
    }  # fmt: skip
    for name, value in result.items():
        print(f"{name}: {value}")
    print(f"\nrecorded in {common.record('neighbors', result).relative_to(common.ROOT)}")


if __name__ == "__main__":
    main()
