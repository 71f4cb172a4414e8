"""Experts that go: scores by hand, directories that transformers reads, refusals."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from jaxprune.lm import cli
from jaxprune.lm.models import hf
from jaxprune.lm.shrinking.expert_scores import expert_scores
from tests.support import tiny_cli, tiny_hf


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with five experts, two a token and a shared one, and the model of it."""
    folder = tmp_path_factory.mktemp("qwen")
    tiny_hf.random_folder("qwen2-moe", folder)
    return folder, hf.load(folder, dtype="float32")


def _inputs_of_experts(graphdef, params, ids):
    """What each layer's MLP is given, by running the layers one after the other."""

    class Noted(nnx.Module):
        def __init__(self, inner, found):
            self.inner, self.note = inner, found.append

        def __call__(self, x):
            self.note(x)
            return self.inner(x)

    @jax.jit
    def inputs(params):
        model, found = nnx.merge(graphdef, params), []
        for layer in model.layers:
            layer.mlp = Noted(layer.mlp, found)
        model.states(model.embed(ids))
        return found

    return [np.asarray(x, np.float64) for x in inputs(params)]


def _with_row(param, row, value):
    """A parameter with one of its rows set."""
    array = np.array(param[...])
    array[row] = value
    return nnx.Param(array)


@pytest.mark.full
def test_a_score_is_the_mean_share_times_the_length_of_the_answer(qwen):
    _, loaded = qwen
    ids = tiny_hf.tokens(3, 16)
    graphdef, params = nnx.split(loaded.model, nnx.Param)
    scores, given = expert_scores(graphdef, params, ids, batch=2)
    assert given.sum(axis=1).tolist() == [2 * ids.size] * loaded.config.layers
    inputs = _inputs_of_experts(graphdef, params, ids)
    for i, x in enumerate(inputs):
        mlp = jax.tree.map(np.asarray, params["layers"][i]["mlp"])
        rows, router = x.reshape(-1, 32), mlp["router"]["kernel"][...]
        share = np.exp(rows @ router.astype(np.float64))
        share /= share.sum(axis=1, keepdims=True)
        lengths = [[] for _ in range(5)]
        for row, own in zip(rows, share, strict=True):
            for e in np.argsort(-own)[:2]:
                gate, up, down = (
                    np.asarray(mlp[n]["kernel"][e], np.float64)
                    for n in ("gate", "up", "down")
                )
                inner = row @ gate
                answer = (inner / (1 + np.exp(-inner)) * (row @ up)) @ down
                lengths[e].append(own[e] * np.linalg.norm(answer))
        expected = [np.mean(own) if own else 0.0 for own in lengths]
        np.testing.assert_allclose(scores[i], expected, rtol=1e-4)
        assert given[i].tolist() == [len(own) for own in lengths]


def test_an_expert_that_answers_nothing_scores_zero(qwen):
    _, loaded = qwen
    graphdef, params = nnx.split(loaded.model, nnx.Param)
    down = params["layers"][0]["mlp"]["down"]
    down["kernel"] = _with_row(down["kernel"], 2, 0)
    scores, given = expert_scores(graphdef, params, tiny_hf.tokens(2, 16))
    assert scores[0, 2] == 0
    assert given[0, 2] > 0
    assert (scores[1] > 0).all()


@pytest.mark.parity
@pytest.mark.full
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "olmoe", "gpt-oss"])
def test_transformers_reads_fewer_experts(name, tmp_path, capsys):
    pytest.importorskip("tyro")
    model, out = tmp_path / "model", tmp_path / "out"
    before = tiny_hf.random_folder(name, model, layers=1)
    np.save(tmp_path / "rows.npy", tiny_hf.tokens(4, 16))
    shape = hf.decoder_config(json.loads((model / "config.json").read_text()))
    left = shape.experts - 1
    code, record, _ = tiny_cli.run(
        capsys, "shrink", model, out, "--experts", str(1 / shape.experts),
        "--calibration", tmp_path / "rows.npy", "--length", "16", "--sequences", "4",
        "--batch", "2",
    )  # fmt: skip
    assert code == 0
    kept, scores = record["experts"]["kept"], np.array(record["experts"]["scores"])
    for i, own in enumerate(kept):
        assert set(range(shape.experts)) - {*own} == {int(scores[i].argmin())}
    small = hf.decoder_config(json.loads((out / "config.json").read_text()))
    assert small.experts == left
    assert record["sizes"]["after"]["experts"] == left
    after = tiny_cli.weights(out)
    if name == "mixtral":  # each expert that stays has its bits, under its new number
        for i, own in enumerate(kept):
            names = f"model.layers.{i}.block_sparse_moe.experts"
            for now, then in enumerate(own):
                np.testing.assert_array_equal(
                    after[f"{names}.{now}.w2.weight"],
                    before[f"{names}.{then}.w2.weight"],
                )
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    ids = tiny_hf.tokens()
    expected = tiny_hf.torch_logits(theirs.eval().float(), ids)
    graphdef, params = nnx.split(hf.load(out, dtype="float32").model, nnx.Param)
    got = jax.jit(lambda p, t: nnx.merge(graphdef, p)(t))(params, ids)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


@pytest.mark.full
def test_an_expert_that_nobody_is_given_to_can_go_without_a_trace(tmp_path):
    tiny_hf.random_folder("gpt-oss", tmp_path)
    loaded = hf.load(tmp_path, dtype="float32")
    graphdef, params = nnx.split(loaded.model, nnx.Param)
    for layer in range(loaded.config.layers):
        router = params["layers"][layer]["mlp"]["router"]
        router["bias"] = _with_row(router["bias"], 1, -1e4)
    config, few = hf.keep_experts(loaded.config, params, [[0, 2]] * 2)
    ids = tiny_hf.tokens()
    whole = tiny_cli.called(nnx.merge(graphdef, params), ids)
    small, _ = nnx.split(hf.abstract(config), nnx.Param)
    found = tiny_cli.called(nnx.merge(small, few), ids)
    np.testing.assert_allclose(found, whole, atol=1e-5)


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ([[0, 1, 2]], "for each of the 2 layers"),
        ([[0, 1, 2], [0, 1]], "as many ascending numbers from 0 to 4"),
        ([[1, 0], [0, 1]], "ascending"),
        ([[0, 5], [0, 1]], "ascending numbers from 0 to 4"),
        ([[0], [1]], "given to 2 experts, so as many must stay, got 1; keep more"),
    ],
)
def test_experts_that_cannot_stay_are_refused(kept, words, qwen):
    _, loaded = qwen
    params = nnx.state(loaded.model, nnx.Param)
    with pytest.raises(ValueError, match=words):
        hf.keep_experts(loaded.config, params, kept)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--experts", "0.2"), "--experts needs --calibration FILE"),
        (("--experts", "1.5", "--calibration", "rows.npy"), "share in [0, 1)"),
        (("--experts", "0.8", "--calibration", "rows.npy"), "at most 3 can go"),
        (("--experts", "0.05", "--calibration", "rows.npy"), "less than one of them"),
    ],
)
def test_the_command_refuses_before_it_reads(words, told, qwen, tmp_path, capsys):
    pytest.importorskip("tyro")
    rows = tmp_path / "rows.npy"
    np.save(rows, tiny_hf.tokens(4, 16))
    words = [str(rows) if word == "rows.npy" else word for word in words]
    out = tmp_path / "out"
    words += ["--length", "16", "--sequences", "4"]
    assert cli.main(["shrink", str(qwen[0]), str(out), *words]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert not out.exists()


def test_a_model_without_experts_has_none_to_lose(tmp_path, capsys):
    pytest.importorskip("tyro")
    tiny_cli.model(tmp_path / "model")
    rows = tmp_path / "rows.npy"
    np.save(rows, tiny_hf.tokens(4, 16))
    words = ["shrink", str(tmp_path / "model"), str(tmp_path / "out"), "--experts"]
    words += ["0.5", "--calibration", str(rows), "--length", "16", "--sequences", "4"]
    assert cli.main(words) == 1
    assert "is for mixtures of experts" in capsys.readouterr().err
    loaded = hf.load(tmp_path / "model")
    with pytest.raises(ValueError, match="needs a model with experts in each layer"):
        expert_scores(*nnx.split(loaded.model, nnx.Param), tiny_hf.tokens(2, 8))


def test_the_plan_says_how_many_experts_stay(qwen, tmp_path, capsys):
    pytest.importorskip("tyro")
    np.save(tmp_path / "rows.npy", tiny_hf.tokens(4, 16))
    code, record, _ = tiny_cli.run(
        capsys, "shrink", qwen[0], tmp_path / "out", "--experts", "0.4", "--plan",
        "--calibration", tmp_path / "rows.npy", "--length", "16", "--sequences", "4",
    )  # fmt: skip
    assert code == 0
    assert record["plan"]["experts a layer"] == [5, 3]
