"""Packed weights timed: every candidate is there, and zeros are fewer bytes."""

import json

import pytest

from benchmarks import packed


def _report(capsys, **changes):
    config = packed.Config(encodings=("bfloat16",), zeros=(0.8,), repeats=1, **changes)
    packed.main(config)
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


CANDIDATES = {"XLA float32", "XLA bfloat16", "bfloat16 dense", "bfloat16 80% zeros"}


@pytest.mark.full
def test_matrices_are_timed_beside_their_control(capsys):
    report = _report(capsys, what="matrices", shape=(64, 128), copies=1)
    assert set(report["milliseconds"]) >= CANDIDATES
    assert set(report["ratios"]["bfloat16 80% zeros"]) == {
        "bfloat16 dense",
        "XLA float32",
    }
    # 64 x 128 bits of the mask and a fifth of the values are under half of all values.
    sizes = report["bytes"]
    assert sizes["bfloat16 80% zeros"] < sizes["bfloat16 dense"] / 2


@pytest.mark.full
@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_counts_the_tokens_of_all_sequences(batch, capsys):
    report = _report(capsys, what="decode", model="gpt", layers=1, steps=2, batch=batch)
    assert set(report["tokens_per_second"]) == CANDIDATES
    for name, rate in report["tokens_per_second"].items():
        seconds = report["milliseconds"][name]["median"] / 1e3
        assert rate == pytest.approx(2 * batch / seconds)


def test_only_the_whole_gpt_is_trained():
    config = packed.Config(what="decode", model="smollm2", train=3)
    with pytest.raises(ValueError, match="--model gpt"):
        packed.main(config)
