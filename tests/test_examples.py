"""The examples run and print what they promise."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_skip_layer(capsys):
    runpy.run_path(str(EXAMPLES / "skip_layer.py"), run_name="__main__")
    whole, part, generation = capsys.readouterr().out.splitlines()
    assert "hard_ratio 1.0: computed 100.0% of the tokens" in whole
    assert "computed 60.2% of the tokens" in part  # floor(0.6 * 255) + 1 = 154 of 256
    assert generation.startswith("generation, threshold")
