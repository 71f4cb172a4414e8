"""A directory in the lm-evaluation-harness: its own torch model has the same scores."""

import json

import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.full,
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),
]

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from jaxprune.lm.measure.harness_model import HarnessModel  # noqa: E402
from tests.support import tiny_tokenizers  # noqa: E402

WORDS = tiny_tokenizers.text(400, seed=3).split()
SENTENCES = [" ".join(WORDS[i : i + 6]) for i in range(0, 300, 6)]
PAIRS = [
    ("", SENTENCES[0]),
    (SENTENCES[1], " " + SENTENCES[2]),
    (SENTENCES[3] + " ", SENTENCES[4]),
    (" ".join(SENTENCES), " " + SENTENCES[5]),  # longer than the model sees
    ("a", " b"),
]


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    tiny_tokenizers.model_folder(path, request.param, max_position_embeddings=128)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }  # the torch model needs both
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def model(folder):
    return HarnessModel(folder, batch_size=3)


def requests(name, arguments):
    return [Instance(name, {}, args, i) for i, args in enumerate(arguments)]


def test_a_loglikelihood_is_that_of_the_full_logits(model):
    found = model.loglikelihood(requests("loglikelihood", PAIRS[:3]))
    for (context, continuation), (score, likeliest) in zip(PAIRS, found, strict=False):
        tokens = model.words.encode(context.rstrip(), bos=False)
        count = len(tokens)
        # A token may reach over the seam: the continuation is what is behind so many.
        tokens += model.words.encode(context + continuation, bos=False)[count:]
        if model.words.begins or not context:
            tokens, count = [model.prefix_token_id, *tokens], count + 1
        logits = np.asarray(model.decoder(np.asarray([tokens])), np.float64)[0]
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = range(count, len(tokens))
        expected = sum(logs[i - 1, tokens[i]] for i in places)
        assert score == pytest.approx(expected, rel=1e-5)
        assert likeliest is all(logits[i - 1].argmax() == tokens[i] for i in places)


def test_read_packed_it_scores_as_read_dense(folder, model):
    packed = HarnessModel(folder, batch_size=3, packed=True)
    pairs = requests("loglikelihood", PAIRS[:3])
    for a, b in zip(
        packed.loglikelihood(pairs), model.loglikelihood(pairs), strict=True
    ):
        assert a[0] == pytest.approx(b[0], rel=1e-4)
        assert a[1] is b[1]


def torch_model(folder):
    pytest.importorskip("torch")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    return huggingface.HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=3
    )


@pytest.mark.parity
def test_every_request_has_the_answer_of_the_harness_own_torch_model(folder, model):
    theirs = torch_model(folder)
    assert model.max_length == theirs.max_length
    for name, arguments in {
        "loglikelihood": PAIRS,
        "loglikelihood_rolling": [(" ".join(SENTENCES),), (SENTENCES[0],), ("a",)],
    }.items():
        found = getattr(model, name)(requests(name, arguments))
        expected = getattr(theirs, name)(requests(name, arguments))
        np.testing.assert_allclose(
            np.asarray(found, float), np.asarray(expected, float), rtol=1e-4
        )
    asked = {"until": [SENTENCES[0][:2]], "max_gen_toks": 12, "do_sample": False}
    prompts = [(SENTENCES[0], asked), (SENTENCES[1], asked | {"until": ["\n"]})]
    found = model.generate_until(requests("generate_until", prompts))
    expected = theirs.generate_until(requests("generate_until", prompts))
    assert found == expected


TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
}


@pytest.mark.parity
def test_a_local_task_has_the_scores_of_the_harness_own_torch_model(
    folder, model, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    rows = [
        {
            "question": SENTENCES[i],
            "choices": SENTENCES[i + 1 : i + 4],
            "answer": int(a),
        }
        for i, a in enumerate(rng.integers(0, 3, 20))
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, task in TASKS.items():
        source = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
        }
        config = {"task": name, "test_split": "test", **source, **task}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
    scores = [
        lm_eval.simple_evaluate(
            model=candidate,
            tasks=list(TASKS),
            task_manager=TaskManager(
                include_path=str(tmp_path), include_defaults=False
            ),
            bootstrap_iters=0,
        )["results"]
        for candidate in (model, torch_model(folder))
    ]
    for name in TASKS:
        found, expected = (
            {key: x for key, x in score[name].items() if isinstance(x, float)}
            for score in scores
        )
        assert found.keys() == expected.keys() != set()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-4), (name, key)


def test_what_does_not_fit_is_refused(folder):
    with pytest.raises(ValueError, match="max_length must be 2 or more and at most"):
        HarnessModel(folder, max_length=1000)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        HarnessModel(folder, batch_size=0)
