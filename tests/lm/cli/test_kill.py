"""A command that is killed at any moment: the same command again gives a whole result.

JAXPRUNE_KILLS says how many kills at random moments each command gets.
"""

import json
import os
import random
import time

import pytest

from tests.support import tiny_cli
from tests.support.command_process import finish, kill_when, start
from tests.support.hf_directories import contents
from tests.support.tiny_cli import place

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

__all__ = ["place"]

KILLS = int(os.environ.get("JAXPRUNE_KILLS", "1"))
SMALL = ["--length", "16", "--sparsity", "0.5"]
COMMANDS = {
    "streamed": lambda p, out: [
        "prune", p / "model", out, *SMALL, "--method", "magnitude",
        "--evaluate", p / "a.txt",
    ],
    "calibrated": lambda p, out: [
        "prune", p / "model", out, *SMALL, "--method", "wanda", "--sequences", "8",
        "--calibration", p / "a.txt",
    ],
    "recovered": lambda p, out: [
        "recover", p / "model", out, "--length", "16", "--sequences", "8",
        "--calibration", p / "a.txt", "--teacher", p / "model", "--steps", "300",
    ],
    "shrunk": lambda p, out: [
        "shrink", p / "deep", out, "--length", "16", "--ffn", "0.5",
        "--layers", "2", "--calibration", p / "a.txt", "--sequences", "8",
    ],
    "trimmed": lambda p, out: [
        "trim", p / "model", out, "--length", "16", "--sequences", "8",
        "--tokens", "64", "--calibration", p / "a.txt",
    ],
    "compact": lambda p, out: ["compact", p / "model", out],
    "expand": lambda p, out: ["expand", p / "packed", out],
}  # fmt: skip


def weights(out):
    """The bytes that must be the same whenever the command was killed."""
    if out.is_file():
        return out.read_bytes()
    found = contents(out)
    return {name: found[name] for name in found if not name.startswith(("jaxp", "rep"))}


def check_whole(name, out, log):
    """Everything that a run which nobody killed would have written."""
    if name not in ("compact", "expand"):
        record = json.loads((out / "jaxprune.json").read_text())
        assert {"sizes", "perplexity", "phases", "seconds", "files"} <= record.keys()
        stages = {
            "recovered": {"before", "recovered"},
            "shrunk": {"dense", "shrunk"},
            "trimmed": {"dense", "trimmed"},
        }.get(name, {"dense", "pruned"})
        for of in record["perplexity"].values():
            assert stages <= of.keys()
        losses = record.get("training", {"losses": []})["losses"]
        assert len(losses) == 300 * (name == "recovered")
        page = (out / "report.html").read_text()
        assert page.rstrip().endswith("</html>")
        assert "erplexit" in page
    left = [p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")]
    assert left == [], log.read_text()


def again(words, log):
    """Gives the same command again: done, or it was done when it was killed."""
    log.write_text("")
    code = finish(start(words, log))
    said = log.read_text()
    assert "Traceback" not in said
    whole = "is whole, and this very command made it" in said
    assert code == 0 or whole or "there is something already" in said, said


@pytest.fixture(scope="module")
def places(place, tmp_path_factory):
    """`place`, with a model of three layers and the model packed."""
    tiny_cli.model(place / "deep", layers=3)
    log = tmp_path_factory.mktemp("packed") / "log"
    words = COMMANDS["compact"](place, place / "packed")
    assert finish(start(words, log)) == 0, log.read_text()
    return place


@pytest.mark.full
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_at_any_moment_ends_whole_when_it_is_given_again(
    places, tmp_path, name
):
    log, whole = tmp_path / "log", tmp_path / "whole"
    assert finish(start(COMMANDS[name](places, whole), log)) == 0, log.read_text()
    check_whole(name, whole, log)
    expected = weights(whole)
    chance = random.Random(os.environ.get("JAXPRUNE_SEED", "0"))
    killed, took = 0, None
    for i in range(KILLS + 1):
        out = tmp_path / f"out{i}"
        words = COMMANDS[name](places, out)
        began = time.monotonic()
        if i == 0:  # the moment at which the result appears
            happened = out.exists
        else:
            until = began + chance.uniform(0.02, 1.0) * took
            happened = lambda until=until: time.monotonic() > until  # noqa: E731
        killed += kill_when(start(words, log), happened)
        # The first run compiled: those after it take less time.
        took = took or time.monotonic() - began
        again(words, log)
        assert weights(out) == expected
        check_whole(name, out, log)
    print(f"{name}: {killed} kills of {KILLS + 1}, {took:.1f} s a run")
