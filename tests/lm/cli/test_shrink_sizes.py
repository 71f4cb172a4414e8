"""`jaxprune shrink`: numbers of heads and neurons that suit others."""

import json
import re

import numpy as np
import pytest

from tests.support import tiny_cli, tiny_hf
from tests.support.plain_decoder import initial
from tests.support.tiny_cli import config_of, shrink

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from safetensors.numpy import save_file

from jaxprune.lm.models import hf


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two folders of a width of 32 and four heads, of two key heads or of one."""
    root = tmp_path_factory.mktemp("sizes")
    for name in ("llama", "llama-3"):
        tiny_hf.random_folder(name, root / name, "float32")
    np.save(root / "rows.npy", tiny_hf.tokens(6, 16))
    return root


@pytest.mark.full
def test_a_budget_leaves_heads_that_transformers_takes(place, capsys):
    # A width of 32: three heads of four would be nearest to each of these budgets.
    for budget in (0.85, 0.75):
        words = (place / "llama-3", place / f"heads{budget}", "--budget", budget)
        code, record, _ = shrink(capsys, *words)
        assert (code, 0 <= record["achieved"] - (1 - budget) < 0.01) == (0, True)
        config = config_of(place / f"heads{budget}")
        assert config["num_attention_heads"] in (2, 4)
        assert config["intermediate_size"] < 48


@pytest.mark.parametrize(
    ("words", "left"), [(("--ffn", 0.4), 32), (("--budget", 0.7), 16)]
)
def test_the_neurons_that_are_left_are_a_multiple(words, left, place, capsys):
    # Of 48 neurons 29 would be left by the share, which is nearer to 32 than to 16.
    out = place / f"multiple{left}"
    words = (place / "llama", out, "--multiple", 16, *words)
    code, record, _ = shrink(capsys, *words)
    assert (code, config_of(out)["intermediate_size"]) == (0, left)
    assert "--budget" not in words or record["achieved"] >= 0.3


def test_the_plan_says_the_multiple(place, capsys):
    words = ("--ffn", 0.4, "--multiple", 16, "--plan")
    code, found, _ = shrink(capsys, place / "llama", place / "none", *words)
    assert (code, found["plan"]["neurons a layer"]) == (0, [48, 32])
    assert found["asked"] == {"ffn": 0.4, "multiple": 16}


@pytest.fixture(scope="module")
def odd(place):
    """A folder of six heads, which transformers 5 would not take any more."""
    config = config_of(place / "llama")
    config |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    (place / "odd").mkdir()
    (place / "odd" / "config.json").write_text(json.dumps(config))
    model = initial(hf.decoder_config(config))
    save_file(dict(hf.tensors(model, config)), place / "odd" / "model.safetensors")
    return place / "odd"


def test_heads_that_do_not_fit_as_they_are_may_stay(odd, capsys):
    code, record, _ = shrink(capsys, odd, odd.parent / "less", "--budget", 0.8)
    assert (code, 0 <= record["achieved"] - 0.2 < 0.01) == (0, True)
    config = config_of(odd.parent / "less")
    assert config["num_attention_heads"] in (6, 3, 2, 1)
    assert 32 % config["num_attention_heads"] == 0 or config["num_attention_heads"] == 6


@pytest.mark.full
def test_a_layer_that_moves_up_keeps_its_own_dtype(tmp_path, capsys):
    model = tiny_cli.model(tmp_path / "model", layers=3)
    stored = tiny_cli.weights(model)
    narrow = {
        name: leaf.astype(np.float16 if ".layers.0." in name else np.float32)
        for name, leaf in stored.items()
    }
    save_file(narrow, model / "model.safetensors", {"format": "pt"})
    code, record, _ = shrink(capsys, model, tmp_path / "out", "--layers", 1, 2)
    assert code == 0
    left = tiny_cli.weights(tmp_path / "out")
    for name, leaf in left.items():
        number = re.search(r"layers\.(\d)", name)
        if number is not None:
            name = name.replace(number[0], f"layers.{int(number[1]) + 1}")
        before = narrow[name]
        assert leaf.dtype == before.dtype
        np.testing.assert_array_equal(leaf, before, err_msg=name)
    assert record["sizes"]["after"]["bytes"] == sum(x.nbytes for x in left.values())


def test_weights_that_lose_bits_are_named(tmp_path, capsys):
    model = tiny_cli.model(tmp_path / "model", layers=3)
    words = ("--layers", 1, 2, "--plan")
    _, _, err = shrink(capsys, model, tmp_path / "out", *words)
    assert "lose bits" not in err
    _, _, err = shrink(capsys, model, tmp_path / "out", *words, "--dtype", "bfloat16")
    assert "in bfloat16" in err
    assert "lose bits" in err
