"""``python -m cascade_fast.neighbors RUN MODEL``: hard tokens of an exported model look up the run's training text."""

import argparse
import sys
from pathlib import Path
from typing import Any

from cascade_fast.command_line import add_run_argument, run_command
from cascade_fast.input_checks import InputError
from cascade_fast.settings import DTYPES


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cascade_fast.neighbors",
        description="Keep what an exported model's layers say of every training token, so that hard tokens can look up "
        "what came next in the places most like theirs. Written into MODEL/neighbors.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_run_argument(parser)
    parser.add_argument("model", metavar="MODEL", help="folder that the run was exported to (cascade_fast.export)")
    parser.add_argument("--hard-ratio", type=float, default=0.7, metavar="X", help="share of tokens that look up")
    parser.add_argument("--neighbors", type=int, default=256, metavar="N", help="kept tokens that a hard one asks")
    parser.add_argument("--batch-tokens", type=int, default=1024, metavar="N", help="tokens of a forward pass")
    parser.add_argument("--device", default="auto", metavar="TEXT", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="compute dtype")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in what was asked for."""
    asked = build_parser().parse_args(argv)
    return run_command(lambda: _run(asked), debug=asked.debug)


def _check(asked: argparse.Namespace) -> None:
    for name in ("neighbors", "batch_tokens"):
        if getattr(asked, name) < 1:
            raise InputError(f"{name}: {getattr(asked, name)}; must be at least 1")
    if not 0 < asked.hard_ratio <= 1:
        raise InputError(f"hard_ratio: {asked.hard_ratio}; must be in (0, 1]")
    if not (Path(asked.model) / "config.json").is_file():
        raise InputError(f"MODEL: {asked.model!r}; must be a model's folder, with a config.json: export the run first")


def _run(asked: argparse.Namespace) -> int:
    _check(asked)
    from cascade_fast.losses import perplexity
    from cascade_fast.model import neighbors as ours
    from cascade_fast.model.configuration import CascadeConfig
    from cascade_fast.model.evaluation_text import splits_of_run
    from cascade_fast.model.loading import looking_for
    from cascade_fast.runtime.compute import Compute
    from cascade_fast.runtime.console import quiet_libraries, say

    quiet_libraries()
    ours.check_free(Path(asked.model) / ours.FOLDER)
    with looking_for(asked.run):
        config = CascadeConfig.from_pretrained(asked.run)
    compute = Compute.choose(asked.device, asked.dtype)
    model, tokenizer = _load(asked.model, compute)
    layers = ours.default_layers(model)

    ours.check_layers(model, layers)
    splits = splits_of_run(config, tokenizer)

    def read(split: str) -> Any:
        how: dict[str, Any] = {"batch_tokens": asked.batch_tokens, "name": f"reading {split}"}
        return ours.read_tokens(model, splits[split], layers, **how)

    all_kept = ours.keep_tokens(read("train"), layers=layers, neighbors=asked.neighbors).to(model.device)
    validation, test = read("val"), read("test")
    of = all_kept.fitted(validation, asked.hard_ratio)
    test_log_p_N, hard_K = of.log_p(test)
    rows = {
        "validation": (validation.log_p_N, ours.cross_fitted(all_kept, validation, asked.hard_ratio)),
        "test": (test.log_p_N, test_log_p_N),
    }
    for name, pair in rows.items():
        before, after = (perplexity(-log_p_N.double().mean().item()) for log_p_N in pair)
        say(f"{name}: perplexity {before:.4f} -> {after:.4f} with neighbors ({after / before - 1:+.2%})")
    of.save_pretrained(asked.model)
    kept = len(of.get_buffer("label_M"))
    say(f"of test {len(hard_K) / len(test.label_N):.0%} are hard and look up; {kept:,} tokens are kept")
    say(f"wrote {Path(asked.model) / ours.FOLDER}: {of.bytes / 2**20:.1f} MiB")
    return 0


def _load(folder: str, compute: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    from cascade_fast.base.model import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=compute.dtype, trust_remote_code=False)
    return model.to(compute.device).eval().requires_grad_(False), load_tokenizer(f"MODEL: {folder!r}", folder)


if __name__ == "__main__":
    sys.exit(main())
