"""Every `jaxprune` line of README and docs/ runs as it stands on a tiny model.

`prune` and `shrink` are run with --plan: all is checked, and nothing is computed.
Those of several machines are left out; test_prune_mesh.py has several processes.
"""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from tests.support import tiny_cli, tiny_hf
from tests.support.tiny_tokenizers import model_folder

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.lm import cli

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
LAYERS = 16  # the docs leave 14


def _lines():
    """Each different line, in the order of the pages."""
    lines = (
        line.partition("  #")[0].strip()
        for page in PAGES
        for block in _BLOCK.findall(page.read_text())
        for line in block.replace("\\\n", " ").splitlines()
    )
    return [
        line
        for line in dict.fromkeys(lines)
        if line.startswith("jaxprune ")
        and "--distributed" not in line
        # Of the page on torch: tests/torch_modules/test_command.py.
        and not {"BERT", "VIT"} & {*line.split()}
    ]


LINES = _lines()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What the pages name: MODEL, MIXTURE, OUT, a compact file, texts.

    DEEP is the MODEL where layers go, BYTES that which llama.cpp has a tokenizer for.
    """
    root = tmp_path_factory.mktemp("documented")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    for name, layers in (("MODEL", 1), ("DEEP", LAYERS)):
        model = tiny_cli.model(root / name, layers=layers)
        tiny_hf.edit(model, max_position_embeddings=512, **heads)
    model_folder(root / "BYTES", "byte-level")
    mixture = root / "MIXTURE"
    tiny_hf.random_folder("mixtral", mixture)
    tiny_cli.tokenizer(mixture)
    tiny_hf.edit(mixture, max_position_embeddings=512, sliding_window=None)
    text = tiny_cli.text(40000)
    (root / "prose.txt").write_text(text)
    (root / "other.txt").write_text(tiny_cli.text(2000, seed=1))
    (root / "code.jsonl").write_text(
        "\n".join(json.dumps({"text": text[i::7]}) for i in range(7))
    )
    for words in (
        ["prune", "MODEL", "OUT", "--method", "magnitude", "--sparsity", "0.5"],
        ["compact", "OUT", "packed"],
    ):
        paths = [str(root / w) if w in ("MODEL", "OUT", "packed") else w for w in words]
        assert cli.main(paths) == 0
    return root


def test_the_docs_have_each_subcommand():
    assert {shlex.split(line)[1] for line in LINES} >= {*cli._COMMANDS}


@pytest.mark.full
@pytest.mark.parametrize("line", LINES)
def test_the_line_runs(place, monkeypatch, tmp_path, capsys, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = [word.replace("~", str(tmp_path)) for word in shlex.split(line)[1:]]
    if "--gguf" in words:
        pytest.importorskip("gguf")
    if "--tokens" in words:  # of a model with 97
        words[words.index("--tokens") + 1] = "64"
    made = {"prune": {"OUT"}, "shrink": {"OUT"}, "compact": {"model.jaxprune"}}
    made |= {"trim": {"OUT"}, "recover": {"BETTER"}}
    named = {"packed": "model.jaxprune"}
    named |= {"MODEL": "SMALL", "DEEP": "MODEL"} if "--layers" in words else {}
    named |= {words[1]: "WORDS", "BYTES": words[1]} if words[0] == "export" else {}
    for path in place.iterdir():
        name = named.get(path.name, path.name)
        if name not in made.get(words[0], set()):
            (tmp_path / name).symlink_to(path)
    if words[0] == "--tyro-write-completion":
        Path(words[2]).parent.mkdir(parents=True)
    plan = ["--plan"] if words[0] in made.keys() - {"compact"} else []
    assert cli.main([*words, *plan]) == 0, capsys.readouterr().err


def test_the_example_compares_four_models(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["prune_a_checkpoint.py"])
    runpy.run_path(str(ROOT / "examples" / "prune_a_checkpoint.py"))
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 5  # a header and four models
