import os

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.files import sink
from jaxprune.lm.checkpoints import compact_sizes, rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import Damaged, Unknown, open_directory
from tests.support.hf_directories import (
    BFLOAT16,
    build,
    contents,
    load,
    normal,
)
from tests.support.rewritten import HOW, Q, half
from tests.support.rewritten import source as source

UP = "model.layers.1.mlp.up_proj.weight"


def test_nothing_replaced_gives_every_file_byte_for_byte(tmp_path, source):
    paths = rewrite.write_directory(source, tmp_path / "out", {}, provenance=HOW)
    assert sorted(p.name for p in paths) == sorted(os.listdir(tmp_path / "out"))
    written = contents(tmp_path / "out")
    del written["jaxprune.json"]
    assert written == contents(tmp_path / "m")


def test_only_the_replaced_tensors_bytes_change(tmp_path, source):
    new = {Q: half(source.read(Q)), UP: lambda: half(source.read(UP))}
    rewrite.write_directory(source, tmp_path / "out", new, provenance=HOW)
    before, after = contents(tmp_path / "m"), contents(tmp_path / "out")
    for file in source.metadata:
        old, made = load(tmp_path / "m" / file), load(tmp_path / "out" / file)
        assert old.keys() == made.keys()
        for name, (code, shape, data) in old.items():
            wanted = half(source.read(name)).tobytes() if name in new else data
            assert made[name] == (code, shape, wanted)
        start = 8 + int.from_bytes(before[file][:8], "little")
        assert before[file][:start] == after[file][:start]
    for name in source.others:
        assert before[name] == after[name]


def test_files_of_sub_directories_that_belong_to_the_model_are_copied(tmp_path, source):
    pooling = source.path / "1_Pooling"
    pooling.mkdir()
    (pooling / "config.json").write_text('{"a": 1}')
    (pooling / "weights.bin").write_bytes(b"\0")
    again = open_directory(source.path)
    assert again.uncopied == ("1_Pooling/weights.bin",)
    rewrite.write_directory(again, tmp_path / "b", {}, provenance={})
    assert contents(tmp_path / "b" / "1_Pooling") == {"config.json": b'{"a": 1}'}
    assert (
        "1_Pooling/config.json"
        in rewrite.read_provenance(tmp_path / "b", verify=True)["files"]
    )
    rewrite.write_directory(again, tmp_path / "b", {}, provenance={}, overwrite=True)


def test_what_is_measured_at_the_end_is_part_of_what_appears(tmp_path, source):
    def finish(directory, record):
        assert not (tmp_path / "b").exists()
        found = open_directory(directory)
        assert found.tensors.keys() == source.tensors.keys()
        return {"seen": sorted(record["files"])}, {"page.html": b"<p>"}

    rewrite.write_directory(source, tmp_path / "b", {}, provenance={}, finish=finish)
    record = rewrite.read_provenance(tmp_path / "b", verify=True)
    assert record["seen"] == sorted(record["files"])
    assert (tmp_path / "b" / "page.html").read_bytes() == b"<p>"
    assert not list((tmp_path / "b").glob(".*"))


def test_zeros_of_tensors_that_were_not_pruned_do_not_count(tmp_path, source):
    names = [name for name, info in source.tensors.items() if info.shape][:2]
    new = {name: np.zeros(source.tensors[name].shape, "f4") for name in names}
    rewrite.write_directory(
        source, tmp_path / "b", new, uncounted=names[1:], provenance={}
    )
    record = rewrite.read_provenance(tmp_path / "b")
    assert list(record["tensors"]) == names[:1]
    assert not np.asarray(open_directory(tmp_path / "b").read(names[1])).any()


def test_values_are_cast_to_the_stored_dtype(tmp_path, source):
    exact = jnp.asarray(source.read(Q)).astype(jnp.float32) * 1.001
    rewrite.write_directory(source, tmp_path / "out", {Q: exact}, provenance=HOW)
    read = open_directory(tmp_path / "out").read(Q)
    np.testing.assert_array_equal(read, np.asarray(exact.astype(jnp.bfloat16)))


def test_a_transposed_view_is_written_in_its_own_order(tmp_path, source):
    new = half(source.read(Q))
    view = np.asfortranarray(new)
    assert not view.flags.c_contiguous
    rewrite.write_directory(source, tmp_path / "out", {Q: view}, provenance=HOW)
    np.testing.assert_array_equal(open_directory(tmp_path / "out").read(Q), new)


def test_chunks_of_any_size_give_the_same_bytes(tmp_path, source, monkeypatch):
    new = {Q: np.asfortranarray(half(source.read(Q))), UP: half(source.read(UP))}
    rewrite.write_directory(source, tmp_path / "a", new, provenance=HOW)
    monkeypatch.setattr(rewrite, "_CHUNK", 37)
    monkeypatch.setattr(sink, "_CHUNK", 41)
    rewrite.write_directory(source, tmp_path / "b", new, provenance=HOW)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_minus_zero_is_written_as_zero(tmp_path, source):
    new = np.where(half(source.read(Q)) == 0, -0.0, 1.0)
    rewrite.write_directory(source, tmp_path / "out", {Q: new}, provenance=HOW)
    read = open_directory(tmp_path / "out").read(Q)
    assert not np.signbit(read.astype(np.float32)).any()


def test_provenance_counts_what_was_written(tmp_path, source):
    new = {Q: half(source.read(Q)), UP: np.zeros(source.tensors[UP].shape)}
    told = {**HOW, "command": "jaxprune prune", "perplexity": {"before": 3.5}}
    rewrite.write_directory(source, tmp_path / "out", new, provenance=told)
    record = rewrite.read_provenance(tmp_path / "out", verify=True)
    assert record.items() >= told.items()
    assert record["tensors"] == {
        Q: {"zeros": 256, "size": 512},
        UP: {"zeros": 512, "size": 512},
    }
    assert record["achieved"] == 0.75
    assert set(record["files"]) == {*source.metadata, *source.others}


def test_a_file_changed_later_is_found_on_request(tmp_path, source):
    rewrite.write_directory(source, tmp_path / "out", {}, provenance=HOW)
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    rewrite.read_provenance(tmp_path / "out")
    with pytest.raises(Damaged, match=r"tokenizer.json' is damaged"):
        rewrite.read_provenance(tmp_path / "out", verify=True)
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(Damaged, match=r"tokenizer.json' is damaged"):
        rewrite.read_provenance(tmp_path / "out", verify=True)


def test_provenance_of_another_kind_is_told_from_damage(tmp_path, source):
    with pytest.raises(Unknown, match=r"has no jaxprune.json"):
        rewrite.read_provenance(tmp_path / "m")
    path = tmp_path / "m" / "jaxprune.json"
    path.write_text('{"format": "jaxprune.export", "version": 9}')
    with pytest.raises(Unknown, match="version 9"):
        rewrite.read_provenance(tmp_path / "m")
    path.write_text('{"format": "jaxprune.export", "version": 1}')
    with pytest.raises(Damaged, match="lists no tensors and files"):
        rewrite.read_provenance(tmp_path / "m")
    path.write_text("{")
    with pytest.raises(Damaged, match="no JSON"):
        rewrite.read_provenance(tmp_path / "m")


@pytest.mark.parametrize(
    ("new", "error", "match"),
    [
        ({"v": np.ones(2)}, ValueError, "'v' are not; it has"),
        ({Q: np.ones((16, 32))}, ValueError, r"of shape \(32, 16\), got .* \(16, 32\)"),
        ({Q: lambda: np.ones((16, 32))}, ValueError, "transpose replaced"),
        ({Q: np.ones((32, 16), int)}, TypeError, "is bfloat16 .* got int64"),
        ({Q: np.full((32, 16), np.nan)}, ValueError, "'.*q_proj.weight' holds NaN"),
        ({Q: np.full((32, 16), np.inf)}, ValueError, "holds NaN or inf"),
        ({Q: np.full((32, 16), 1e300)}, ValueError, "infinity as bfloat16"),
    ],
)
def test_values_that_do_not_fit_are_refused_and_leave_nothing(
    tmp_path, source, new, error, match
):
    with pytest.raises(error, match=match):
        rewrite.write_directory(source, tmp_path / "out", new, provenance=HOW)
    assert os.listdir(tmp_path) == ["m"]


def test_provenance_must_be_json(tmp_path, source):
    for wrong, error in ((float("nan"), ValueError), (object(), TypeError)):
        with pytest.raises(error, match="JSON"):
            rewrite.write_directory(
                source, tmp_path / "out", {}, provenance={"method": wrong}
            )


@pytest.mark.parametrize("out", ["m", "m/inside", ".", "link"])
def test_a_result_inside_its_source_or_around_it_is_refused(tmp_path, source, out):
    (tmp_path / "link").symlink_to("m")
    with pytest.raises(ValueError, match="must lie apart"):
        rewrite.write_directory(
            source, tmp_path / out, {}, provenance=HOW, overwrite=True
        )


def test_what_is_not_an_earlier_result_is_never_replaced(tmp_path, source):
    out = tmp_path / "out"
    out.mkdir()
    rewrite.write_directory(source, out, {}, provenance=HOW)
    with pytest.raises(ValueError, match="there is something already"):
        rewrite.write_directory(source, out, {}, provenance=HOW)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"also holds 'notes.txt'"):
        rewrite.write_directory(source, out, {}, provenance=HOW, overwrite=True)
    (out / "jaxprune.json").unlink()
    with pytest.raises(ValueError, match=r"no jaxprune.json of an earlier result"):
        rewrite.write_directory(source, out, {}, provenance=HOW, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_an_earlier_result_is_replaced_once_the_new_one_is_whole(tmp_path, source):
    out = tmp_path / "out"
    rewrite.write_directory(source, out, {}, provenance=HOW)
    before = contents(out)
    new = {Q: np.full((32, 16), np.nan)}
    with pytest.raises(ValueError, match="finite"):
        rewrite.write_directory(source, out, new, provenance=HOW, overwrite=True)
    assert contents(out) == before
    new = {Q: half(source.read(Q))}
    rewrite.write_directory(source, out, new, provenance=HOW, overwrite=True)
    assert rewrite.read_provenance(out, verify=True)["achieved"] == 0.5
    assert sorted(os.listdir(tmp_path)) == ["m", "out"]


def test_progress_reaches_the_end(tmp_path, source):
    seen = []
    rewrite.write_directory(
        source, tmp_path / "out", {}, provenance=HOW, progress=lambda *a: seen.append(a)
    )
    total = sum(info.size for info in source.tensors.values())
    assert [name for name, _, _ in seen] == list(source.tensors)
    assert seen[-1][1:] == (total, total)


def test_sizes_count_zeros_and_the_compact_file(tmp_path):
    weight = np.array([0.0, -0.0, 1.0, 0.0] * 8, BFLOAT16)
    ones = np.ones_like(weight)
    source = open_directory(build(tmp_path / "m", {"a": weight, "b": ones}))
    sizes = compact_sizes.directory_sizes(source)
    assert (sizes.zeros, sizes.size, sizes.dense_bytes) == (24, 64, 128)
    assert sizes.by_tensor == {"a": (24, 32), "b": (0, 32)}
    # 32 bits of mask, and 16 weights that are not +0; b is dense.
    assert sizes.compact_bytes == 4 + 16 * 2 + 64


@pytest.mark.parity
def test_transformers_loads_the_result_with_the_same_logits(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    source = open_directory(tmp_path / "m")
    assert source.indexed
    chosen = [name for name in source.tensors if "_proj" in name]
    new = {name: half(source.read(name)) for name in chosen}
    rewrite.write_directory(source, tmp_path / "out", new, provenance=HOW)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in new:
                weight.copy_(torch.from_numpy(new[name]))
        tokens = torch.arange(16)[None]
        wanted = model(tokens).logits
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert torch.equal(loaded(tokens).logits, wanted)


def test_a_pruned_directory_is_pruned_again(tmp_path, source):
    rewrite.write_directory(
        source, tmp_path / "a", {Q: half(source.read(Q))}, provenance=HOW
    )
    again = open_directory(tmp_path / "a")
    assert "jaxprune.json" in again.others
    new = {UP: normal(0, 32, 16)}
    rewrite.write_directory(again, tmp_path / "b", new, provenance={"method": "other"})
    record = rewrite.read_provenance(tmp_path / "b", verify=True)
    assert (record["method"], list(record["tensors"])) == ("other", [UP])
