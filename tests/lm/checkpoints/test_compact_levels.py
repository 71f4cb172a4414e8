"""A rounded directory as one compact file: fewer bits, and every weight comes back."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save

from jaxprune.lm.checkpoints import compact, compact_sizes, rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import Damaged, open_directory
from tests.support.hf_directories import BFLOAT16, build, llama
from tests.support.rounded import rounded
from tests.support.trajectories import bits

GROUP = 16


def told(width):
    """What jaxprune.json says of a rounded directory."""
    return {
        "format": rewrite.FORMAT,
        "version": rewrite.VERSION,
        "files": {},
        "tensors": {},
        "rounding": {"bits": width, "group": GROUP},
    }


def tensors(width, dtype=BFLOAT16):
    """A model whose projections lie on levels."""
    grid = compact_sizes.Grid(width, GROUP)
    return {
        name: rounded(value.shape, grid, -1, dtype, i, 0.5)[1]
        if "_proj" in name
        else value
        for i, (name, value) in enumerate(llama(dtype=dtype).items())
    }


@pytest.fixture(params=[4, 8])
def directory(request, tmp_path):
    record = json.dumps(told(request.param)).encode()
    files = {"jaxprune.json": record, "tokenizer.model": b"\0\1"}
    return open_directory(build(tmp_path / "m", tensors(request.param), 2, **files))


def test_every_weight_comes_back(directory, tmp_path):
    compact.compact(directory, tmp_path / "f")
    for name, tensor in compact.dense_tensors(tmp_path / "f"):
        np.testing.assert_array_equal(bits(tensor), bits(directory.read(name)))


@pytest.mark.parametrize("width", [4, 8])
def test_the_file_is_as_small_as_the_formula_says(tmp_path, width):
    shape, grid = (512, 512), compact_sizes.Grid(width, 128)
    weight = rounded(shape, grid, -1, np.float32, share=0.5)[1].astype(BFLOAT16)
    record = told(width) | {"rounding": {"bits": width, "group": 128}}
    files = {"jaxprune.json": json.dumps(record).encode()}
    source = open_directory(build(tmp_path / "m", {"w": weight}, **files))
    result = compact.compact(source, tmp_path / "f")
    size, nonzero = weight.size, np.count_nonzero(weight)
    wanted = size / 8 + np.ceil(nonzero * width / 8) + 2 * size / 128
    assert wanted <= result.compact_bytes <= wanted + 4096
    assert compact_sizes.directory_sizes(source).compact_bytes == wanted


def test_the_layout_is_the_documented_one(directory, tmp_path):
    """Decoded here by the library and the docstring alone."""
    compact.compact(directory, tmp_path / "f")
    with safe_open(tmp_path / "f", framework="np") as file:
        entries = json.loads(file.metadata()["contents"])["tensors"]
    held, seen = load_file(tmp_path / "f"), 0
    for name, entry in entries.items():
        if "bits" not in entry:
            continue
        seen += 1
        size = int(np.prod(entry["shape"]))
        mask = np.unpackbits(held[f"mask/{name}"], bitorder="little")[:size]
        own = held[f"levels/{name}"]
        if entry["bits"] == 4:
            own = np.stack([own & 15, own >> 4], 1).reshape(-1)[: mask.sum()]
            own = np.where(own > 7, own.astype(np.int16) - 16, own)
        else:
            own = own.view(np.int8)
        flat = np.zeros(size)
        flat[mask == 1] = own
        scales = held[f"scales/{name}"].astype(np.float64)
        wide = np.repeat(scales, entry["group"], entry["axis"])
        wide = wide[tuple(slice(n) for n in entry["shape"])]
        value = (flat.reshape(entry["shape"]) * wide).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(bits(value), bits(directory.read(name)))
    assert seen == sum("_proj" in name for name in entries) > 0


@pytest.mark.parametrize(
    "record",
    [
        {"rounding": None},
        {"rounding": {"bits": 3, "group": GROUP}},
        {"rounding": {"bits": 4, "group": 0}},
        {"rounding": {"bits": 4, "group": 2 * GROUP}},  # not how it was rounded
        {"rounding": "int4"},
    ],
)
def test_a_record_that_says_something_else_costs_only_bytes(tmp_path, record):
    files = {"jaxprune.json": json.dumps(told(4) | record).encode()}
    source = open_directory(build(tmp_path / "m", tensors(4), **files))
    compact.compact(source, tmp_path / "f")
    for name, tensor in compact.dense_tensors(tmp_path / "f"):
        np.testing.assert_array_equal(bits(tensor), bits(source.read(name)))


def altered(file, change, to):
    """The file with its first tensor of levels told otherwise, or its bytes changed."""
    held = load_file(file)
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    inside = json.loads(metadata["contents"])
    name = next(k for k, v in inside["tensors"].items() if "bits" in v)
    change(inside["tensors"][name], held, name)
    metadata["contents"] = json.dumps(inside)
    to.write_bytes(save(held, metadata))
    return to


def _level(entry, held, name):
    held[f"levels/{name}"][0] ^= 1


def _scale(entry, held, name):
    held[f"scales/{name}"] = held[f"scales/{name}"] * BFLOAT16.type(2)


def _no_scale(entry, held, name):
    held[f"scales/{name}"][:] = np.nan


def _short(entry, held, name):
    held[f"levels/{name}"] = held[f"levels/{name}"][:-1]


def _axis(entry, held, name):
    entry["axis"] = 0


def _group(entry, held, name):
    entry["group"] = True


def _other_group(entry, held, name):
    entry["group"] = GROUP // 2


def _dtype(entry, held, name):
    entry["dtype"] = "I16"


@pytest.mark.parametrize(
    "change",
    [_level, _scale, _no_scale, _short, _axis, _group, _other_group, _dtype],
)
def test_a_damaged_file_is_refused(directory, tmp_path, change):
    compact.compact(directory, tmp_path / "f")
    same = altered(tmp_path / "f", lambda *_: None, tmp_path / "same")
    compact.expand(same, tmp_path / "whole")
    assert (tmp_path / "whole" / "config.json").is_file()
    spoiled = altered(tmp_path / "f", change, tmp_path / "spoiled")
    with pytest.raises(Damaged):
        compact.expand(spoiled, tmp_path / "again")
    assert not (tmp_path / "again").exists()
