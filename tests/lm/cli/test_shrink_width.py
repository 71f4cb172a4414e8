"""`jaxprune shrink --hidden`: a narrower residual stream, alone and with what else."""

import numpy as np
import pytest

from tests.support import tiny_cli, tiny_hf
from tests.support.tiny_cli import config_of, place, shrink

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

__all__ = ["place"]

SHORT = ("--length", 16, "--context", 16, "--sequences", 8, "--any-perplexity")


def narrowed(capsys, place, out, *words, model="model"):
    calibrated = ("--calibration", place / "rows.npy", *SHORT, *words)
    return shrink(capsys, place / model, place / out, *calibrated)


@pytest.mark.full
def test_channels_go_and_the_directory_says_so(place, capsys):
    code, record, _ = narrowed(capsys, place, "alone", "--hidden", 0.25)
    assert code == 0
    config = config_of(place / "alone")
    assert (config["hidden_size"], config["head_dim"]) == (24, 8)
    assert record["method"] == "shrink by principal components"
    assert record["sizes"]["after"]["width"] == len(record["channels"]["kept"]) == 24
    assert "channels of the residual stream" in (
        place / "alone" / "report.html"
    ).read_text("utf-8")


@pytest.mark.full
def test_channels_go_with_neurons_heads_and_a_distillation(place, capsys):
    words = ("--hidden", 0.25, "--ffn", 0.5, "--heads", 0.5, "--recover-steps", 2)
    code, record, _ = narrowed(capsys, place, "both", *words)
    assert code == 0
    config = config_of(place / "both")
    assert (config["hidden_size"], config["intermediate_size"]) == (24, 24)
    assert config["num_attention_heads"] == 2
    assert len(record["distillation"]["losses"]) == 2


@pytest.mark.full
@pytest.mark.parametrize("search", [(), ("--search",)])
def test_a_budget_counts_what_the_channels_took(search, place, capsys):
    words = ("--hidden", 0.125, "--budget", 0.7, *search)
    code, record, _ = narrowed(capsys, place, f"budget{len(search)}", *words)
    assert code == 0
    assert record["sizes"]["after"]["width"] == 28
    assert 0.6 < 1 - record["achieved"] <= 0.7


@pytest.mark.full
def test_the_width_suits_the_multiple_and_the_query_heads_that_stay(place, capsys):
    code, record, _ = narrowed(
        capsys, place, "plan", "--hidden", 0.3, "--multiple", 3, "--plan"
    )
    assert code == 0
    # 22.4 channels would stay; multiples of 3 and of four heads are 12 and 24.
    assert record["plan"]["channels"] == [32, 24]


@pytest.mark.full
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--hidden", 1), "--hidden must be a share in [0, 1), got 1"),
        (("--hidden", 0.001), "--hidden 0.001 of 32 channels is less than one of them"),
        (("--hidden", 0.99), "--hidden 0.99 would remove all 32 channels"),
        (
            ("--hidden", 0.1, "--multiple", 32),
            "leaves all 32 channels, since the nearest number that is a multiple of 32",
        ),
        (
            ("--hidden", 0.2, "--budget", 0.9, "--measure", "milliseconds"),
            "what tokens, channels, layers and experts take of a budget is counted",
        ),
    ],
)
def test_what_cannot_go_is_refused_before_anything_is_written(
    words, sentence, place, capsys
):
    code, _, err = narrowed(capsys, place, "refused", *words)
    assert code == 1
    assert sentence in err
    assert not (place / "refused").exists()


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("starcoder2", "subtract the mean of all channels too (LayerNorm); remove neu"),
        ("olmo2", "has its norms behind them; give --ffn or --layers"),
        ("olmoe", "it would change head_dim"),
    ],
)
def test_families_that_need_all_channels_are_refused(
    family, sentence, place, tmp_path, capsys
):
    tiny_hf.random_folder(family, tmp_path / "model", layers=1)
    words = ("--calibration", place / "rows.npy", *SHORT, "--hidden", 0.25)
    code, _, err = shrink(capsys, tmp_path / "model", tmp_path / "out", *words)
    assert code == 1
    assert sentence in err


def test_channels_are_chosen_by_a_text(place, capsys):
    words = (place / "model", place / "without", "--hidden", 0.25)
    code, _, err = shrink(capsys, *words)
    assert code == 1
    assert "--hidden needs --calibration FILE..., by which the channels are cho" in err


def test_states_of_two_widths_are_not_compared(place, capsys):
    recovery = ("--recover-steps", 1, "--recover-hidden", 1)
    code, _, err = narrowed(capsys, place, "two", "--hidden", 0.25, *recovery)
    assert code == 1
    assert "--hidden removes some of one; leave one out" in err


@pytest.mark.full
def test_the_same_command_gives_the_same_bits(place, capsys):
    for out in ("first", "second"):
        assert narrowed(capsys, place, out, "--hidden", 0.25)[0] == 0
    first, second = (tiny_cli.weights(place / out) for out in ("first", "second"))
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name])
