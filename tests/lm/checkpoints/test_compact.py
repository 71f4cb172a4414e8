import hashlib
import json
import os
import pathlib
import shutil
import tempfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.numpy import save as save_bytes

from jaxprune.files import safetensors_file
from jaxprune.lm.checkpoints import compact
from jaxprune.lm.checkpoints.checkpoint_dir import Damaged, Unknown, open_directory
from tests.support.hf_directories import BFLOAT16, build, contents, llama, normal


def sparse(seed, share, *shape, dtype=BFLOAT16):
    """Normal weights, the share of them zero."""
    weight = normal(seed, *shape, dtype=dtype).reshape(-1)
    gone = np.random.default_rng(seed).permutation(weight.size)
    weight[gone[: round(share * weight.size)]] = 0
    return weight.reshape(shape)


def pruned(dtype=BFLOAT16):
    return {
        name: sparse(i, 0.6, *value.shape, dtype=dtype) if "_proj" in name else value
        for i, (name, value) in enumerate(llama(dtype=dtype).items())
    }


@pytest.fixture
def packed(tmp_path):
    """A directory of a few files as one compact file."""
    files = {"tokenizer.model": b"\0\1\2", "LICENSE": b"", "jaxprune.json": b"{}"}
    source = open_directory(build(tmp_path / "m", pruned(), 3, **files))
    compact.compact(source, tmp_path / "m.compact")
    return tmp_path / "m.compact"


def same(found, expected):
    """Whether two directories hold the same tensors, bit for bit, and other files."""
    files = contents(found)
    assert files.keys() == contents(expected).keys()
    for name, content in contents(expected).items():
        if not name.endswith(".safetensors"):
            assert files[name] == content
            continue
        held, tensors = (
            [
                {
                    k: safetensors_file.view(d / name, v).tobytes()
                    for k, v in of.items()
                },
                metadata,
            ]
            for d in (found, expected)
            for of, metadata in [safetensors_file.read_header(d / name)]
        )
        assert held == tensors


def test_expand_gives_back_every_tensor_and_file(tmp_path, packed):
    paths = compact.expand(packed, tmp_path / "again")
    same(tmp_path / "again", tmp_path / "m")
    assert {path.name for path in paths} == set(os.listdir(tmp_path / "m"))
    # What this package wrote comes back byte for byte.
    compact.compact(open_directory(tmp_path / "again"), tmp_path / "b")
    compact.expand(tmp_path / "b", tmp_path / "b again")
    assert contents(tmp_path / "b again") == contents(tmp_path / "again")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=str)
def test_at_60_percent_the_file_is_as_small_as_the_formula_says(tmp_path, dtype):
    tensors = {f"w{i}": sparse(i, 0.6, 256, 256, dtype=dtype) for i in range(4)}
    source = open_directory(build(tmp_path / "m", tensors))
    result = compact.compact(source, tmp_path / "f")
    width = np.dtype(dtype).itemsize
    kept = 65536 - round(0.6 * 65536)
    wanted = 4 * (65536 / 8 + kept * width)
    assert wanted <= result.compact_bytes <= wanted + 4096
    assert result.compact_bytes == (tmp_path / "f").stat().st_size
    assert result.dense_bytes == sum(map(len, contents(tmp_path / "m").values()))
    if width == 2:
        assert result.compact_bytes <= 0.47 * result.dense_bytes


def test_the_layout_is_the_documented_one(tmp_path, packed):
    """Decoded here by the library and the docstring alone."""
    with safe_open(packed, framework="np") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == (
        "jaxprune.compact",
        "2",
    )
    told = json.loads(metadata["contents"])
    held = load_file(packed)
    dense = pruned()
    assert told["tensors"].keys() == dense.keys()
    for name, entry in told["tensors"].items():
        wanted = dense[name]
        assert (entry["dtype"], tuple(entry["shape"])) == ("BF16", wanted.shape)
        assert entry["sha256"] == hashlib.sha256(wanted.tobytes()).hexdigest()
        if f"dense/{name}" in held:
            assert held[f"dense/{name}"].tobytes() == wanted.tobytes()
            continue
        mask = held[f"mask/{name}"]
        bits = np.array([mask[i // 8] >> (i % 8) & 1 for i in range(wanted.size)])
        flat = np.zeros(wanted.size, BFLOAT16)
        flat[bits == 1] = held[f"values/{name}"].view(BFLOAT16)
        assert flat.tobytes() == wanted.tobytes()
    assert "mask/model.layers.0.mlp.up_proj.weight" in held
    assert "dense/lm_head.weight" in held
    for name, content in contents(tmp_path / "m").items():
        if not name.endswith(".safetensors"):
            assert told["files"][name] == hashlib.sha256(content).hexdigest()
            assert held[f"file/{name}"].tobytes() == content


def test_tensors_are_read_without_expanding(packed):
    found = dict(compact.dense_tensors(packed))
    wanted = pruned()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].tobytes() == value.tobytes()


def test_minus_zero_and_the_bits_of_nan_survive(tmp_path):
    bits = np.zeros(4096, np.uint16)
    bits[:4] = 0x8000, 0x7FC1, 0xFFFF, 0x0001
    source = open_directory(build(tmp_path / "m", {"w": bits.view(BFLOAT16)}))
    result = compact.compact(source, tmp_path / "f")
    assert result.compact_bytes < result.dense_bytes / 2
    read = dict(compact.dense_tensors(tmp_path / "f"))["w"]
    np.testing.assert_array_equal(read.view(np.uint16), bits)


def test_whatever_lies_in_the_directory_is_kept_or_named(tmp_path):
    folder = build(
        tmp_path / "m", pruned(), **{"report.html": b"<p>", "old.bin": b"\0"}
    )
    (folder / "1_Pooling" / "deep").mkdir(parents=True)
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "1_Pooling" / "deep" / "x.pt").write_bytes(b"\1\2")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "note").write_bytes(b"")
    shutil.copytree(folder, tmp_path / "whole")
    (tmp_path / "elsewhere").mkdir()
    (folder / "out").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe")
    result = compact.compact(open_directory(folder), tmp_path / "f")
    assert result.omitted == ("out", "pipe")
    compact.expand(tmp_path / "f", tmp_path / "again")
    same(tmp_path / "again", tmp_path / "whole")


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_a_bit_that_flipped_is_found_before_the_tensor_is_handed_out(packed, name):
    with open(packed, "r+b") as file:
        entries, _ = safetensors_file.read_header(packed)
        info = entries.get(f"values/{name}") or entries[f"dense/{name}"]
        file.seek(info.offset + info.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    seen = []
    with pytest.raises(Damaged, match=f"'{name}' in it is not what went in"):
        seen += [found for found, _ in compact.dense_tensors(packed)]
    assert name not in seen


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path, packed, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4000))
    with pytest.raises(
        OSError, match=r"must have room for [\d,]+ bytes, but 4,000 are"
    ):
        compact.expand(packed, tmp_path / "again")
    with pytest.raises(OSError, match="must have room"):
        compact.compact(open_directory(tmp_path / "m"), tmp_path / "g")
    assert sorted(os.listdir(tmp_path)) == ["m", "m.compact"]


FLOATS = [np.float32, np.float16, BFLOAT16, ml_dtypes.float8_e4m3fn]
kinds = st.sampled_from([*FLOATS, np.int8, np.int64, np.bool_])
shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
specs = st.tuples(kinds, shapes, st.floats(0, 1))


@given(st.dictionaries(st.text(max_size=5), specs, min_size=1, max_size=4))
def test_any_directory_survives(spec):
    spec.pop("__metadata__", None)
    tensors = {
        name: sparse(i, share, *shape, dtype=np.float32).astype(kind)
        for i, (name, (kind, shape, share)) in enumerate(spec.items())
    }
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        source = open_directory(build(root / "m", tensors or {"w": normal(0, 3)}))
        compact.compact(source, root / "a")
        compact.expand(root / "a", root / "again")
        same(root / "again", root / "m")
        found = dict(compact.dense_tensors(root / "a"))
        assert {k: v.tobytes() for k, v in found.items()} == {
            k: source.read(k).tobytes() for k in source.tensors
        }


def respell(path, change):
    """Writes a compact file again, whole, with something else in it."""
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    told, held = json.loads(metadata["contents"]), load_file(path)
    change(told, held)
    metadata = metadata | {"contents": json.dumps(told)}
    path.write_bytes(save_bytes(held, metadata))


UP = "model.layers.0.mlp.up_proj.weight"


def _set_bit(told, held):
    mask = held[f"mask/{UP}"].copy()
    mask[np.flatnonzero(mask != 255)[0]] = 255
    held[f"mask/{UP}"] = mask


def _value(told, held):
    values = held[f"values/{UP}"].copy()
    values.view(np.uint16)[0] ^= 1
    held[f"values/{UP}"] = values


def _rename(told, held):
    told["files"]["../evil"] = told["files"].pop("LICENSE")
    held["file/../evil"] = held.pop("file/LICENSE")


def _shorter(told, held):
    held[f"values/{UP}"] = held[f"values/{UP}"][1:]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_set_bit, f"'{UP}' in it is not what went in"),
        (_shorter, f"'{UP}' in it is not what went in"),
        (_value, f"'{UP}' in it is not what went in"),
        (_rename, "names lead elsewhere"),
        (lambda t, h: t["files"].update(LICENSE="0"), "'LICENSE' in it is not"),
        (lambda t, h: t["files"].update(LICENSE=0), "names lead elsewhere"),
        (lambda t, h: t.pop("files"), "list no tensors, weights and files"),
        (lambda t, h: h.pop(f"mask/{UP}"), f"'{UP}' in it is not what went in"),
        (lambda t, h: h.pop("file/LICENSE"), "it lacks 'LICENSE'"),
        (lambda t, h: t["tensors"][UP].update(shape=[9, 9]), f"'{UP}' in it is not"),
        (lambda t, h: t["tensors"][UP].update(shape=[-8, -9]), "integers"),
        (lambda t, h: t["tensors"][UP].update(dtype="F32"), f"'{UP}' in it is not"),
        (lambda t, h: t["tensors"][UP].update(file="x"), "nothing sound"),
        (lambda t, h: t["tensors"].update({UP: 1}), "nothing sound"),
        (lambda t, h: t["tensors"][UP].pop("sha256"), f"'{UP}' in it is not"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_damaged(tmp_path, packed, change, match):
    respell(packed, change)
    with pytest.raises(Damaged, match=match):
        compact.expand(packed, tmp_path / "again")
    assert sorted(os.listdir(tmp_path)) == ["m", "m.compact"]


def test_bits_after_the_last_weight_are_damage(tmp_path):
    weight = sparse(0, 0.9, 5, 21)
    compact.compact(
        open_directory(build(tmp_path / "m", {"w": weight})), tmp_path / "f"
    )

    def move(told, held):
        mask = held["mask/w"].copy()
        first = np.flatnonzero(mask)[0]
        mask[first] &= mask[first] - np.uint8(1)
        mask[-1] |= 128
        held["mask/w"] = mask

    respell(tmp_path / "f", move)
    with pytest.raises(Damaged, match="'w' in it is not"):
        dict(compact.dense_tensors(tmp_path / "f"))


def test_a_cut_file_is_damaged_and_another_kind_is_unknown(tmp_path, packed):
    os.truncate(packed, packed.stat().st_size - 1)
    with pytest.raises(Damaged, match="tensors leave gaps"):
        compact.expand(packed, tmp_path / "again")
    dense = tmp_path / "m" / "model-00001-of-00003.safetensors"
    with pytest.raises(Unknown, match=r"must be of format jaxprune.compact"):
        compact.expand(dense, tmp_path / "again")
    with pytest.raises(FileNotFoundError, match="there is no compact file"):
        next(compact.dense_tensors(tmp_path / "absent"))


def test_what_is_there_is_not_destroyed(tmp_path, packed):
    source = open_directory(tmp_path / "m")
    with pytest.raises(ValueError, match="there is something already"):
        compact.compact(source, packed)
    before = packed.read_bytes()
    compact.compact(source, packed, overwrite=True)
    assert packed.read_bytes() == before
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="it is no compact file"):
        compact.compact(source, tmp_path / "notes", overwrite=True)
    with pytest.raises(ValueError, match="there is something already"):
        compact.expand(packed, tmp_path / "m")
    with pytest.raises(ValueError, match="must lie apart"):
        compact.compact(source, tmp_path / "m" / "model.compact")
    assert (tmp_path / "notes").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["m", "m.compact", "notes"]


def test_a_crash_leaves_no_file(tmp_path, monkeypatch):
    source = open_directory(build(tmp_path / "m", pruned()))

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_file, "write", crash)
    with pytest.raises(KeyboardInterrupt):
        compact.compact(source, tmp_path / "f")
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("what", ["model.safetensors", "tokenizer.json", "LICENSE"])
def test_a_directory_that_changes_under_way_is_refused(tmp_path, monkeypatch, what):
    tensors = {"w": sparse(0, 0.9, 64, 64)}
    source = open_directory(build(tmp_path / "m", tensors, LICENSE=b"A"))
    write = safetensors_file.write

    def change(*arguments):
        path = tmp_path / "m" / what
        content = path.read_bytes()
        if what == "tokenizer.json":
            path.write_bytes(content[:-1])
        elif what == "LICENSE":
            path.write_bytes(b"B")  # as many bytes
        else:
            path.write_bytes(content[:-8] + bytes([1] * 8))
        return write(*arguments)

    monkeypatch.setattr(safetensors_file, "write", change)
    with pytest.raises(ValueError, match=f"'.*{what}' changed; begin again"):
        compact.compact(source, tmp_path / "f")
    assert os.listdir(tmp_path) == ["m"]
