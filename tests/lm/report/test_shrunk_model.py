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
    "sparsity": {"ffn": 0.5, "drop_layers": [1]},
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
            "distilled": {"perplexity": 41.2, "nats": 3.7184, "tokens": 3066},
        }
    },
    "speed": {
        "prompt": 256, "steps": 32, "batch": 1, "rounds": 5, "dtype": "bfloat16",
        "before": {"prefill": 2000.0, "decode": 100.0},
        "after": {"prefill": 3000.0, "decode": 125.0},
        "ratios": {
            "prefill": {
                **{"ratio": 1.5, "low": 1.4, "high": 1.6, "noise": 2.0},
                "distinguishable": False,
            },
            "decode": {
                **{"ratio": 1.25, "low": 1.15, "high": 1.35, "noise": 1.1},
                "distinguishable": True,
            },
        },
    },
    "distillation": {
        "steps": 2, "batch": 4, "learning_rate": 1e-4, "trained": "all",
        "losses": [1.5, 0.75],
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
        "40.0% of the parameters were removed (ffn 0.5, drop_layers 1): perplexity on "
        "a.txt went from 30.9 to 41.2, decoding is 1.25 times as fast (1.15 to 1.35 by "
        "round)."
    )
    noisy = {**RECORD["speed"]["ratios"]["decode"], "distinguishable": False}
    ratios = {**RECORD["speed"]["ratios"], "decode": noisy}
    noisy = {**RECORD, "speed": {**RECORD["speed"], "ratios": ratios}}
    assert shrunk_model.headline(noisy).endswith(
        "to 41.2, the speed of decoding is not distinguishable."
    )
    assert shrunk_model.headline(without("speed", "perplexity")) == (
        "40.0% of the parameters were removed (ffn 0.5, drop_layers 1)."
    )


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "Distilled from the model before for 2 steps of 4 sequences at 0.0001 ("),
        (
            {"relative": True, "teacher": "large"},
            "Distilled from large for 2 steps of 4 sequences at 0.0001 of each "
            "tensor's root mean square (",
        ),
    ],
)
def test_the_page_says_whom_the_model_followed_and_how_fast(facts, words):
    record = copy.deepcopy(RECORD)
    record["distillation"] |= facts
    assert words in shrunk_model.document(record)


def test_the_page_shows_everything_and_loads_nothing():
    page = Page(shrunk_model.document(json.loads(json.dumps(RECORD))))
    assert page.loads == []
    shown = (
        *("30.9", "95.5", "41.2", "3.7184", "600 of 1,000", "drop_layers 1"),
        *("2,000.0", "3,000.0", "1.50, not distinguishable", "1.40 to 1.60"),
        *("100.0", "125.0", "1.25", "1.15 to 1.35", "0.91 to 1.10", "bfloat16"),
        *("neurons that are kept, of 8 in each layer", "medians of 5 rounds"),
        *("Distilled from the model before for 2 steps", "1.5000", "0.7500"),
        *("jaxprune shrink a b --ffn 0.5", "1 x cpu", "0.10.2", "90.0 s", "3 GB"),
    )
    assert [words for words in shown if words not in page.text] == []


@pytest.mark.parametrize(
    ("missing", "heading"),
    [
        ("perplexity", "Perplexity"),
        ("speed", "Speed"),
        ("units", "Kept units by layer"),
        ("phases", "Time and memory"),
    ],
)
def test_what_was_not_measured_has_no_section(missing, heading):
    assert f"<h2>{heading}</h2>" in shrunk_model.document(RECORD)
    assert f"<h2>{heading}</h2>" not in shrunk_model.document(without(missing))


def test_the_page_shows_how_a_budget_was_divided():
    tried = [
        {"layers": 3, "heads": 1.0, "nats": 4.25},
        {"layers": 2, "heads": 1.0, "nats": None},
    ]
    asked = {"budget": 0.7, "measure": "flops", "search": True}
    page = shrunk_model.document({**RECORD, "sparsity": asked, "search": tried})
    for words in ("How the budget was divided", "4.2500", "out of reach"):
        assert words in page
    assert "budget 0.7, measure flops, search yes" in page


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
