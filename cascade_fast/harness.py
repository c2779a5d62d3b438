"""``python -m cascade_fast.harness``: EleutherAI's lm-evaluation-harness, which then knows the model ``cascade``.

lm-eval has no plug-ins for models (0.4.13): whoever starts it must import the class. That is all that happens here;
every argument is lm-eval's own.
"""

import importlib.util
import sys

from cascade_fast.command_line import run_command
from cascade_fast.input_checks import InputError

MODEL = "cascade"


def register() -> None:
    """Makes ``cascade`` a model of lm-eval; the class is imported when it is asked for.

    Raises:
        InputError: lm-eval is not installed.
    """
    for package in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"harness: needs {package}, which is not installed: pip install lm-eval accelerate")
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target="cascade_fast.model.lm_eval:CascadeLM")


def main() -> int:
    """Hands the command line over to lm-eval. Exit codes: 0 done, 2 a mistake in what was asked for."""
    return run_command(_evaluate, debug=False)


def _evaluate() -> None:
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
