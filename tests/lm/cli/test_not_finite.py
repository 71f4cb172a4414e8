"""Models with NaN or infinity: named, and refused before anything is written."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxprune.lm.checkpoints import checkpoint_dir
from jaxprune.lm.checkpoints.finite import has_nonfinite, nonfinite_tensors
from tests.support import tiny_cli, tiny_hf
from tests.support.tiny_cli import place as place
from tests.support.tiny_cli import run

pytest.importorskip("tokenizers")

SMALL = ["--sequences", 4, "--length", 16, "--batch", 2]
NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
COMMANDS = {
    "eval": lambda model, text, out: ["eval", model, "--text", text],
    "sample": lambda model, text, out: [
        "sample",
        model,
        "--prompt",
        "w5",
        "--steps",
        2,
    ],
    "prune": lambda model, text, out: [
        *("prune", model, out, "--sparsity", 0.5, "--method", "wanda"),
        *("--calibration", text, *SMALL),
    ],
    "magnitude": lambda model, text, out: [
        *("prune", model, out, "--sparsity", 0.5, "--method", "magnitude"),
    ],
    "shrink": lambda model, text, out: [
        *("shrink", model, out, "--ffn", 0.5),
    ],
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def broken(request, tmp_path_factory):
    """A model whose norm has a NaN and whose MLP an infinity."""
    import ml_dtypes

    folder = tmp_path_factory.mktemp("broken") / "model"
    tiny_cli.model(folder)
    dtype = np.dtype(getattr(ml_dtypes, request.param, request.param))
    tensors = {k: v.astype(dtype) for k, v in tiny_cli.tensors().items()}
    tensors[NORM][3] = np.nan
    tensors[UP][1, 2] = -np.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_is_not_finite_is_refused_by_the_names_of_its_tensors(
    broken, place, tmp_path, capsys, command
):
    words = COMMANDS[command](broken, place / "a.txt", tmp_path / "out")
    code, result, err = run(capsys, *words)
    assert (code, result) == (1, None)
    names = ", ".join(f"'{name}'" for name in sorted((NORM, UP)))
    assert f"weights must be finite, but NaN or infinity is in {names}; give" in err
    assert os.listdir(tmp_path) == []


def test_inspect_names_the_tensors_that_are_not_finite(broken, place, capsys):
    code, result, _ = run(capsys, "inspect", broken)
    assert code == 0
    assert sorted(result["nonfinite"]) == sorted((NORM, UP))
    assert run(capsys, "inspect", place / "model")[1]["nonfinite"] == []


def test_of_a_mixture_the_expert_is_named(tmp_path, capsys):
    tensors = tiny_hf.random_tensors("mixtral")
    name = next(k for k in tensors if "experts.1." in k and ".w2." in k)
    tensors[name][0, 0] = np.nan
    tiny_hf.save(tmp_path / "m", tiny_hf.config_json("mixtral"), tensors)
    np.save(tmp_path / "a.npy", tiny_hf.tokens())
    code, _, err = run(capsys, "eval", tmp_path / "m", "--text", tmp_path / "a.npy")
    assert code == 1
    assert f"infinity is in '{name}'; give" in err


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_every_bit_pattern_is_told_as_isfinite_tells_it(dtype):
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 256, (4096, kind.itemsize), np.uint8).view(kind)[:, 0]
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-42], kind)
    for value in (*bits, *special):
        alone = np.array([1, value], kind)
        with np.errstate(invalid="ignore"):  # of older ml_dtypes
            expected = not np.isfinite(alone).all()
        assert has_nonfinite(alone) == expected, value
    assert not has_nonfinite(np.zeros(0, kind))
    assert not has_nonfinite(np.arange(3))


def test_the_last_weight_of_a_tensor_of_several_blocks_is_looked_at(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("jaxprune.lm.checkpoints.finite._BLOCK", 7)
    weight = np.ones((5, 5), np.float32)
    weight[-1, -1] = np.inf
    tensors = {"w": weight, "finite": np.ones((4, 7), np.float32)}
    tiny_hf.save(tmp_path, {}, tensors)
    assert nonfinite_tensors(checkpoint_dir.open_directory(tmp_path)) == ["w"]
