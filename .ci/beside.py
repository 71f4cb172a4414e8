"""What other projects' packages stand beside this one: the table of docs/trainers.md.

    python .ci/beside.py                  resolves, and prints the table
    python .ci/beside.py --import         installs each pair as well, and imports both
    python .ci/beside.py keras penzai     of these packages alone

Needs `uv`, which resolves without installing. The newest release is asked for by its
number: without it a resolver takes an older one and says nothing.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
# From the widest: what of this package is installed beside the other.
EXTRAS = ("[test]", "[lm]", "")
SHOWN = ("jax", "flax", "orbax-checkpoint")


class Package(NamedTuple):
    """A package of another project.

    Attributes:
      name: its distribution.
      module: what is imported of it.
      dev: whether its newest release is a pre-release.
    """

    name: str
    module: str
    dev: bool = False


PACKAGES = (
    Package("google-tunix", "tunix"),
    Package("maxtext", "maxtext"),
    Package("levanter", "levanter", dev=True),
    Package("haliax", "haliax", dev=True),
    Package("easydel", "easydel"),
    Package("qwix", "qwix"),
    Package("keras", "keras"),
    Package("penzai", "penzai"),
    Package("equinox", "equinox"),
    Package("torchax", "torchax"),
    Package("jax2onnx", "jax2onnx"),
)


class Resolved(NamedTuple):
    """What a resolver says of some requirements.

    Attributes:
      versions: distribution to release; empty where there is no solution.
      why: uv's first sentence where there is none.
    """

    versions: dict[str, str]
    why: str


def resolve(requirements: list[str], python: str, *, dev: bool) -> Resolved:
    """The newest releases that fulfil requirements together."""
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += [
        "--python-version",
        python,
        *(["--prerelease=allow"] if dev else []),
        "-",
    ]
    done = subprocess.run(
        command, input="\n".join(requirements), capture_output=True, text=True
    )
    if done.returncode:
        causes = re.search(r"cause: (.*?)(?:\n\s*And |\Z)", done.stderr, re.DOTALL)
        sentence = causes[1] if causes else done.stderr.strip()
        return Resolved({}, " ".join(sentence.split()))
    pins = re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE)
    return Resolved(dict(pins), "")


def newest(package: Package) -> str:
    """The newest release for the newest Python that has one."""
    for python in reversed(PYTHONS):
        resolved = resolve([package.name], python, dev=package.dev)
        if resolved.versions:
            return resolved.versions[package.name]
    raise SystemExit(f"{package.name} has no release for Python {', '.join(PYTHONS)}")


def ours(extra: str) -> str:
    """This checkout as a requirement."""
    return f"jaxprune{extra} @ {ROOT.as_uri()}"


class Row(NamedTuple):
    """A package and what it goes with.

    Attributes:
      package: the package.
      release: its newest release.
      extras: Python to the widest extra of ours, or None where there is no solution.
      resolved: what is installed on the newest Python that has a solution.
      obstacle: what keeps the widest extra away, on the newest Python where something
        does; "" where nothing does.
    """

    package: Package
    release: str
    extras: dict[str, str | None]
    resolved: Resolved
    obstacle: str

    def cells(self) -> list[str]:
        """The row of the table."""
        by_extra: dict[str, list[str]] = {}
        for python, extra in self.extras.items():
            words = "no" if extra is None else f"`jaxprune{extra}`"
            by_extra.setdefault(words, []).append(python)
        sides = "; ".join(f"{words}: {', '.join(p)}" for words, p in by_extra.items())
        versions = [self.resolved.versions.get(name, "") for name in SHOWN]
        return [f"{self.package.name} {self.release}", sides, *versions, self.obstacle]


def row(package: Package) -> Row:
    """Resolves a package beside this one, on each Python."""
    release = newest(package)
    extras: dict[str, str | None] = {}
    shown, obstacle = Resolved({}, ""), ""
    for python in PYTHONS:
        extras[python] = None
        for extra in EXTRAS:
            pair = [f"{package.name}=={release}", ours(extra)]
            resolved = resolve(pair, python, dev=package.dev)
            if resolved.versions:
                extras[python], shown = extra, resolved
                break
            if extra == EXTRAS[0]:  # not what keeps a narrower one away as well
                obstacle = resolved.why
    return Row(package, release, extras, shown, obstacle)


def import_both(table_row: Row) -> str:
    """Installs a row's pair on its newest Python; "" or the last line of the error."""
    pairs = [(p, e) for p, e in table_row.extras.items() if e is not None]
    if not pairs:
        return "no solution"
    python, extra = pairs[-1]
    package = table_row.package
    with tempfile.TemporaryDirectory() as folder:
        pins = [f"{name}=={v}" for name, v in table_row.resolved.versions.items()]
        requirements = [ours(extra), *(pin for pin in pins if "jaxprune" not in pin)]
        names = ["jaxprune", *(["jaxprune.lm.models.hf"] if extra else [])]
        source = f"import {', '.join([*names, package.module])}"
        for command in (
            ["uv", "venv", "--quiet", "--python", python, folder],
            ["uv", "pip", "install", "--quiet", "--python", folder, *requirements],
            [f"{folder}/bin/python", "-c", source],
        ):
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
            if done.returncode:
                return done.stderr.strip().splitlines()[-1]
    return ""


def main(names: list[str], imports: bool) -> int:
    """Prints the table; returns 1 where something that resolves is not imported."""
    head = ["package", "beside", *SHOWN, "what stands in the way"]
    print("| " + " | ".join(head) + " |", "|---" * len(head) + "|", sep="\n")
    failed = []
    for package in PACKAGES:
        if names and package.name not in names:
            continue
        table_row = row(package)
        print("| " + " | ".join(table_row.cells()) + " |", flush=True)
        resolves = any(extra is not None for extra in table_row.extras.values())
        if imports and resolves and (error := import_both(table_row)):
            failed.append(f"{package.name}: {error}")
    print("\n".join(failed), file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="*")
    parser.add_argument("--import", action="store_true", dest="imports")
    options = parser.parse_args()
    sys.exit(main(options.packages, options.imports))
