"""The command on every family: inspected, pruned with calibration, run, continued."""

import numpy as np
import pytest

from tests.support import tiny_cli, tiny_hf
from tests.support.tiny_cli import run
from tests.support.tiny_families import CONFIGS

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

METHODS = ["magnitude", "wanda", "ria", "sparsegpt", "alps"]
WHOLE_HEADS = ("olmo2", "cohere2", "gpt-neox", "opt", "falcon")
# The first of each family, and those with a block or a layout of its own.
PRUNED = [
    n
    for n in CONFIGS
    if "-" not in n or n in ("falcon-40b", "gpt-neox", "cohere-norms")
]
# A solver is compiled for each shape of a matrix: here families have the same ones.
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"head_dim": 8, **dict.fromkeys(("intermediate_size", "ffn_dim"), 48)}
SMALL = ["--length", "16", "--sequences", "4", "--batch", "2"]


def folder(name, place, **options):
    """A family's directory with a tokenizer, and its tensors."""
    tensors = tiny_hf.random_folder(name, place, **options)
    tiny_cli.tokenizer(place)
    return tensors


@pytest.mark.parametrize("name", CONFIGS)
def test_inspect_says_which_methods_a_family_can_have(name, tmp_path, capsys):
    folder(name, tmp_path)
    code, found, _ = run(capsys, "inspect", tmp_path)
    assert (code, found["methods"], found["unsupported"]) == (0, METHODS, None)
    heads = [] if name.startswith(WHOLE_HEADS) else ["heads"]
    assert found["shrinkable"] == ["layers", "neurons", *heads]
    # A matrix of a layer, and nothing else.
    pruned = {row["name"] for row in found["tensors"] if row["pruned"]}
    assert all(".layers." in n or ".h." in n for n in pruned)
    config = tiny_hf.config_json(name)
    layers, fused = config["num_hidden_layers"], name.startswith(("gpt-neox", "falcon"))
    ungated = fused or name.startswith(("opt", "phi", "starcoder2"))
    assert len(pruned) == layers * ((2 if fused else 4) + (2 if ungated else 3))


def test_inspect_says_why_a_directory_has_magnitude_alone(tmp_path, capsys):
    from jaxprune.lm import cli

    folder("falcon", tmp_path)
    tiny_hf.edit(tmp_path, alibi=True)
    _, found, _ = run(capsys, "inspect", tmp_path)
    assert (found["methods"], found["shrinkable"]) == (["magnitude"], [])
    assert "alibi must be False, got True" in found["unsupported"]
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "by magnitude alone: " in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.parametrize("name", PRUNED)
def test_a_family_is_pruned_with_calibration_and_runs(name, tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    config = tiny_hf.config_json(name)
    sizes = {key: size for key, size in SIZES.items() if key in config}
    if name.startswith("falcon"):
        sizes["ffn_hidden_size"] = 48
    before = folder(name, model, layers=1, **sizes)
    ids = tiny_hf.tokens(4, 16)
    np.save(tmp_path / "rows.npy", ids)
    method = ["--method", "sparsegpt", "--sparsity", "0.5"]
    rows = ["--calibration", tmp_path / "rows.npy"]
    words = [*method, *rows, *SMALL]
    code, record, _ = run(capsys, "prune", model, out, *words)
    assert code == 0
    after = tiny_cli.weights(out)
    pruned = {row["name"] for row in record["weights"]}
    for key, value in before.items():
        if key in pruned:
            assert (after[key] == 0).sum() == value.size // 2, key
        else:
            np.testing.assert_array_equal(after[key], value, err_msg=key)
    # Weights that are kept moved, to make up for the others.
    errors = [row["error"] for row in record["weights"]]
    assert all(0 < error < 0.6 for error in errors), errors
    # Evaluated and continued as full passes of its model say.
    words = ["eval", out, "--text", tmp_path / "rows.npy", "--batch", "2"]
    code, found, _ = run(capsys, *words)
    assert code == 0
    nats = tiny_cli.nats(out, ids).mean()
    assert found["texts"]["rows.npy"]["nats"] == pytest.approx(nats, rel=1e-4)
    words = ["--prompt", "w9 w10", "--steps", "3", "--temperature", "0", "--bos", "yes"]
    code, found, _ = run(capsys, "sample", out, *words)
    assert code == 0
    ids[0, :3] = 1, 9, 10
    for place in (3, 4, 5):
        ids[0, place] = tiny_cli.logits(out, ids)[0, place - 1].argmax()
    assert found["tokens"] == ids[0, 3:6].tolist()
