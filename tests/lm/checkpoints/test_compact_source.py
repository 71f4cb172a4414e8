"""A compact file is opened as the directory that it was made of."""

import numpy as np
import pytest

from jaxprune.lm.checkpoints import compact
from jaxprune.lm.checkpoints.checkpoint_dir import Damaged, open_directory
from jaxprune.lm.checkpoints.compact_source import open_source
from jaxprune.lm.models import hf
from jaxprune.lm.models.hf import parameters
from tests.support import tiny_cli
from tests.support.zeroed import write_zeros

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tiny_cli.model(folder / "model", "bfloat16")
    write_zeros(folder / "model", 0.6)
    compact.compact(open_directory(folder / "model"), folder / "file")
    return folder / "file"


def test_its_tensors_and_small_files_are_the_directorys(file):
    directory = open_directory(file.parent / "model")
    with open_source(file) as source:
        assert source.config == directory.config
        assert list(source.tensors) == list(directory.tensors)
        assert source.others == directory.others
        for name in directory.tensors:
            tensor, expected = source.read(name), directory.read(name)
            assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
            np.testing.assert_array_equal(
                tensor.view(np.uint16), expected.view(np.uint16)
            )
        for name in directory.others:
            content = (source.path / name).read_bytes()
            assert content == (directory.path / name).read_bytes()
        scratch = source.path
    assert not scratch.exists()


def test_a_tensor_is_decoded_once_however_many_blocks_it_has(file, monkeypatch):
    decoded = []
    read = compact.Archive.read

    def noted(archive, name):
        decoded.append(name)
        return read(archive, name)

    monkeypatch.setattr(compact.Archive, "read", noted)
    monkeypatch.setattr(parameters, "_BLOCK", 64)  # weights
    with open_source(file) as source:
        hf.load(source)
    assert decoded
    assert len(decoded) == len({*decoded})


def test_a_directory_is_opened_as_it_is(file):
    with open_source(file.parent / "model") as source:
        assert source == open_directory(file.parent / "model")


def test_a_tensor_or_small_file_that_changed_is_refused(file, tmp_path):
    content = file.read_bytes()
    for text in (b'"model_type": "llama"', content[-64:]):
        damaged = bytearray(content)
        damaged[content.rindex(text) + len(text) - 3] ^= 1
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(Damaged, match=r"in it is not what went in|has .* bits"):
            read_all(tmp_path / "damaged")


def read_all(path):
    with open_source(path) as source:
        for name in source.tensors:
            source.read(name)


def test_a_refusal_names_the_file_and_not_the_scratch_directory(file):
    with pytest.raises(ValueError, match=f"^'{file}' is unknown$"):  # noqa: SIM117
        with open_source(file) as source:
            raise ValueError(f"'{source.path}' is unknown")
