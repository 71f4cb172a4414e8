"""The figure of quality against speed: rows of records, lines of rows."""

import csv
import json
import math

import pytest

pytest.importorskip("tyro")

from benchmarks import quality_speed
from benchmarks.quality_speed import FORMS, HELD_OUT, Config


def quality(bits, perplexity):
    text = {"bits_per_byte": bits, "perplexity": perplexity}
    # The command names a text as its file.
    return json.dumps({"texts": {f"{name}.txt": text for name in HELD_OUT}})


def test_a_row_has_the_quality_of_its_form_and_the_speed_of_its_encoding(tmp_path):
    model = tmp_path / "model"
    config = Config(model, tmp_path, forms=("dense", "50 % zeros"))
    half = tmp_path / "50_percent_zeros"
    (tmp_path / "quality_dense_xla.json").write_text(quality(1.0, 20.0))
    (tmp_path / "quality_50_percent_zeros_bfloat16.json").write_text(quality(1.5, 30.0))
    times = {
        str(model): {"decode": 10.0},
        f"{half}, packed": {
            "decode": 25.0,
            "ratios": {"decode": {"ratio": 2.5}},
        },
    }
    (tmp_path / "speed_all_bfloat16.json").write_text(json.dumps({"models": times}))
    quality_speed._write_table(tmp_path / "table.csv", quality_speed._rows(config))
    with (tmp_path / "table.csv").open(newline="") as file:
        dense, pruned = csv.DictReader(file)
    assert (dense["values"], dense["ratio"], dense["news"]) == (
        *("float32, XLA", "1.0"),
        "20.0",
    )
    assert (pruned["form"], pruned["removed"], pruned["share"]) == (
        *("50 % zeros", "zeros"),
        "0.5",
    )
    assert (pruned["bits_per_byte"], pruned["ratio"]) == ("1.5", "2.5")


def test_each_line_begins_at_the_model_of_which_nothing_went():
    row = {"bits_per_byte": 1.0, "ratio": 1.0, "values": "int8"}
    rows = [
        {**row, "removed": "", "share": 0.0},
        {**row, "removed": "zeros", "share": 0.6, "bits_per_byte": 3.0, "ratio": 3.0},
        {**row, "removed": "zeros", "share": 0.5, "bits_per_byte": 2.0, "ratio": 2.0},
        {**row, "removed": "neurons", "share": 0.5, "ratio": 1.5},
    ]
    (axes,) = quality_speed.draw(rows).axes
    lines = [line.get_xydata().tolist() for line in axes.lines]
    assert [line for line in lines if line] == [
        [[1, 1]],
        [[1, 1], [2, 2], [3, 3]],
        [[1, 1], [1.5, 1]],
    ]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["dense, int8", "50%", "60%", "50%"]


def test_a_form_is_named_as_what_is_removed():
    for name, form in FORMS.items():
        if form.removed == "zeros":
            assert name.startswith(f"{form.share:.0%}".replace("%", " %"))
            assert math.isclose(
                float(form.words[form.words.index("--sparsity") + 1]), form.share
            )
