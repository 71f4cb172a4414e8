"""The page of a model that was trained on after weights went."""

import json

from jaxprune.lm.report import recovered_model
from jaxprune.lm.report.any_page import page_of
from tests.lm.report.test_pruned_model import Page

TEXT = {
    "role": "held out from calibration",
    "by_frequency": 600.0,
    "context": 256,
    "stride": 255,
    "before": {"perplexity": 95.5, "nats": 4.5591, "tokens": 3066},
    "recovered": {"perplexity": 41.2, "nats": 3.7184, "tokens": 3066},
}
RECORD = {
    "step": "recover",
    "method": "distillation",
    "perplexity": {"a<b>.txt": TEXT},
    "training": {
        "steps": 3,
        "batch": 4,
        "learning_rate": 1e-4,
        "relative": True,
        "trained": "all",
        "teacher": "large",
        "text_share": 0.25,
        "losses": [1.5, 1.0, 0.75],
    },
    "calibration": {
        **{"files": [], "self": 8, "sequences": 8, "length": 16, "seed": 0},
        "bos": "no BOS",
    },
    "sizes": {"zeros": 500, "size": 800, "parameters": 1000},
    "phases": [{"name": "recover", "seconds": 90.0, "peak_memory_bytes": 3 * 10**9}],
    "seconds": 90.0,
    "command": "jaxprune recover a b --teacher large",
    "versions": {"jax": "0.10.2"},
    "device": "1 x cpu",
}


def test_the_page_says_who_was_followed_and_what_came_back():
    page = Page(page_of(json.loads(json.dumps(RECORD))))
    assert page.loads == []
    shown = (
        "3 steps of training after large: perplexity on a<b>.txt went from 95.5",
        "0.0001 of each tensor's root mean square",
        *("95.5", "41.2", "4.5591", "3,066", "0.25"),
        *("500 of 1,000 parameters", "1 x cpu", "3 GB"),
    )
    assert [words for words in shown if words not in page.text] == []


def test_a_training_on_texts_has_no_teacher():
    training = {**RECORD["training"], "teacher": None}
    headline = recovered_model.headline({**RECORD, "training": training})
    assert headline.startswith("3 steps of training on texts: ")
