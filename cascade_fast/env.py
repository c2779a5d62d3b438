"""``python -m cascade_fast.env``: versions, hardware, and who serves each operator here; for bug reports."""

import sys

from cascade_fast.reporting.environment import say_environment


def main() -> int:
    say_environment()
    return 0


if __name__ == "__main__":
    sys.exit(main())
