import copy
import json

import numpy as np
import pytest

from jaxprune.lm.report import shrunk_model
from tests.lm.report.test_pruned_model import Page

BEFORE = {
    "parameters": 1000, "bytes": 4000, "layers": 3, "heads": 4, "kv_heads": 2,
    "mlp_width": 8,
}  # fmt: skip
AFTER = BEFORE | {"parameters": 600, "bytes": 2400, "layers": 2, "mlp_width": 4}
NAMES = [f"layers/{i}/mlp/down/kernel:0" for i in range(2)]
RECORD = {
    "method": "shrink by obs",
    "sparsity": {"ffn": 0.5, "layers": [0, 2]},
    "achieved": 0.4,
    "sizes": {"before": BEFORE, "after": AFTER},
    "layers": {"kept": [0, 2]},
    "units": {
        "groups": {name: {"before": 8, "after": 4} for name in NAMES},
        "kept": {NAMES[0]: [0, 1, 2, 7], NAMES[1]: [4, 5, 6, 7]},
        "roles": dict.fromkeys(NAMES, "ffn"),
    },
    "perplexity": {
        "a.txt": {
            "role": "held out from calibration",
            "by_frequency": 600.0,
            "context": 256,
            "stride": 255,
            "dense": {"perplexity": 30.9, "nats": 3.4308, "tokens": 3066},
            "shrunk": {"perplexity": 95.5, "nats": 4.5591, "tokens": 3066},
        }
    },
    "phases": [{"name": "shrink", "seconds": 90.0, "peak_memory_bytes": 3 * 10**9}],
    "seconds": 90.0,
    "command": "jaxprune shrink a b --ffn 0.5",
    "versions": {"jax": "0.10.2"},
    "device": "1 x cpu",
}  # fmt: skip


def without(*names):
    return {k: v for k, v in copy.deepcopy(RECORD).items() if k not in names}


def test_the_headline_says_what_it_cost_and_what_it_gave():
    assert shrunk_model.headline(RECORD) == (
        "40.0% of the parameters were removed (ffn 0.5, layers 0 2): perplexity on "
        "a.txt went from 30.9 to 95.5."
    )
    assert shrunk_model.headline(without("perplexity")) == (
        "40.0% of the parameters were removed (ffn 0.5, layers 0 2)."
    )


def test_the_page_shows_everything_and_loads_nothing():
    page = Page(shrunk_model.document(json.loads(json.dumps(RECORD))))
    assert page.loads == []
    shown = (
        *("30.9", "95.5", "4.5591", "600 of 1,000", "layers 0 2"),
        "neurons that are kept, of 8 in each layer",
        *("jaxprune shrink a b --ffn 0.5", "1 x cpu", "0.10.2", "90.0 s", "3 GB"),
    )
    assert [words for words in shown if words not in page.text] == []


@pytest.mark.parametrize(
    ("missing", "heading"),
    [
        ("perplexity", "Perplexity"),
        ("units", "Kept units by layer"),
        ("phases", "Time and memory"),
    ],
)
def test_what_was_not_measured_has_no_section(missing, heading):
    assert f"<h2>{heading}</h2>" in shrunk_model.document(RECORD)
    assert f"<h2>{heading}</h2>" not in shrunk_model.document(without(missing))


def test_the_page_shows_which_layers_a_search_left_out():
    sizes = {"before": {**BEFORE, "layers": 4}, "after": AFTER}
    layers = {"kept": [0, 2], "dropped": [3, 1], "nats": [0.2345, 0.6789]}
    record = {**RECORD, "sizes": sizes, "layers": layers}
    page = Page(shrunk_model.document(record)).text
    assert "Layers that were left out" in page
    assert page.index("0.2345") < page.index("0.6789")
    assert "Layers that were left out" not in shrunk_model.document(RECORD)


def test_each_place_is_as_dark_as_the_share_of_units_that_is_kept():
    kept = {0: [0, 1, 2, 7], 2: range(100, 200)}
    figure = shrunk_model.kept_units(kept, {0: 256, 2: 256}, 3, "neurons")
    (axes,) = figure.axes
    (mesh,) = axes.collections
    grid = np.ma.filled(mesh.get_array(), np.nan).reshape(3, 64)  # four units a place
    expected = np.zeros((3, 64))
    expected[0, :2] = 3 / 4, 1 / 4
    expected[2, 25:50] = 1
    expected[1] = np.nan
    np.testing.assert_array_equal(grid, expected)
    assert len(axes.patches) == 1  # the layer that was removed


def test_layers_that_had_different_sizes_are_shown_by_their_own():
    groups = {NAMES[0]: {"before": 8, "after": 4}, NAMES[1]: {"before": 4, "after": 2}}
    kept = {NAMES[0]: [4, 5, 6, 7], NAMES[1]: [0, 3]}
    units = {**RECORD["units"], "groups": groups, "kept": kept}
    page = Page(shrunk_model.document({**RECORD, "units": units}))
    assert "neurons that are kept, of at most 8 in each layer" in page.text


def test_a_layer_without_such_units_is_not_shown_as_removed():
    units = RECORD["units"]
    alone = {"groups": {NAMES[0]: units["groups"][NAMES[0]]}}
    alone |= {"kept": {NAMES[0]: [0]}, "roles": {NAMES[0]: "ffn"}}
    figures = shrunk_model._kept({**RECORD, "units": alone})
    assert len(figures["ffn"].axes[0].patches) == 1  # layer 1, which went
