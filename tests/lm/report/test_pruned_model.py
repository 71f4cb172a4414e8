import copy
import html.parser
import json

import pytest

from jaxprune.lm.report import page, pruned_model

KINDS = ("self_attn.q_proj", "mlp.down_proj")
NAMES = [f"model.layers.{i}.{kind}.weight" for i in range(3) for kind in KINDS]
RECORD = {
    "method": "wanda",
    "settings": "inputs left",
    "pattern": "per-output",
    "sparsity": 0.5,
    "allocation": "owl",
    "achieved": 0.5,
    "tensors": {name: {"zeros": 8 + i, "size": 20} for i, name in enumerate(NAMES)},
    "sizes": {
        **{"dense_bytes": 4000, "compact_bytes": 2300, "zeros": 60, "size": 120},
        "parameters": 160,
    },
    "weights": [
        {
            "name": name,
            "shape": [1, 4, 5],
            "zeros": 10,
            "size": 20,
            "error": 0.01 * 3**i,
            "damping": 0.01 * (i % 2),
            "seconds": 0.25,
        }
        for i, name in enumerate(NAMES)
    ],
    "perplexity": {
        "a<b>.txt": {
            "role": "held out from calibration",
            "by_frequency": 600.0,
            "context": 512,
            "stride": 511,
            "dense": {"perplexity": 30.9, "nats": 3.4308, "tokens": 3066},
            "pruned": {"perplexity": 48.8, "nats": 3.8878, "tokens": 3066},
        }
    },
    "calibration": {
        "files": [{"name": "a<b>.txt", "sha256": "ab" * 32, "sequences": 32}],
        "sequences": 32,
        "length": 512,
        "seed": 7,
        "bos": "BOS (2), as the folder says",
    },
    "phases": [{"name": "prune", "seconds": 90.0, "peak_memory_bytes": 3 * 10**9}],
    "seconds": 90.0,
    "peak_memory_bytes": 3 * 10**9,
    "command": "jaxprune prune a b --method wanda",
    "versions": {"jax": "0.10.2"},
    "device": "1 x cpu",
}


class Page(html.parser.HTMLParser):
    """The page's text, and what it would load."""

    def __init__(self, source):
        super().__init__()
        self.words, self.loads, self.hidden = [], [], 0
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.hidden += tag == "style"
        found = dict(attributes)
        links = [found.get("src"), found.get("href"), found.get("xlink:href")]
        self.loads += [link for link in links if link and not link.startswith("#")]
        self.loads += [tag] if tag in ("script", "link", "iframe") else []

    def handle_endtag(self, tag):
        self.hidden -= tag == "style"

    def handle_data(self, data):
        self.words += [] if self.hidden else [data]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def without(*names):
    return {k: v for k, v in copy.deepcopy(RECORD).items() if k not in names}


def test_the_headline_says_what_it_cost():
    assert pruned_model.headline(RECORD) == (
        "50.0% of the weights of 6 matrices, 37.5% of the model, were pruned by "
        "wanda: perplexity on a<b>.txt went from 30.9 to 48.8."
    )
    assert pruned_model.headline(without("perplexity")) == (
        "50.0% of the weights of 6 matrices, 37.5% of the model, were pruned by wanda."
    )


@pytest.mark.parametrize(
    ("guessed", "words"),
    [
        (21.5, "to 48.8, both worse than guessing by frequency (21.5)."),
        (40.0, "to 48.8, the latter worse than guessing by frequency (40)."),
        (600.0, "to 48.8."),
    ],
)
def test_the_headline_says_of_a_model_that_it_knows_less_than_the_frequencies(
    guessed, words
):
    record = copy.deepcopy(RECORD)
    record["perplexity"]["a<b>.txt"]["by_frequency"] = guessed
    assert pruned_model.headline(record).endswith(words)


def test_seconds_that_hold_compiling_say_so():
    text = Page(pruned_model.document(RECORD)).text
    assert "Times include compiling" in text.partition("Error by layer")[2]


def test_tables_that_scroll_show_a_shade_at_their_ends():
    page = pruned_model.document(RECORD)
    rule = page.partition(".scroll,.wide{")[2].partition("}")[0]
    assert rule.count("var(--shade)") == 2  # one for each side
    assert rule.count("local") == 2  # what hides them at the ends


def test_the_settings_stand_before_the_first_heading():
    first = Page(pruned_model.document(RECORD).partition("<h2>")[0]).text
    shown = ("wanda", "inputs left", "per-output", "50.00%", "owl", "a<b>.txt 32")
    assert [words for words in shown if words not in first] == []
    bare = Page(pruned_model.document(without("settings", "calibration"))).text
    assert "settings" not in bare
    assert "None" not in bare


def test_the_page_shows_everything_and_loads_nothing():
    page = Page(pruned_model.document(RECORD))
    assert page.loads == []
    shown = (
        *("30.9", "48.8", "3.8878", "600", "3,066", "512", "511"),
        *("held out from calibration", "BOS (2), as the folder says", "seed 7"),
        *("4 kB", "2.3 kB", "57.5%", "3 GB", "90.0 s", "1 x cpu", "0.10.2"),
        *("jaxprune prune a b --method wanda",),
        *("self_attn.q_proj", "mlp.down_proj", "2.43", "a<b>.txt"),
    )
    assert [words for words in shown if words not in page.text] == []


def test_what_no_calibration_sample_reached_is_named():
    record = copy.deepcopy(RECORD)
    assert "no calibration sample" not in Page(pruned_model.document(record)).text
    record["weights"][0] |= {"by_magnitude": [1, 3], "shape": [4, 8, 8]}
    record["weights"][2] |= {"by_magnitude": [0], "shape": [1, 8, 8]}
    text = Page(pruned_model.document(record)).text
    assert f"their input: {NAMES[0]} (1, 3 of 4); {NAMES[2]}." in text


def test_the_largest_errors_come_first():
    text = Page(pruned_model.document(RECORD)).text
    table = text[text.index("The 6 largest errors") :]
    places = [table.index(name) for name in reversed(NAMES)]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("missing", "heading"),
    [
        ("perplexity", "Perplexity"),
        ("weights", "Error by layer"),
        ("phases", "Time and memory"),
    ],
)
def test_what_was_not_measured_has_no_section(missing, heading):
    assert f"<h2>{heading}</h2>" in pruned_model.document(RECORD)
    assert f"<h2>{heading}</h2>" not in pruned_model.document(without(missing))


def test_a_model_without_layers_has_tables_only():
    record = copy.deepcopy(RECORD)
    record["tensors"] = {"up.weight": {"zeros": 1, "size": 2}}
    record["weights"] = [{**record["weights"][0], "name": "up.weight"}]
    page = pruned_model.document(record)
    assert "<svg" not in page
    assert "up.weight" in page


def test_a_perplexity_that_is_not_finite_says_so():
    record = copy.deepcopy(RECORD)
    last = {"perplexity": None, "nats": None, "tokens": 3066}
    record["perplexity"]["a<b>.txt"]["pruned"] = last
    assert "went from 30.9 to not finite" in Page(pruned_model.document(record)).text


def test_each_matrix_has_its_place_and_number():
    shares = {name: i / 10 for i, name in enumerate(NAMES)}
    figure = pruned_model.layers(shares, logarithmic=False, title="zeros")
    (axes,) = figure.axes
    shown = {
        (round(text.get_position()[0] - 0.5), round(text.get_position()[1] - 0.52)):
        text.get_text()
        for text in axes.texts
    }  # fmt: skip
    assert [label.get_text() for label in axes.get_yticklabels()] == list(KINDS)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]
    assert shown == {(i // 2, i % 2): str(10 * i) for i in range(6)}


def test_an_encoder_and_a_decoder_have_rows_of_their_own():
    names = [f"{side}.block.{i}.wq.weight" for side in "ab" for i in range(2)]
    shares = {name: i / 10 for i, name in enumerate(names)}
    figure = pruned_model.layers(shares, logarithmic=False, title="zeros")
    (axes,) = figure.axes
    kinds = [label.get_text() for label in axes.get_yticklabels()]
    assert kinds == ["a.block.wq", "b.block.wq"]
    assert [text.get_text() for text in axes.texts] == ["0", "10", "20", "30"]


def test_deep_models_fit_and_names_of_every_family_are_understood():
    deep = {f"transformer.h.{i}.mlp.c_fc.weight": 0.001 * i for i in range(80)}
    figure = pruned_model.layers(deep, logarithmic=True, title="error")
    (axes,) = figure.axes
    assert axes.get_yticklabels()[0].get_text() == "mlp.c_fc"
    assert not axes.texts
    assert figure.get_figwidth() < 20


def test_the_page_is_made_from_the_json_that_was_written():
    again = json.loads(json.dumps(RECORD))
    assert pruned_model.document(again) == pruned_model.document(RECORD)


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (999, "999 B"),
        (999.6, "1 kB"),
        (999_700, "1 MB"),
        (1.234e7, "12.3 MB"),
        (999.6e9, "1,000 GB"),
        (1.234e12, "1,234 GB"),
    ],
)
def test_sizes_have_no_exponent(count, told):
    assert page.size(count) == told
    assert page.perplexity(9999.6) == "10,000"
