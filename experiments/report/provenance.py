"""How a run was made: what every page of an experiment ends with."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.report import findings
from jaxprune.files import atomic
from jaxprune.lm.report import page

TEMPLATES = page.templates(Path(__file__).with_name("templates"))
TEMPLATES.filters["percent"] = findings.percent


def describe(results: Mapping[str, Any]) -> dict[str, Any]:
    """The command, configuration, versions, moment and machine of results."""
    pairs = {"configuration": results["config"], "versions": results["versions"]}
    return {
        "command": command(results),
        "pairs": {
            title: [[name, str(value)] for name, value in atomic.flat(entries).items()]
            for title, entries in pairs.items()
        },
        "finished": results.get("finished"),
        "device": results["device"],
    }


def command(results: Mapping[str, Any]) -> str:
    """The command that makes these results again.

    Where none is recorded, it has a flag for each entry of the configuration.
    """
    # Results of before commands were recorded have their configuration.
    if results.get("command"):
        return str(results["command"])
    words = ["python", "-m", f"experiments.{results['name']}"]
    for name, value in atomic.flat(results["config"]).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            words += [f"--{flag}", *map(str, value)]
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)
