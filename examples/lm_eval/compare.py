"""A cascade and its base, side by side, in lm-evaluation-harness:

python examples/lm_eval/compare.py runs/my-run
python examples/lm_eval/compare.py runs/my-run --tasks arc_easy hellaswag --limit 200
"""

import argparse
import logging
from pathlib import Path

from cascade_fast.harness import register

HERE = Path(__file__).parent
OURS = ("pydoc_perplexity", "pydoc_choice")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="folder of a finished run, or a saved cascade")
    parser.add_argument("--tasks", nargs="+", default=list(OURS), help="of lm-eval")
    parser.add_argument("--limit", type=int, help="documents of each task (default: all)")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences at once")
    asked = parser.parse_args(argv)

    register()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    others = not set(asked.tasks) <= set(OURS)  # reading the index of lm-eval's own tasks takes a while
    tasks = TaskManager(include_path=str(HERE), include_defaults=others)
    results = {
        exits: simple_evaluate(
            model="cascade",
            model_args={"pretrained": asked.run, "exits": exits},
            tasks=asked.tasks,
            task_manager=tasks,
            limit=asked.limit,
            batch_size=asked.batch_size,
            bootstrap_iters=1000,
        )
        for exits in ("base", "all")
    }
    print("| task | documents | metric | base | cascade | standard error |\n|---|---|---|---|---|---|")
    for task in asked.tasks:
        base, cascade = results["base"]["results"][task], results["all"]["results"][task]
        documents = results["all"]["n-samples"][task]["effective"]
        for key, value in cascade.items():
            name, _, filter_name = key.partition(",")
            if name.endswith("_stderr") or not isinstance(value, float):
                continue
            error = cascade.get(f"{name}_stderr,{filter_name}")
            error = f"{error:.4f}" if isinstance(error, float) else "-"
            print(f"| {task} | {documents} | {name} | {base[key]:.4f} | {value:.4f} | {error} |")


if __name__ == "__main__":
    main()
