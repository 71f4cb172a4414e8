import json
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.support import tiny_cli
from tests.support.tiny_cli import nats, place, run

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.arrays import console_progress
from jaxprune.lm import cli

__all__ = ["place"]


@pytest.fixture(scope="module")
def made(place):
    """The model pruned by magnitude."""
    words = ["--method", "magnitude", "--sparsity", "0.5"]
    assert cli.main(["prune", str(place / "model"), str(place / "made"), *words]) == 0
    return place / "made"


def refused(*options, model="model", out="free"):
    return ["prune", model, out, *options]


CALIBRATED = ("--calibration", "a.txt", "--length", "16", "--sequences", "8")
HALF = ("--sparsity", "0.5")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (refused(*CALIBRATED), "leaves it free; give --sparsity"),
        (refused(*CALIBRATED, "--sparsity", "1"), r"in \[0, 1\), .* got 1"),
        (
            refused(*CALIBRATED, *HALF, "--pattern", "2of4"),
            "--pattern must be one of unstructured, per-output",
        ),
        (refused(*CALIBRATED, "--sparsity", "0.6", "--pattern", "2:4"), "exactly 0.5"),
        (refused(*CALIBRATED, "--pattern", "1:3"), "divisible by 3, got 32 at 'model"),
        *(
            (
                refused(*CALIBRATED, "--pattern", "2:4", "--allocation", name),
                f"--allocation {name} needs one sparsity to share out",
            )
            for name in ("owl", "global")
        ),
        (refused(*HALF, "--calibration", "self", "self"), "self is given twice"),
        (
            refused(
                *HALF,
                "--calibration",
                "self",
                "a.txt",
                "--sequences",
                "1",
                "--batch",
                "1",
            ),
            "enough for each calibration text and self",
        ),
        (refused(*CALIBRATED, *HALF, "--batch", "3"), "divisible by --batch"),
        (refused(*CALIBRATED, *HALF, "--length", "4"), "at least 8"),
        (refused(*CALIBRATED, *HALF, "--length", "65"), "context 64"),
        (refused(*CALIBRATED, *HALF, "--sequences", "64"), "too short: 'a.txt' has 8"),
        (refused(*CALIBRATED, *HALF, "--exclude", "*.nothing"), "must match"),
        (refused(*CALIBRATED, *HALF, "--exclude", "*"), "must be left"),
        (refused(*CALIBRATED, *HALF, out="model/in"), "apart"),
        (
            refused(*CALIBRATED, *HALF, out="made"),
            "choose another place, or give --overwrite if it is an earlier result",
        ),
        (refused(*CALIBRATED, *HALF, out="a.txt"), "must not destroy"),
        (refused(*CALIBRATED, *HALF, model="none"), "no directory 'none'"),
        (refused(*HALF, "--calibration", "none.txt"), "there is no none.txt"),
        (refused(*HALF, "--calibration", "model/config.json"), "must end in .txt"),
        (
            refused(*HALF, "--calibration", "rows.npy", "--length", "8"),
            "give length 16",
        ),
        (["eval", "model", "--text", "a.txt", "--stride", "0"], "1 <= stride"),
        (
            ["eval", "model", "--text", "a.txt", "--context", "8", "--stride", "9"],
            "stride <= context",
        ),
        (["eval", "model", "--text", "a.txt", "--context", "90"], "at most 64"),
        (["sample", "model", "--prompt", "w4", "--steps", "90"], "prompt and --steps"),
        (["sample", "model", "--prompt", "w4", "--steps", "-1"], "--steps must not be"),
        (
            ["sample", "model", "--prompt", "w4", "--top-k", "0"],
            "--top-k must be at le",
        ),
        (["sample", "model", "--prompt", "w4", "--seed", "-1"], "--seed must be from"),
        (
            ["sample", "model", "--prompt", "w4", "--temperature", "nan"],
            "--temperature must be 0 or more",
        ),
        (["eval", "model", "--text", "a.txt", "--context", "1"], "--context must be"),
        (["eval", "model", "--text", "broken.npy"], "'broken.npy' must be an array"),
        (
            ["eval", "model", "--text", "a.txt", "--ignore-config", "gating"],
            "to ignore must be in config.json, but it has no 'gating'",
        ),
        (refused(*CALIBRATED, *HALF, "--seed", "-1"), "--seed must be from 0"),
        (
            refused(*HALF, "--method", "magnitude", "--exclude", "*proj*"),
            "--exclude leaves none",
        ),
        (["inspect", "model", "--sparsity", "2"], r"in \[0, 1\)"),
        (["expand", "a.txt", "free"], "damaged"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    place, made, capsys, monkeypatch, words, told
):
    monkeypatch.chdir(place)
    (place / "broken.npy").write_text("no array")
    code, found, err = run(capsys, *words)
    assert (code, found) == (1, None)
    (line,) = err.splitlines()
    assert line.startswith(f"jaxprune {words[0]}: ")
    assert re.search(told, line), line
    # The command speaks of its own options, and not of Python's arguments.
    assert not re.search(r"\bjp\.|=True|prunable|\w\(\)|ignore_config", line), line
    assert not (place / "free").exists()
    assert not (place / ".free.work").exists()


def test_usage_is_told_apart_from_failure(capsys):
    assert cli.main(["prune", "--no-such-flag"]) == 2
    assert cli.main([]) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert sum(line.startswith("  jaxprune ") for line in lines) >= 5
    assert printed.out == ""
    assert cli.main(["prune", "--help"]) == 0
    assert "the share to remove, in [0, 1)" in capsys.readouterr().out


def test_debug_shows_where_an_error_came_from(capsys):
    assert cli.main(["inspect", "none", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


# ---- eval, inspect, compact, expand, sample


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("stride", [5, 16])
def test_each_token_counts_once_in_the_longest_context_it_gets(
    place, capsys, bos, stride
):
    code, found, _ = run(
        capsys, "eval", place / "model", "--text", place / "a.txt", "--context", "16",
        "--stride", stride, "--limit", "6", "--batch", "4",
        "--bos", "yes" if bos else "no",
    )  # fmt: skip
    assert code == 0
    tokens = tiny_cli.ids(900).tolist()
    losses, seen, start = [], 0 if bos else 1, 0 if bos else 1
    for _ in range(6):
        begin = [1] if bos else [tokens[start - 1]]
        window = nats(place / "model", [begin + tokens[start : start + 15]])[0]
        losses += window[seen - start :].tolist()
        seen, start = start + 15, start + min(stride, 15)
    result = found["texts"]["a.txt"]
    assert result["tokens"] == len(losses)
    assert result["nats"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert (result["context"], result["bos"]) == (16, bos)
    assert result["stride"] == min(stride, 15)


@pytest.mark.parametrize("bos", [True, False])
def test_a_conversation_begins_as_the_options_say(place, tmp_path, capsys, bos):
    """Its template writes a BOS, whatever the directory says of other texts."""
    template = "{{ bos_token }}{% for m in messages %}w20 {{ m.content }} {% endfor %}"
    shutil.copytree(place / "model", tmp_path / "model")
    tiny_cli.tokenizer(tmp_path / "model", chat_template=template, template=not bos)
    said = [
        {"role": "user", "content": "w5 w6"},
        {"role": "assistant", "content": "w7"},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": said}))
    code, found, _ = run(
        capsys, "eval", tmp_path / "model", "--text", tmp_path / "a.jsonl",
        "--context", "16", "--batch", "4", "--bos", "yes" if bos else "no",
    )  # fmt: skip
    assert (code, found["texts"]["a.jsonl"]["tokens"]) == (0, 5)  # w20 w5 w6 w20 w7


def test_inspect_lists_what_would_be_pruned_and_why_not(place, made, capsys):
    code, found, _ = run(capsys, "inspect", made, "--sparsity", "0.75")
    assert code == 0
    assert {r["name"] for r in found["tensors"] if r["pruned"]} == set(
        tiny_cli.MATRICES
    )
    reasons = {row["name"]: row["why"] for row in found["tensors"]}
    assert reasons["model.norm.weight"] == "one axis"
    assert "head" in reasons["lm_head.weight"]
    size = found["totals"]["prunable"]
    assert found["totals"]["zeros"] >= size // 2
    saved = found["totals"]["compact_bytes"] - found["totals"]["compact_bytes_pruned"]
    assert saved == size  # a quarter of them, four bytes each
    assert found["provenance"]["method"] == "magnitude"
    assert cli.main(["inspect", str(place / "model"), "--exclude", "*.q_proj.*"]) == 0
    assert "excluded" in capsys.readouterr().out


def test_a_folder_is_packed_and_comes_back(place, made, capsys, monkeypatch):
    monkeypatch.setattr(console_progress, "_SECONDS", 0.0)
    code, found, err = run(capsys, "compact", made, place / "packed")
    assert code == 0
    lines = err.splitlines()  # no terminal here: lines with what is done and left
    assert all(re.match(r"packing: .* of .* spent, .* left$", line) for line in lines)
    assert len(lines) == len(tiny_cli.tensors())
    assert found["compact_bytes"] == (place / "packed").stat().st_size
    assert run(capsys, "expand", place / "packed", place / "back")[0] == 0
    names = {path.name for path in made.iterdir()}
    assert "report.html" in names
    assert {path.name for path in (place / "back").iterdir()} == names
    for name in names:
        assert (place / "back" / name).read_bytes() == (made / name).read_bytes()


def test_the_likeliest_words_follow_a_prompt(place, capsys):
    code, found, _ = run(
        capsys, "sample", place / "model", "--prompt", "w9 w10", "--steps", "5",
        "--temperature", "0",
    )  # fmt: skip
    assert code == 0
    assert found["text"] == "w9 w10 w11 w12 w13 w14 w15"
    assert found["tokens"] == [11, 12, 13, 14, 15]


def test_the_module_is_the_command(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxprune", "inspect", "none", "--json"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("jaxprune", run_name="__main__")
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (1, "")
    assert err.startswith("jaxprune inspect: there is no directory 'none'")


@pytest.mark.full
def test_the_command_is_a_process_with_an_exit_code(place):
    command = [sys.executable, "-m", "jaxprune", "inspect", "none", "--json"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("jaxprune inspect: there is no directory 'none'")
    assert "Traceback" not in done.stderr
