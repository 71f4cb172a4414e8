"""The main job as a command, its smallest preset smaller still.

`python -m tests.support.tiny_job` is `python -m experiments.scaled_down_llm` with
`SMALL` as the preset "cpu", so that its programs compile in a fraction of the time.
"""

import runpy

from experiments import gpt

SMALL = {**gpt.PRESETS["cpu"], "layers": 2, "width": 32, "heads": 2}

if __name__ == "__main__":
    gpt.PRESETS["cpu"] = SMALL
    runpy.run_module("experiments.scaled_down_llm", run_name="__main__")
