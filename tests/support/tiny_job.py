"""The main job as a command, its smallest preset smaller still.

`main(...)` is `python -m experiments.scaled_down_llm ...` with `SMALL` as the preset
"cpu", so that its programs compile in a fraction of the time.
"""

import runpy
import sys

from experiments import gpt

SMALL = {**gpt.PRESETS["cpu"], "layers": 1, "width": 32, "heads": 2}
MODULE = "experiments.scaled_down_llm"


def main(*arguments: str) -> None:
    gpt.PRESETS["cpu"] = SMALL
    sys.argv = [MODULE, *arguments]
    sys.modules.pop(MODULE, None)
    runpy.run_module(MODULE, run_name="__main__")
