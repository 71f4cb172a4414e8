"""`sample`, `eval` and `speed` of packed models, from directories and compact files."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support import rounded, tiny_cli
from tests.support.tiny_cli import place, run
from tests.support.zeroed import write_zeros

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.lm import cli
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.compact_source import open_source
from jaxprune.lm.checkpoints.levels import Grid
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.loaded_model import open_model
from jaxprune.lm.packing.packed_decoder import pack_decoder
from jaxprune.lm.steps.speed import step_bytes
from jaxprune.sparse.packed_matrix import PackedMatrix

__all__ = ["place"]

DOWN = "layers/0/mlp/down/kernel"


@pytest.fixture(scope="module")
def pruned(place):
    """The model with zeros, as a directory and as a compact file."""
    tiny_cli.model(place / "pruned")
    write_zeros(place / "pruned", 0.6)
    words = [str(place / name) for name in ("pruned", "pruned.jaxprune")]
    assert cli.main(["compact", *words]) == 0
    return place


def packed(path, **options):
    """The packed model of a directory or of a compact file."""
    with open_source(path) as source:
        return pack_decoder(open_model(source), source, **options)


@pytest.mark.full
def test_packed_models_have_the_perplexity_of_the_directory(pruned, capsys):
    words = ["--text", pruned / "rows.npy", "--batch", "8"]
    expected = tiny_cli.nats(pruned / "pruned", np.load(pruned / "rows.npy")).mean()
    for name in ("pruned", "pruned.jaxprune"):
        code, record, err = run(capsys, "eval", pruned / name, "--packed", *words)
        assert code == 0, err
        assert record["texts"]["rows.npy"]["nats"] == pytest.approx(expected, rel=1e-5)
        # Seven matrices of the layer, the head and the embedding.
        assert (record["packed"]["packed"], record["packed"]["unpacked"]) == (9, {})
        assert record["packed"]["after"] < record["packed"]["before"]
        assert "9 matrices packed (float32): " in err


@pytest.mark.full
def test_a_packed_model_continues_a_text_as_the_directory_does(pruned, capsys):
    words = ["--prompt", "w9 w10", "--steps", "3", "--temperature", "0"]
    _, expected, _ = run(capsys, "sample", pruned / "pruned", *words)
    for options in (["pruned.jaxprune"], ["pruned.jaxprune", "--packed"]):
        path, *switches = options
        code, record, _ = run(capsys, "sample", pruned / path, *words, *switches)
        assert (code, record["tokens"]) == (0, expected["tokens"])
    assert record["text"] == expected["text"]


@pytest.mark.full
@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("as_file", [False, True])
def test_levels_are_the_files_and_are_not_rounded_again(tmp_path, name, bits, as_file):
    folder = tiny_cli.model(tmp_path / "model")
    tensors = tiny_cli.weights(folder)
    tensor = "model.layers.0.mlp.down_proj.weight"  # (32, 48): no whole words
    gate = "model.layers.0.mlp.gate_proj.weight"  # (48, 32)
    grid = Grid(bits, 16)
    whole = {}
    for key in (tensor, gate):
        shape = tensors[key].shape
        # No group has the highest level, so the nearest levels would be others.
        whole[key], tensors[key] = rounded.rounded(
            shape, grid, -1, "float32", largest=grid.most - 2, share=0.6
        )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_rounding(folder, grid)
    path = folder
    if as_file:
        path = tmp_path / "file"
        assert cli.main(["compact", str(folder), str(path)]) == 0
    leaves = packed(path).leaves
    for leaf, key in ((DOWN, tensor), ("layers/0/mlp/gate/kernel", gate)):
        matrix = leaves[leaf]
        assert isinstance(matrix, PackedMatrix)
        assert matrix.encoding == name
        np.testing.assert_array_equal(matrix.unpack(), tensors[key])
        assert matrix.kept - np.count_nonzero(whole[key]) in (0, 1)


def write_rounding(folder, grid):
    """A jaxprune.json that says how weights were rounded."""
    record = {
        "format": rewrite.FORMAT,
        "version": rewrite.VERSION,
        "rounding": grid._asdict(),
        "achieved": 0.5,
        "tensors": {},
        "files": {},
    }
    (folder / rewrite.NAME).write_text(json.dumps(record))


@pytest.mark.full
def test_values_are_kept_as_asked_for(pruned, capsys):
    words = ["--text", pruned / "rows.npy", "--packed", "--values"]
    expected = tiny_cli.nats(pruned / "pruned", np.load(pruned / "rows.npy")).mean()
    for values, tolerance in (("bfloat16", 1e-2), ("int8", 3e-2)):
        code, record, _ = run(capsys, "eval", pruned / "pruned", *words, values)
        assert (code, record["packed"]["encodings"]) == (0, [values])
        nats = record["texts"]["rows.npy"]["nats"]
        assert nats == pytest.approx(expected, rel=tolerance)
        assert nats != pytest.approx(expected, rel=1e-9)


def test_a_model_that_is_not_finite_is_refused_packed_too(tmp_path, capsys):
    folder = tiny_cli.model(tmp_path / "model")
    tensors = tiny_cli.weights(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][3, 4] = np.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = ["--packed", "--prompt", "w9", "--steps", "1"]
    code, _, err = run(capsys, "sample", folder, *words)
    assert code == 1
    assert name in err
    assert "NaN" in err


def test_a_damaged_compact_file_is_refused(pruned, tmp_path, capsys):
    content = bytearray((pruned / "pruned.jaxprune").read_bytes())
    content[-200] ^= 1  # of the tensors, which come last
    (tmp_path / "damaged").write_bytes(content)
    words = ["--packed", "--prompt", "w9", "--steps", "1"]
    code, _, err = run(capsys, "sample", tmp_path / "damaged", *words)
    assert code == 1
    assert "is damaged" in err


def test_values_need_a_packed_model(pruned, capsys):
    words = ["sample", pruned / "pruned", "--prompt", "w9", "--values", "int8"]
    code, _, err = run(capsys, *words)
    assert code == 1
    assert "--values needs --packed" in err


@pytest.mark.full
def test_a_packed_model_runs_on_a_mesh(pruned, capsys):
    words = ["--text", pruned / "rows.npy", "--batch", "8", "--packed"]
    words += ["--mesh", "data=4,fsdp=2"]
    expected = tiny_cli.nats(pruned / "pruned", np.load(pruned / "rows.npy")).mean()
    code, record, err = run(capsys, "eval", pruned / "pruned.jaxprune", *words)
    assert code == 0, err
    assert record["texts"]["rows.npy"]["nats"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.full
def test_models_are_timed_in_turn_and_beside_the_first(pruned, capsys):
    paths = [pruned / "model", pruned / "pruned.jaxprune"]
    words = ["--packed", "--prompt", "4", "--steps", "2", "--rounds", "3"]
    code, record, _ = run(capsys, "speed", *paths, *words)
    assert code == 0
    names = [name + form for name in map(str, paths) for form in ("", ", packed")]
    assert list(record["models"]) == names
    first, *others = record["models"].values()
    assert "ratios" not in first
    for model in others:
        ratio = model["ratios"]["decode"]
        assert ratio["ratio"] == pytest.approx(model["decode"] / first["decode"])
        assert ratio["noise"] >= 1
    sizes = [model["bytes_a_step"] for model in record["models"].values()]
    assert sizes[0] == sizes[2] > sizes[3]
    assert cli.main(["speed", *map(str, paths), *words]) == 0
    table = capsys.readouterr().out
    assert "bytes a token" in table
    assert table.count("packed") == 2


def test_a_model_is_not_timed_twice(pruned, capsys):
    code, _, err = run(capsys, "speed")
    assert code != 0
    assert "MODEL" in err or "at least one model" in err
    path = pruned / "pruned"
    code, _, err = run(capsys, "speed", path, path)
    assert code == 1
    assert "one is given twice" in err


def test_bytes_of_a_step_are_those_that_are_read():
    shape = {
        "vocab_size": 10, "context": 8, "layers": 1, "width": 4, "heads": 1,
        "kv_heads": 1, "head_dim": 4, "mlp_width": 8,
    }  # fmt: skip
    leaves = {
        "embedding/embedding": jnp.zeros((10, 4)),
        "head/kernel": jnp.zeros((4, 10)),
        "layers/0/mlp/up/kernel": jnp.zeros((4, 4, 8), jnp.bfloat16),
    }
    untied = DecoderConfig(**shape, tie_weights=False)
    # Two rows of the table, the head, and the matrices.
    assert step_bytes(leaves, untied, 2) == 2 * 16 + 160 + 256
    mixture = DecoderConfig(
        **shape, tie_weights=True, experts=4, experts_per_token=1, gated=True
    )
    assert step_bytes(leaves, mixture, 2) == 160 + 160 + 128
    assert step_bytes(leaves, mixture, 8) == 160 + 160 + 256
