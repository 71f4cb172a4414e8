"""A directory with tensors of other shapes: what is in it, and that it is whole."""

import json

import ml_dtypes
import numpy as np
import pytest

from jaxprune.lm.checkpoints import new_weights, rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.checkpoints.new_weights import NewTensor
from tests.support import hf_directories

TENSORS = {
    "a": np.arange(6, dtype="f4").reshape(2, 3),
    "b": np.ones((4,), ml_dtypes.bfloat16),
    "c": np.full((3, 2), 2.0, "f2"),
}


@pytest.fixture
def source(tmp_path):
    return open_directory(hf_directories.build(tmp_path / "whole", TENSORS, 2))


def smaller(source, **others):
    """The first row of each tensor, in the file where it was."""
    found = {}
    for name, array in (TENSORS | others).items():
        row = array[:1]
        file = source.tensors[name if name in source.tensors else "a"].file
        found[name] = NewTensor(file, row.dtype, row.shape, row.copy)
    return found


def write(source, place, tensors, **options):
    config = {"model_type": "llama", "width": 1}
    return new_weights.write_new_weights(
        source, place, config, tensors, provenance={"method": "hand"}, **options
    )


def test_the_tensors_are_those_given_and_all_else_is_copied(source, tmp_path):
    paths = write(source, tmp_path / "small", smaller(source))
    again = open_directory(tmp_path / "small")
    assert set(again.tensors) == set(TENSORS)
    for name, array in TENSORS.items():
        found = again.read(name)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array[:1])
        assert again.tensors[name].file == source.tensors[name].file
    assert again.config == {"model_type": "llama", "width": 1}
    index = json.loads((tmp_path / "small" / hf_directories.INDEX).read_text())
    assert index["metadata"]["total_size"] == 3 * 4 + 2 + 2 * 2
    for name in ("tokenizer.json", "generation_config.json"):
        before, after = source.path / name, tmp_path / "small" / name
        assert after.read_bytes() == before.read_bytes()
    assert {path.name for path in paths} == {
        path.name for path in (tmp_path / "small").iterdir()
    }
    record = rewrite.read_provenance(tmp_path / "small", verify=True)
    assert record["method"] == "hand"


def test_what_is_measured_at_the_end_is_part_of_what_appears(source, tmp_path):
    def finish(directory, record):
        assert not (tmp_path / "small").exists()
        assert open_directory(directory).tensors.keys() == TENSORS.keys()
        return {"seen": sorted(record["files"])}, {"page.html": b"<p>"}

    write(source, tmp_path / "small", smaller(source), finish=finish)
    record = rewrite.read_provenance(tmp_path / "small", verify=True)
    assert record["seen"] == sorted(record["files"])
    assert (tmp_path / "small" / "page.html").read_bytes() == b"<p>"


def test_the_safetensors_library_reads_it(source, tmp_path):
    write(source, tmp_path / "small", smaller(source))
    for file in source.metadata:
        for name, (_, shape, data) in hf_directories.load(
            tmp_path / "small" / file
        ).items():
            assert shape == TENSORS[name][:1].shape
            assert data == TENSORS[name][:1].tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_and_nothing_is_left(bad, source, tmp_path):
    tensors = smaller(source, d=np.full((2,), bad, "f4"))
    with pytest.raises(ValueError, match="'d' holds NaN or infinity"):
        write(source, tmp_path / "small", tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_another_shape_than_announced_is_refused(source, tmp_path):
    tensors = smaller(source)
    tensors["a"] = tensors["a"]._replace(shape=(2, 2))
    with pytest.raises(ValueError, match=r"size 3 into shape \(2,2\)"):
        write(source, tmp_path / "small", tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_only_an_earlier_result_is_replaced(source, tmp_path):
    place = tmp_path / "small"
    write(source, place, smaller(source))
    with pytest.raises(ValueError, match="must not destroy"):
        write(source, place, smaller(source))
    tensors = smaller(source)
    del tensors["b"]
    write(source, place, tensors, overwrite=True)
    assert set(open_directory(place).tensors) == {"a", "c"}
    (place / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"also holds 'mine\.txt'"):
        write(source, place, smaller(source), overwrite=True)


def test_a_place_inside_the_source_is_refused(source):
    with pytest.raises(ValueError, match="apart from its source"):
        write(source, source.path / "small", smaller(source))
