"""The benchmarks whose numbers an accelerator changes, one after the other.

    python -m benchmarks.accelerator --out results/accelerator

Each runs in a process of its own, on the devices that JAX finds: training steps of a
GPT with trackers and with masks that are chosen inside them, the optimizer's step
alone, and the solvers on the matrices of a layer of a 7 B Llama. The JSON lines that a
benchmark prints become a file in a folder named after the device. A run that was
stopped continues with the benchmarks whose files are missing. A benchmark that fails is
named, and the others still run.
"""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import tyro

from jaxprune.files import atomic

OF_7B = "--width 4096 --ffn 11008 --heads 4096 --kv 4096"
SET = {
    "tracking_step": "tracking --what step --preset char --batch-size 64",
    "tracking_optimizer": "tracking --what optimizer",
    "gradual_step": "gradual --what step --preset char --batch-size 64",
    "gradual_optimizer": "gradual --what optimizer --size 100000000",
    "solving": f"solving {OF_7B} --repeats 3",
}
# The same on next to nothing, to see that they run.
SMALL = {
    "tracking_optimizer": "tracking --what optimizer --size 100000 --repeats 2",
    "solving": "solving --width 32 --ffn 64 --heads 32 --kv 16 --repeats 1",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Runs the benchmarks that an accelerator is for.

    Attributes:
      out: directory of the lines, and of what a benchmark writes.
      only: names of those that are run; all if left out.
      smoke: small ones, to see that they run.
    """

    out: Path = Path("results/accelerator")
    only: tuple[str, ...] = ()
    smoke: bool = False

    def chosen(self) -> dict[str, str]:
        """The benchmarks' modules and flags by name.

        Raises:
          ValueError: a name is unknown.
        """
        commands: Mapping[str, str] = SMALL if self.smoke else SET
        if unknown := [name for name in self.only if name not in commands]:
            raise ValueError(
                f"--only must be of {', '.join(commands)}, got {', '.join(unknown)}"
            )
        return {name: commands[name] for name in self.only or commands}


def main(config: Config) -> None:
    """Runs what is missing; the exit status is 1 if one has failed."""
    try:
        chosen = config.chosen()
    except ValueError as error:
        sys.exit(f"error: {error}")
    # JAX is not begun here: a benchmark must find the device free.
    out = config.out / ("smoke" if config.smoke else _device())
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for number, (name, line) in enumerate(chosen.items(), 1):
        # A benchmark that has its file is done: a run that was stopped goes on behind
        # it.
        path = out / f"{name}.jsonl"
        if path.exists():
            _say(f"{name}: done before, see {path}")
            continue
        _say(f"{name}: {number} of {len(chosen)}, python -m benchmarks.{line}")
        started = time.perf_counter()
        place = out / name  # of what a benchmark writes, or one that was killed left
        shutil.rmtree(place, ignore_errors=True)
        words = shlex.split(line.format(place=shlex.quote(str(place))))
        process = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{words[0]}", *words[1:]],
            stdout=subprocess.PIPE,
            text=True,
        )
        shutil.rmtree(place, ignore_errors=True)
        lines = [
            text_line
            for text_line in process.stdout.splitlines()
            if text_line.startswith("{")
        ]
        if process.returncode or not lines:
            _say(f"{name}: failed with status {process.returncode}")
            failed.append(name)
            continue
        text = "".join(f"{text_line}\n" for text_line in lines)
        # Whole or not at all, for the file says that the benchmark is done.
        atomic.replace_files(out, {path.name: text.encode()})
        device = json.loads(lines[-1])["device"]
        _say(f"{name}: {time.perf_counter() - started:.0f} s on {device}")
        print("\n".join(lines), flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; start again to run these alone")


def _device() -> str:
    """The device that JAX finds, as a word."""
    # In a process of its own, which gives the device back when it ends.
    code = "import jax; print(jax.devices()[0].device_kind)"
    process = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    )
    return re.sub(r"\W+", "-", process.stdout.strip())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
