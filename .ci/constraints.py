"""Pins of the environments that .ci/run installs: written once, checked in every run.

    python .ci/constraints.py write FILE    what this environment has, as constraints
    python .ci/constraints.py check FILE    that this environment is what FILE says

constraints/oldest.txt (Python 3.11) holds the lower bounds of pyproject.toml,
constraints/newest.txt (later Pythons) the newest releases when it was written.
To renew them: install without `-c`, run the full suite, then `write`.
"""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

# Not the project's: what pip itself brings.
TOOLS = {"jaxprune", "pip", "setuptools", "wheel"}
# What a torch that is built for CUDA brings along; a CPU build brings none of it.
CUDA = ("nvidia-", "cuda-", "triton")
HEAD = "# Written by .ci/constraints.py on Python {}. Use: pip install -c {} ...\n"


def normal(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Name to public version ("2.13.0" of "2.13.0+cpu") of what is installed."""
    found = {
        normal(each.metadata["Name"]): each.version.partition("+")[0]
        for each in importlib.metadata.distributions()
    }
    return {
        name: found[name]
        for name in sorted(found)
        if name not in TOOLS and not name.startswith(CUDA)
    }


def pinned(path: Path) -> dict[str, str]:
    """Name to version of a constraints file."""
    lines = path.read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normal(name): version for name, version in pairs}


def lower_bounds() -> dict[str, str]:
    """Name to the oldest version that pyproject.toml allows: jax, flax, the base."""
    with open("pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    models = project["optional-dependencies"]["lm"]
    needs = project["dependencies"] + [n for n in models if n.startswith("flax")]
    return {normal(n): v for n, v in (need.split(">=") for need in needs)}


def problems(path: Path) -> list[str]:
    """What differs, a sentence each."""
    pins = pinned(path)
    found = [
        f"{name} {version} is installed, but {path} pins {pins.get(name, 'nothing')}"
        for name, version in installed().items()
        if pins.get(name) != version
    ]
    if path.stem == "oldest":
        found += [
            f"{path} must pin {name} to its lower bound {version} of pyproject.toml, "
            f"but has {pins.get(name)}"
            for name, version in lower_bounds().items()
            if pins.get(name) != version
        ]
    return found


def main(verb: str, path: Path) -> int:
    """Writes or checks; returns the exit code."""
    if verb == "write":
        head = HEAD.format(f"{sys.version_info[0]}.{sys.version_info[1]}", path)
        pins = "".join(f"{name}=={version}\n" for name, version in installed().items())
        path.write_text(head + pins)
        return 0
    found = problems(path)
    print("\n".join(found) or f"installed is what {path} says")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
