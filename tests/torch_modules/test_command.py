"""The command on directories that are no family of ours: transformers' classes judge.

What is written must load in the class of config.architectures with nothing missing, and
give what the module gives whose parameters were pruned by the library itself.
"""

import json

import numpy as np
import pytest

from jaxprune.lm import cli
from tests.support import tiny_transformers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("jaxprune.torch.environment")  # torchax
safetensors = pytest.importorskip("safetensors.numpy")
pytestmark = [pytest.mark.parity, pytest.mark.full]

SMALL = ["--sequences", "8", "--batch", "4", "--length", "16", "--context", "16"]
HALF = ["--sparsity", "0.5", "--any-perplexity"]


def run(capsys, *words):
    """Exit code, the object of --json, and stderr."""
    code = cli.main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if code == 0 else None, err


def loaded(folder):
    """The module of a directory, which must hold all of it."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    module, info = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return module.eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("through_torch")
    tiny_transformers.bert(root / "bert")
    (root / "text.txt").write_text(tiny_transformers.text())
    return root


def test_bert_is_pruned_on_a_text(place, capsys):
    out = place / "out"
    code, found, err = run(
        capsys, "prune", place / "bert", "--calibration", place / "text.txt", *SMALL,
        *HALF, out,
    )  # fmt: skip
    assert code == 0, err
    assert "model_type bert is no family of jaxprune's" in err
    before, after = (
        safetensors.load_file(f / "model.safetensors") for f in (place / "bert", out)
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {n for n in before if ".layer." in n and before[n].ndim == 2} | {
        "cls.predictions.transform.dense.weight"
    }
    for name in changed:
        assert (after[name] == 0).mean() == pytest.approx(0.5, abs=1e-3)
    assert found["achieved"] == pytest.approx(0.5, abs=1e-3)
    loaded(out)
