"""A directory of progress holds whole segments of one job, or says that it does not."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.arrays.lazy import Leaves
from jaxprune.posttraining import fingerprint
from jaxprune.posttraining.progress import ProgressLog
from tests.support.small_models import draw
from tests.support.trajectories import same_bits

JOB = {"method": "wanda", "sparsity": 0.5, "removed": {"a": 3}, "pair": (1, 2)}
ARRAYS = {"blocks/0/w": draw(0, 1, 4, 3), "b": draw(1, 2, 2, 2)}
RECORD = [{"name": "blocks/0/w", "zeros": 3, "error": 0.25}]


@pytest.fixture
def log(tmp_path):
    """A log with segments 0 and 2."""
    own = ProgressLog(tmp_path / "deep" / "directory", JOB)
    own.write("segment_00000", ARRAYS, RECORD)
    own.write("segment_00002", {"c": ARRAYS["b"]}, [])
    return own


def files(log, segment):
    """What lies in the directory for a segment."""
    return sorted(p for p in log.directory.iterdir() if f"{segment:05d}" in p.name)


def test_a_segment_comes_back_as_it_was_written(log):
    arrays, record = log.read("segment_00000")
    assert record == RECORD
    assert set(arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert same_bits(arrays[name], array)
    assert log.read("segment_00001") is None
    assert log.read("segment_00002")[1] == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_dtype_keeps_its_bits(log, dtype):
    array = np.asarray(jnp.asarray(draw(3, 1, 5, 2), dtype))
    log.write("segment_00007", {"w": array}, {})
    assert same_bits(log.read("segment_00007")[0]["w"], array)


def test_a_transposed_array_comes_back_in_its_own_order(log):
    array = draw(3, 4, 5, 2).T
    log.write("segment_00007", {"w": array}, {})
    np.testing.assert_array_equal(log.read("segment_00007")[0]["w"], array)


def test_a_segment_without_weights_is_a_segment(log):
    log.write("segment_00005", {}, [])
    arrays, record = log.read("segment_00005")
    assert (dict(arrays), record) == ({}, [])


def test_a_segment_that_is_forgotten_leaves_no_file(log):
    log.forget("segment_00000")
    log.forget("segment_00001")
    assert log.read("segment_00000") is None
    assert files(log, 0) == []
    assert log.read("segment_00002") is not None


def test_the_same_job_goes_on_in_the_same_directory(log):
    again = ProgressLog(log.directory, JOB)
    assert again.read("segment_00000")[1] == RECORD


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sparsity": 0.6}, "sparsity"),
        ({"removed": {"a": 4}}, "removed"),
        ({"new": 1}, "new"),
        ({"method": "ria", "sparsity": 0.6}, r"method.*sparsity"),
    ],
)
def test_another_jobs_directory_is_refused_and_says_what_differs(log, change, named):
    with pytest.raises(ValueError, match=named) as caught:
        ProgressLog(log.directory, {**JOB, **change})
    assert str(log.directory) in str(caught.value)
    assert log.read("segment_00000")[1] == RECORD


def test_a_job_with_less_in_it_is_another_job(log):
    less = {k: v for k, v in JOB.items() if k != "pair"}
    with pytest.raises(ValueError, match="pair"):
        ProgressLog(log.directory, less)


@pytest.mark.parametrize("cut", [0, 1, 9, -1])
def test_a_file_that_was_cut_off_is_no_segment(log, cut):
    for path in files(log, 0):
        whole = path.read_bytes()
        path.write_bytes(whole[:cut])
        assert log.read("segment_00000") is None
        path.write_bytes(whole)
        assert log.read("segment_00000") is not None


def test_a_changed_byte_is_no_segment(log):
    path = next(p for p in files(log, 0) if p.suffix == ".safetensors")
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    assert log.read("segment_00000") is None


@pytest.mark.parametrize("index", [0, 1])
def test_a_missing_file_is_no_segment(log, index):
    files(log, 0)[index].unlink()
    assert log.read("segment_00000") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "3", '{"sha256": 1}', "\xff"])
def test_a_record_of_another_kind_is_no_segment(log, text):
    path = next(p for p in files(log, 0) if p.suffix == ".json")
    path.write_bytes(text.encode("latin-1"))
    assert log.read("segment_00000") is None


def test_a_record_without_its_rows_is_no_segment(log):
    path = next(p for p in files(log, 0) if p.suffix == ".json")
    body = json.loads(path.read_text())
    path.write_text(json.dumps({"sha256": body["sha256"]}))
    assert log.read("segment_00000") is None


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_damaged_job_file_is_refused_in_a_sentence(log, text):
    (path,) = (p for p in log.directory.iterdir() if p.name.startswith("job"))
    path.write_text(text)
    with pytest.raises(ValueError, match=r"job.json' is damaged"):
        ProgressLog(log.directory, JOB)


def test_a_segment_that_is_written_again_replaces_the_first(log):
    log.write("segment_00000", {"w": ARRAYS["b"]}, ["second"])
    arrays, record = log.read("segment_00000")
    assert record == ["second"]
    assert list(arrays) == ["w"]


def test_weights_of_one_write_and_the_record_of_another_are_no_segment(log):
    record = next(p for p in files(log, 0) if p.suffix == ".json")
    old = record.read_bytes()
    log.write("segment_00000", {"w": ARRAYS["b"]}, ["second"])
    record.write_bytes(old)
    assert log.read("segment_00000") is None


def test_nothing_half_written_is_left_behind(log):
    assert not [p for p in log.directory.iterdir() if "partial" in p.name]
    names = {p.suffix for p in log.directory.iterdir()}
    assert names == {".json", ".safetensors"}


@pytest.mark.parametrize(
    ("dtype", "step"),
    [("float64", 2.0**-50), ("float32", 2.0**-22), ("bfloat16", 2.0**-7)],
)
def test_leaves_that_differ_in_the_last_bits_have_other_marks(dtype, step):
    with jax.enable_x64(True):
        ones = jnp.ones((3, 4), dtype)
        leaves = Leaves([ones, ones.at[1, 2].add(step), ones.at[2, 1].add(step)])
        assert leaves.all[1][1, 2] != 1
        found = fingerprint.of_leaves({"a": 0, "b": 1, "c": 2}, leaves)
    assert len({own.mark for own in found.values()}) == 3
    assert all(own.finite for own in found.values())


def test_integers_and_complex_numbers_have_marks_too():
    numbers = jnp.asarray([2**24, 2**24 + 1], np.int32)
    turned = jnp.asarray([1 + 2j, 1 + 3j], np.complex64)
    leaves = Leaves([numbers[:1], numbers[1:], turned[:1], turned[1:]])
    found = fingerprint.of_leaves({str(i): i for i in range(4)}, leaves)
    assert len({own.mark for own in found.values()}) == 4


@pytest.mark.parametrize("factor", [-1.0, 2.0, 0.25, -4.0])
def test_a_leaf_that_was_scaled_has_another_mark(factor):
    own = jnp.asarray(draw(0, 64, 32))
    found = fingerprint.of_leaves({"a": 0, "b": 1}, Leaves([own, own * factor]))
    assert found["a"].mark != found["b"].mark
