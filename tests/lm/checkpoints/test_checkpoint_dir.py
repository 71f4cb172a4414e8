import json
import os
import pathlib
import tempfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune.files.safetensors_file import DTYPES, read_header, view
from jaxprune.lm.checkpoints.checkpoint_dir import Damaged, Unknown, open_directory
from tests.support.hf_directories import INDEX, build, llama, load, normal, raw, save


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_what_the_library_wrote(tmp_path, shards):
    tensors = llama()
    opened = open_directory(build(tmp_path / "m", tensors, shards))
    assert opened.tensors.keys() == tensors.keys()
    assert opened.indexed == (shards > 1)
    assert all(meta == {"format": "pt"} for meta in opened.metadata.values())
    for name, value in tensors.items():
        np.testing.assert_array_equal(opened.read(name), value)


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_keeps_its_bits(tmp_path, code):
    kind = DTYPES[code]
    bits = np.arange(24, dtype=np.uint8).reshape(3, 8) % (2 if code == "BOOL" else 255)
    value = bits.view(kind)
    folder = build(tmp_path / "m", {"x": np.ones(1, "f4")})
    entry = {"dtype": code, "shape": list(value.shape), "data_offsets": [0, 24]}
    raw(folder / "model.safetensors", {"x": entry}, value.tobytes())
    opened = open_directory(folder)
    found = opened.read("x")
    assert (found.dtype, found.shape) == (value.dtype, value.shape)
    assert found.tobytes() == value.tobytes()


def test_a_tensor_is_a_read_only_view_of_the_file(tmp_path):
    opened = open_directory(build(tmp_path / "m", {"w": np.ones((4, 4), "f4")}))
    array = opened.read("w")
    assert not array.flags.writeable
    assert not array.flags.owndata
    assert type(array) is np.ndarray
    with open(tmp_path / "m" / "model.safetensors", "r+b") as file:
        file.seek(opened.tensors["w"].offset)
        file.write(np.float32(7).tobytes())
    assert array[0, 0] == 7


def test_scalars_empty_and_unaligned_tensors_are_read(tmp_path):
    folder = build(tmp_path / "m", {"w": np.ones(1, "f4")})
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [3, 7]},
        "c": {"dtype": "F32", "shape": [0, 5], "data_offsets": [7, 7]},
    }
    raw(folder / "model.safetensors", header, b"abc" + np.float32(2.5).tobytes())
    opened = open_directory(folder)
    assert opened.read("a").tobytes() == b"abc"
    assert opened.read("b").shape == ()
    assert opened.read("b") == 2.5
    assert opened.read("c").shape == (0, 5)
    assert not opened.read("c").flags.writeable


def test_tensors_come_file_by_file_as_they_lie(tmp_path):
    opened = open_directory(build(tmp_path / "m", llama(), 2))
    places = [(info.file, info.offset) for info in opened.tensors.values()]
    assert places == sorted(places)


def test_what_belongs_to_a_model_is_listed_and_other_weights_are_not(tmp_path):
    belong = "merges.txt tokenizer.model source.spm bpe.codes LICENSE README.md"
    belong += " chat_template.jinja model.py"
    foreign = "pytorch_model.bin x.pt x.pth x.pkl x.ckpt tf_model.h5 f.msgpack m.gguf"
    foreign += " pytorch_model.bin.index.json .gitattributes other.safetensors"
    files = dict.fromkeys((belong + " " + foreign).split(), b"x")
    folder = build(tmp_path / "m", llama(), 2, **files)
    (folder / "original").mkdir()
    # A module of sentence-transformers; a checkpoint of its training, another model.
    modules = ("2_Dense/config.json", "2_Dense/model.safetensors", "modules.json")
    for name in (
        *modules,
        "checkpoint-5/config.json",
        "checkpoint-5/model.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    opened = open_directory(folder)
    others = opened.others
    training = {"checkpoint-5/config.json", "checkpoint-5/model.safetensors"}
    assert training <= set(opened.uncopied)
    assert others[:2] == ("config.json", INDEX)
    own = {"config.json", INDEX, "tokenizer.json", "generation_config.json"}
    own |= {*modules}
    assert set(others) == own | set(belong.split())


def test_an_unknown_tensor_is_refused_by_name(tmp_path):
    opened = open_directory(build(tmp_path / "m", {"w": np.ones(2, "f4")}))
    with pytest.raises(ValueError, match="no tensor 'v'; it has 'w'"):
        opened.read("v")


def test_a_file_cut_after_opening_is_damaged(tmp_path):
    folder = build(tmp_path / "m", {"w": np.ones(2048, "f4")})
    opened = open_directory(folder)
    os.truncate(folder / "model.safetensors", 200)
    with pytest.raises(Damaged, match="shorter"):
        opened.read("w")


def test_a_missing_folder_and_a_file_say_what_to_give(tmp_path):
    line = "hf download meta-llama/Llama-3.1-8B --local-dir Llama-3.1-8B"
    with pytest.raises(FileNotFoundError, match=line):
        open_directory("meta-llama/Llama-3.1-8B")
    for path in (tmp_path / "none", "models/my/llama", "./llama/8B", "llama"):
        with pytest.raises(FileNotFoundError, match="give a local directory"):
            open_directory(path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(Unknown, match=r"has no config\.json; give the dir"):
        open_directory(tmp_path / "model.safetensors")


def test_the_links_of_the_hub_s_cache_are_followed(tmp_path):
    built = build(tmp_path / "m", {"w": np.ones(2, "f4")})
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in built.iterdir():
        path.rename(blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    assert open_directory(snapshot).read("w").tolist() == [1, 1]


def _write(name, content):
    """Spoils a directory by a file's content: bytes, text or what JSON holds."""
    if not isinstance(content, bytes | str):
        content = json.dumps(content)
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(content)


def _config(content):
    return _write("config.json", content)


def _weights(content):
    return _write("model.safetensors", content)


def _header(text=None, **entries):
    return lambda folder: raw(
        folder / "model.safetensors", text or entries, b"" if text else bytes(8)
    )


def _entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _moved(target=None):
    """Moves the weights away, or removes them."""

    def spoil(folder):
        weights = folder / "model.safetensors"
        weights.rename(folder / target) if target else weights.unlink()

    return spoil


def _index_of_pickles(folder):
    _moved()(folder)
    _write(INDEX, {"weight_map": {"w": "pytorch_model.bin"}})(folder)


def _link_out(folder):
    (folder.parent / "secret").write_text("x")
    (folder / "vocab.txt").symlink_to(folder.parent / "secret")


def _weights_link_out(folder):
    _moved("../w")(folder)
    (folder / "model.safetensors").symlink_to("../w")


def _cut(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def _longer(folder):
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"\0")


QUANTIZED = {"quantization_config": {"bits": 4}}
DANGLING = r"notes\.json.*link to what is not there"


@pytest.mark.parametrize(
    ("error", "spoil", "match"),
    [
        (Unknown, lambda m: (m / "config.json").unlink(), "has no config.json"),
        (
            Unknown,
            _moved("pytorch_model.bin"),
            "_model.bin'; convert .*pickle is",
        ),
        (Unknown, _moved(), "has none; convert"),
        (
            Unknown,
            lambda m: save(m / "more.safetensors", {"v": np.ones(2, "f4")}),
            "'model.safetensors', 'more.safetensors' and none; keep one",
        ),
        (Unknown, _config({"text_config": QUANTIZED}), "quantization_config; save the"),
        (Unknown, _config({"quantization": {"bits": 4}}), "has a quantization; save"),
        (
            Unknown,
            _write("quantize_config.json", {}),
            "has a quantize_config.json",
        ),
        (Unknown, _header(w=_entry(0, 1, (2,), "F4")), "'w' in .* is F4"),
        (Unknown, _write(INDEX, {"weight_map": {"w": "a.safetensors"}}), "both model"),
        (Unknown, _index_of_pickles, "lists 'pytorch_model.bin'; convert"),
        (Unknown, _link_out, "'.*vocab.txt' is a link to '.*secret', outside"),
        (Unknown, _weights_link_out, "outside the model's directory"),
        (Damaged, lambda m: (m / "notes.json").symlink_to("missing.json"), DANGLING),
        (Damaged, _cut, "its tensors leave gaps"),
        (Damaged, _longer, "its tensors leave gaps"),
        (Damaged, _weights(b""), "does not fit 0"),
        (Damaged, _weights(b"\xff" * 16), "does not fit 16"),
        (Damaged, _weights((2**40).to_bytes(8, "little") + b"{}"), "does not fit 10"),
        (Damaged, _header(b"{not json"), "holds no JSON"),
        (Damaged, _header(b"[1]"), "no JSON object"),
        (Damaged, _header(b"\xff\xfe{}"), "holds no JSON"),
        (Damaged, _header(b"[" * 100_000), "holds no JSON"),
        (Damaged, _header(b'{"a": 1, "a": 2}'), "comes twice"),
        (Damaged, _header(__metadata__={"format": 1}), "no map of text"),
        (Damaged, _header(w=_entry(0, 4), v=_entry(0, 4)), "its tensors leave gaps"),
        (Damaged, _header(w=_entry(0, 4), v=_entry(5, 9)), "its tensors leave gaps"),
        (Damaged, _header(w=_entry(0, 4), v=_entry(2, 6)), "its tensors leave gaps"),
        (Damaged, _header(w=_entry(4, 8)), "its tensors leave gaps"),
        (Damaged, _header(w=_entry(0, 80, (20,))), "tensors leave gaps"),
        (Damaged, _header(w=_entry(0, 8)), "needs 4 bytes and has 8"),
        (Damaged, _header(w=_entry(-4, 0)), "data_offsets of integers"),
        (Damaged, _header(w=_entry(0, 8, (-1, -2))), "data_offsets of integers"),
        (Damaged, _header(w=_entry(0, 4, (True,))), "data_offsets of integers"),
        (Damaged, _header(w=_entry(0, 4, (1.0,))), "data_offsets of integers"),
        (Damaged, _header(w={"dtype": "F32"}), "data_offsets of integers"),
        (Damaged, _header(w=[1]), "data_offsets of integers"),
        (Damaged, _config("{"), "config.json' is damaged"),
        (Damaged, _config("[]"), "no JSON object"),
    ],
)
def test_a_directory_that_is_unknown_or_damaged_is_refused(
    tmp_path, error, spoil, match
):
    folder = build(tmp_path / "m", {"w": np.ones((2, 2), "f4")})
    spoil(folder)
    with pytest.raises(error, match=match):
        open_directory(folder)


def _remap(change):
    def spoil(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        _write(INDEX, index)(folder)

    return spoil


SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
OUTSIDE = "files of its own directory"


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda m: (m / SHARDS[0]).unlink(), f"'{SHARDS[0]}', and no such file"),
        (lambda m: save(m / SHARDS[1], dict.fromkeys("ab", normal(0, 2))), "'a' lie"),
        (lambda m: save(m / SHARDS[0], dict.fromkeys("ax", normal(0, 2))), "'x' lie"),
        (_remap(lambda files: files.update(c=files["a"])), "'c' lie in other files"),
        (_remap(lambda files: files.update(a=SHARDS[1], b=SHARDS[0])), "'a', 'b' lie"),
        (_remap(lambda files: files.update(z=files.pop("a"))), "'a', 'z' lie"),
        (_remap(lambda files: files.update(a="../x.safetensors")), OUTSIDE),
        (_remap(lambda files: files.update(a="/etc/x.safetensors")), OUTSIDE),
        (_remap(lambda files: files.update(a="..")), OUTSIDE),
        (_remap(lambda files: files.update(a="")), OUTSIDE),
        (_remap(lambda files: files.update(a=1)), OUTSIDE),
        (_write(INDEX, {}), OUTSIDE),
        (_write(INDEX, {"weight_map": {}}), OUTSIDE),
        (_write(INDEX, "{"), "holds no JSON"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_damaged(tmp_path, spoil, match):
    folder = build(tmp_path / "m", {"a": np.ones(2, "f4"), "b": np.ones(2, "f4")}, 2)
    spoil(folder)
    with pytest.raises(Damaged, match=match):
        open_directory(folder)


def test_an_index_may_list_the_only_file(tmp_path):
    folder = build(tmp_path / "m", {"w": np.ones(2, "f4")})
    index = {"metadata": {}, "weight_map": {"w": "model.safetensors"}}
    _write(INDEX, index)(folder)
    assert open_directory(folder).read("w").tolist() == [1, 1]


def test_a_directory_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    folder = build(tmp_path / "m", {"w": np.ones(2, "f4")}, **{"a.json": b"{}"})
    (folder / "1_Pooling").mkdir()
    scan = os.scandir

    def closed(path):
        if str(path).endswith("1_Pooling"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="1_Pooling"):
        open_directory(folder)


def test_a_header_or_index_too_long_to_be_one_is_not_read(tmp_path):
    folder = build(tmp_path / "m", {"w": np.ones(2, "f4")})
    with open(folder / "model.safetensors", "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)
    with pytest.raises(Damaged, match="does not fit"):
        open_directory(folder)
    os.truncate(folder / "config.json", 100_000_001)
    with pytest.raises(Damaged, match="longer than"):
        open_directory(folder)


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
kinds = st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.int64])


@given(st.dictionaries(st.text(max_size=6), st.tuples(kinds, shapes), max_size=5))
def test_any_file_of_the_library_is_read_as_the_library_reads_it(spec):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "x.safetensors"
        spec.pop("__metadata__", None)
        save(path, {k: normal(0, *s).astype(kind) for k, (kind, s) in spec.items()})
        tensors, metadata = read_header(path)
        expected = load(path)
        assert metadata == {"format": "pt"}
        assert tensors.keys() == expected.keys()
        for name, (code, shape, data) in expected.items():
            assert DTYPES[code] == tensors[name].dtype
            assert tensors[name].shape == shape
            assert view(path, tensors[name]).tobytes() == data


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_one_wrong_byte_in_a_header_never_reads_outside(where, byte):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "x.safetensors"
        save(path, {"a": normal(0, 3), "b": normal(1, 2, 2)})
        content = bytearray(path.read_bytes())
        content[where % (8 + int.from_bytes(content[:8], "little"))] = byte
        path.write_bytes(content)
        try:
            tensors, _ = read_header(path)
        except (Damaged, Unknown):
            return
        for info in tensors.values():
            assert view(path, info).nbytes == info.size
