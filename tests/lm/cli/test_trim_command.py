"""`jaxprune trim`: fewer tokens; their weights stay."""

import json
import math
import re

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from tests.support import tiny_cli, tiny_hf
from tests.support.tiny_cli import config_of, logits, run
from tests.support.tiny_tokenizers import model_folder, text

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.lm import cli
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.corpora import text_files
from jaxprune.lm.models import hf
from jaxprune.lm.steps import trim

SHORT = ("--length", 32, "--sequences", 8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A random model with a tokenizer of bytes, and texts of its language."""
    root = tmp_path_factory.mktemp("vocabulary")
    model_folder(root / "model", "byte-level", "llama-3")
    (root / "a.txt").write_text(text(1500))
    (root / "b.txt").write_text(text(300, 3))
    np.save(root / "rows.npy", tiny_hf.tokens(6, 16))
    return root


def trimmed(capsys, place, out, *words, vocab=320):
    calibrated = ("--calibration", place / "a.txt", *SHORT, *words)
    return run(capsys, "trim", place / "model", out, "--tokens", vocab, *calibrated)


@pytest.mark.full
def test_bits_per_byte_are_the_loss_of_a_text_over_its_bytes(place, capsys):
    words = ("--text", place / "b.txt", "--context", 32, "--limit", 0)
    code, record, _ = run(capsys, "eval", place / "model", *words)
    assert code == 0
    measured = record["texts"]["b.txt"]
    bits = measured["nats"] * measured["tokens"] / math.log(2)
    size = (place / "b.txt").stat().st_size  # the umlauts have two bytes
    assert measured["bits_per_byte"] == pytest.approx(bits / size)


def test_token_ids_have_no_bytes(place, capsys):
    words = ("--text", place / "rows.npy", "--context", 16)
    code, record, _ = run(capsys, "eval", place / "model", *words)
    assert code == 0
    assert record["texts"]["rows.npy"]["bits_per_byte"] is None


@pytest.mark.full
def test_tokens_alone_go_and_the_rows_that_stay_are_the_same(place, capsys):
    code, record, err = trimmed(capsys, place, place / "alone")
    assert code == 0
    before, after = (
        load_file(place / name / "model.safetensors") for name in ("model", "alone")
    )
    old, new = (hf.load_tokenizer(place / n).tokens for n in ("model", "alone"))
    ids = new.get_vocab()
    assert len(ids) == config_of(place / "alone")["vocab_size"] == 320
    kept = [old.token_to_id(token) for token in sorted(ids, key=ids.get)]
    for name, tensor in after.items():
        expected = before[name]
        rows = expected[kept] if len(expected) != len(tensor) else expected
        np.testing.assert_array_equal(tensor, rows)
    assert record["vocabulary"]["after"] == 320
    assert "320 of 448 tokens stay; of the calibration's tokens they are" in err
    assert record["method"] == "vocabulary by counts and expected counts"
    assert record["sizes"]["after"]["tokens"] == 320
    assert not (place / "alone" / "vocab.json").exists()
    page = (place / "alone" / "report.html").read_text()
    assert "<h2>Bits per byte</h2>" in page
    assert re.search(r"a.txt went from \d\.\d{4} to \d\.\d{4} bits per byte", page)


@pytest.mark.full
def test_both_models_are_measured_on_the_same_text(place, capsys):
    words = ("--evaluate", place / "b.txt")
    code, record, _ = trimmed(capsys, place, place / "same", *words)
    assert code == 0
    # The words of the windows of the dense model, as the smaller one splits them.
    stream = hf.load_tokenizer(place / "model").encode(text(300, 3), bos=False)
    part = hf.load_tokenizer(place / "model").decode(stream[: 16 * 63])
    (place / "part.txt").write_text(part.rstrip("\ufffd"))
    for stage, folder in (("dense", "model"), ("trimmed", "same")):
        words = ("--text", place / "part.txt", "--limit", 0)
        again = run(capsys, "eval", place / folder, *words)[1]["texts"]["part.txt"]
        measured = record["perplexity"]["b.txt"][stage]
        assert measured["bits_per_byte"] == pytest.approx(
            again["bits_per_byte"], rel=1e-3
        )
    assert measured["tokens"] > record["perplexity"]["b.txt"]["dense"]["tokens"]


def test_what_the_model_writes_does_not_say_which_tokens_a_text_needs(place, capsys):
    words = ("--tokens", 320, "--calibration", "self", *SHORT)
    code, _, err = run(capsys, "trim", place / "model", place / "no", *words)
    assert code == 1
    assert "trim needs --calibration FILE..., whose tokens it counts" in err


@pytest.mark.full
def test_a_long_text_is_split_anew_where_it_is_drawn(place, capsys, monkeypatch):
    monkeypatch.setattr(text_files, "_WHOLE", 1000)
    code, record, _ = trimmed(capsys, place, place / "long")
    assert code == 0
    assert record["vocabulary"]["covered"] > 0.5


@pytest.mark.full
def test_files_of_several_shards_and_a_chat_template_stay(place, tmp_path, capsys):
    model_folder(tmp_path / "model", "byte-level")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    config = config_of(tmp_path / "model")
    names = sorted(tensors)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for file, part in zip(files, (names[:5], names[5:]), strict=True):
        tiny_hf.save(tmp_path / "model", config, {n: tensors[n] for n in part}, file)
    weight_map = {n: files[i >= 5] for i, n in enumerate(names)}
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    template = "{% for m in messages %}{{ m.content }}<end_of_turn>{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    words = ("--tokens", 320, "--calibration", place / "a.txt", *SHORT)
    code, _, _ = run(capsys, "trim", tmp_path / "model", tmp_path / "out", *words)
    assert code == 0
    rewrite.read_provenance(tmp_path / "out", verify=True)
    assert json.loads((tmp_path / "out" / index.name).read_text())["weight_map"] == (
        weight_map
    )
    tokenizer = hf.load_tokenizer(tmp_path / "out")
    assert tokenizer.chat is not None
    assert tokenizer.tokens.token_to_id("<end_of_turn>") in tokenizer.eos


@pytest.mark.full
@pytest.mark.parametrize("name", tiny_hf.CONFIGS)
def test_every_family_gives_the_same_logits_at_the_tokens_that_stay(name, tmp_path):
    tiny_hf.random_folder(name, tmp_path, "float32")
    loaded = hf.load(tmp_path)
    kept = np.arange(1, loaded.config.vocab_size, 2)
    params = nnx.state(loaded.model, nnx.Param)
    config, fewer = hf.keep_tokens(loaded.config, params, kept)
    small = nnx.merge(nnx.split(hf.abstract(config), nnx.Param)[0], fewer)
    tokens = np.arange(12).reshape(1, 12)
    np.testing.assert_allclose(
        tiny_cli.called(small, tokens),
        logits(tmp_path, kept[tokens])[..., kept],
        rtol=1e-5,
        atol=1e-5,
    )
    assert hf.resized(loaded.config, fewer) == config


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--tokens", "100"), "--tokens must be a positive multiple of 64, got 100"),
        (("--tokens", "320"), "trim needs --calibration FILE"),
        (
            ("--tokens", "320", "--calibration", "rows.npy"),
            "token ids cannot be, got .*rows.npy; give the texts",
        ),
        (
            ("--tokens", "448", "--calibration", "a.txt", "--length", "32"),
            "--tokens must be less than the 448 that there are",
        ),
        (
            ("--tokens", "128", "--calibration", "a.txt", "--length", "32"),
            r"\d+ tokens must stay: added tokens, bytes",
        ),
    ],
)
def test_bad_words_are_refused_and_nothing_is_written(words, sentence, place, capsys):
    before = sorted(path.name for path in place.iterdir())
    words = [str(place / w) if w.endswith((".npy", ".txt")) else w for w in words]
    code = cli.main(["trim", str(place / "model"), str(place / "free"), *words])
    err = capsys.readouterr().err
    assert code == 1
    assert re.search(sentence, err)
    assert sorted(path.name for path in place.iterdir()) == before


@pytest.mark.full
def test_a_plan_says_how_many_tokens_stay(place, capsys):
    code, record, _ = trimmed(capsys, place, place / "planned", "--plan")
    assert code == 0
    assert record["plan"]["tokens"] == [448, 320]
    assert not (place / "planned").exists()


@pytest.mark.parity
@pytest.mark.full
def test_transformers_loads_it_with_nothing_missing(place, capsys):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    code, _, _ = trimmed(capsys, place, place / "read")
    assert code == 0
    model, about = transformers.AutoModelForCausalLM.from_pretrained(
        place / "read", output_loading_info=True
    )
    assert not any(about[key] for key in ("missing_keys", "unexpected_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "read")
    line = text(300, 3).splitlines()[0]
    tokens = tokenizer(line).input_ids
    assert tokens == hf.load_tokenizer(place / "read").encode(line)
    with torch.no_grad():
        scores = model(torch.tensor([tokens])).logits.numpy()
    expected = logits(place / "read", np.array([tokens]))
    np.testing.assert_allclose(scores, expected, atol=1e-4)


@pytest.mark.full
def test_what_the_model_expects_is_kept_through_a_kill(place, capsys, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trim.perplexity, "retokenize_windows", killed)
        trimmed(capsys, place, place / "killed")
    monkeypatch.setattr(trim, "expected_counts", killed)
    code, record, _ = trimmed(capsys, place, place / "killed")
    assert code == 0
    monkeypatch.undo()
    code, whole, _ = trimmed(capsys, place, place / "whole")
    assert record["vocabulary"] == whole["vocabulary"]
    assert (place / "killed/tokenizer.json").read_text() == (
        place / "whole/tokenizer.json"
    ).read_text()
