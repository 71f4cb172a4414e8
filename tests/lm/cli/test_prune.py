import numpy as np
import pytest

from tests.support import tiny_cli
from tests.support.tiny_cli import logits, nats, place, run

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.lm import cli
from jaxprune.lm.checkpoints import rewrite
from jaxprune.posttraining.progress import ProgressLog

__all__ = ["place"]

SMALL = ["--length", "16", "--sequences", "8"]


def prune(capsys, place, out, *options):
    return run(capsys, "prune", place / "model", place / out, *SMALL, *options)


WANDA = ("--method", "wanda", "--sparsity", "0.5")


@pytest.fixture(scope="module")
def pruned(place):
    """One pruning by Wanda for many tests: its folder and its record."""
    rows = ["--calibration", str(place / "rows.npy")]
    texts = ["--evaluate", str(place / "a.txt"), str(place / "other.npy")]
    words = ["prune", str(place / "model"), str(place / "wanda"), *SMALL, *WANDA]
    assert cli.main([*words, *rows, *texts]) == 0
    return place / "wanda", rewrite.read_provenance(place / "wanda", verify=True)


def test_half_of_each_matrix_is_zero_and_all_else_is_as_it_was(place, pruned):
    before, after = tiny_cli.weights(place / "model"), tiny_cli.weights(pruned[0])
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name in tiny_cli.MATRICES:
            assert (after[name] == 0).sum() == value.size // 2
            kept = after[name] != 0
            np.testing.assert_array_equal(after[name][kept], value[kept])
        else:
            np.testing.assert_array_equal(after[name], value)


def test_wanda_keeps_what_moves_each_output_most(place, pruned):
    tensors = tiny_cli.weights(place / "model")
    x = tensors["model.embed_tokens.weight"][np.load(place / "rows.npy")]
    x = x.reshape(-1, 32).astype(np.float64)
    x /= np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    x *= tensors["model.layers.0.input_layernorm.weight"]
    x /= np.sqrt((x**2).mean(-1, keepdims=True))  # --relative yes, the default
    scale = np.sqrt((x**2).mean(0))
    for name in ("q", "k", "v"):
        name = f"model.layers.0.self_attn.{name}_proj.weight"
        score = np.abs(tensors[name]) * scale
        ranks = np.argsort(np.argsort(-score, axis=1, kind="stable"), axis=1)
        kept = tiny_cli.weights(pruned[0])[name] != 0
        np.testing.assert_array_equal(kept, ranks < 16)


def test_the_record_says_what_was_done(place, pruned):
    folder, record = pruned
    assert record["method"] == "wanda"
    assert (record["sparsity"], record["achieved"]) == (0.5, 0.5)
    assert record["tensors"].keys() == tiny_cli.MATRICES.keys()
    assert {row["name"] for row in record["weights"]} == tiny_cli.MATRICES.keys()
    assert all(0 < row["error"] < 1 for row in record["weights"])
    used = record["calibration"]
    assert (used["sequences"], used["length"], used["seed"]) == (8, 16, 0)
    assert [of["sequences"] for of in used["files"]] == [8]
    assert record["command"].startswith("jaxprune prune ")
    assert record["seconds"] > 0
    assert record["peak_memory_bytes"] > 2**20
    size = sum(np.prod(shape) for shape in tiny_cli.MATRICES.values())
    assert record["sizes"]["size"] == size
    assert not folder.with_name(".wanda.work").exists()
    page = (folder / "report.html").read_text()
    assert "went from" in page
    assert "http" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize("stage", ["dense", "pruned"])
def test_perplexities_are_those_of_the_folders(place, pruned, stage):
    folder, record = pruned
    folder = place / "model" if stage == "dense" else folder
    rows = np.load(place / "other.npy")
    expected = nats(folder, rows).mean()
    found = record["perplexity"]["other.npy"]
    assert found[stage]["nats"] == pytest.approx(expected, rel=1e-5)
    assert found[stage]["perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)
    assert (found["context"], found["stride"], found["role"]) == (16, None, "given")
    assert record["perplexity"]["a.txt"]["bos"] is True


@pytest.mark.full
def test_a_killed_run_goes_on_and_gives_the_same_bytes(place, capsys, monkeypatch):
    options = ["--method", "wanda", "--sparsity", "0.6", "--allocation", "erk"]
    options += ["--calibration", place / "a.txt"]
    code, whole, _ = prune(capsys, place, "whole", *options)
    assert code == 0
    written, known = [], []
    write, read = ProgressLog.write, ProgressLog.read

    def dies(self, stage, arrays, record):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(stage)
        write(self, stage, arrays, record)

    def reads(self, stage):
        found = read(self, stage)
        known.append(found is not None)
        return found

    monkeypatch.setattr(ProgressLog, "write", dies)
    code, found, err = prune(capsys, place, "again", *options)
    assert (code, found) == (130, None)
    assert "interrupted" in err
    assert not (place / "again").exists()
    monkeypatch.setattr(ProgressLog, "write", write)
    monkeypatch.setattr(ProgressLog, "read", reads)
    code, found, _ = prune(capsys, place, "again", *options)
    assert code == 0
    assert known[:3] == [True, True, False]
    one, other = ((place / n / "model.safetensors") for n in ("whole", "again"))
    assert one.read_bytes() == other.read_bytes()
    assert found["perplexity"] == whole["perplexity"]
    assert not (place / ".again.work").exists()


@pytest.mark.full
def test_what_is_measured_is_what_is_written(place, tmp_path, capsys):
    tiny_cli.model(tmp_path / "half", "bfloat16")
    code, found, _ = run(
        capsys, "prune", tmp_path / "half", tmp_path / "out", *SMALL,
        "--method", "sparsegpt", "--pattern", "2:4", "--dtype", "float32",
        "--calibration", place / "a.txt", place / "b.txt",
    )  # fmt: skip
    assert code == 0
    assert found["achieved"] == 0.5
    assert [of["sequences"] for of in found["calibration"]["files"]] == [4, 4]
    assert {of["role"] for of in found["perplexity"].values()} == {
        "held out from calibration"
    }
    (tmp_path / "end.txt").write_text(" ".join(tiny_cli.text(900).split()[-90:]))
    words = ["--text", tmp_path / "end.txt", "--dtype", "float32"]
    again = run(capsys, "eval", tmp_path / "out", *words)[1]["texts"]["end.txt"]
    measured = found["perplexity"]["a.txt"]["pruned"]
    assert measured["nats"] == pytest.approx(again["nats"], rel=1e-5)


def test_magnitude_alone_needs_neither_tokenizer_nor_known_model(tmp_path, capsys):
    model = tiny_cli.model(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    (model / "config.json").write_text('{"model_type": "never heard of"}')
    code, found, _ = run(
        capsys, "prune", model, tmp_path / "out", "--method", "magnitude",
        "--sparsity", "0.25", "--exclude", "*.q_proj.*",
    )  # fmt: skip
    assert code == 0
    assert len(found["tensors"]) == len(tiny_cli.MATRICES) - 1
    before, after = tiny_cli.weights(model), tiny_cli.weights(tmp_path / "out")
    for name in found["tensors"]:
        order = np.argsort(np.abs(before[name]).ravel(), kind="stable")
        lost = order[: before[name].size // 4]
        expected = before[name].copy()
        expected.ravel()[lost] = 0
        np.testing.assert_array_equal(after[name], expected)
    assert (tmp_path / "out" / "report.html").exists()


def test_magnitude_is_measured_where_a_text_is_given(place, capsys):
    def magnitude(sparsity, *more):
        return run(
            capsys, "prune", place / "model", place / "magnitude", "--method",
            "magnitude", "--sparsity", sparsity, "--evaluate", place / "other.npy",
            "--length", "16", *more,
        )  # fmt: skip

    assert magnitude("0.5")[0] == 0
    code, found, err = magnitude("0.7")
    assert (code, found) == (1, None)
    assert "another place, or give --overwrite if it is an earlier result" in err
    code, found, _ = magnitude("0.7", "--overwrite")
    assert code == 0
    rows = np.load(place / "other.npy")
    for stage, folder in (("dense", "model"), ("pruned", "magnitude")):
        expected = nats(place / folder, rows).mean()
        measured = found["perplexity"]["other.npy"][stage]["nats"]
        assert measured == pytest.approx(expected, rel=1e-5)
    record = rewrite.read_provenance(place / "magnitude", verify=True)
    assert record["perplexity"] == found["perplexity"]


@pytest.mark.parity
def test_transformers_reads_the_result_and_agrees(place, pruned):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, record = pruned
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    rows = np.load(place / "other.npy")
    with torch.no_grad():
        ids = torch.from_numpy(rows).long()
        found = model(ids, labels=ids)
    np.testing.assert_allclose(found.logits, logits(folder, rows), atol=1e-4)
    measured = record["perplexity"]["other.npy"]["pruned"]["nats"]
    assert measured == pytest.approx(float(found.loss), rel=1e-4)


def test_a_model_that_knows_nothing_is_named(place, capsys):
    np.save(place / "noise.npy", np.random.default_rng(0).integers(4, 97, (8, 16)))
    words = ["prune", place / "model", place / "noise", "--method", "magnitude"]
    words += ["--sparsity", "0.5", "--evaluate", place / "noise.npy", "--length", "16"]
    code, _, err = run(capsys, *words)
    assert code == 0
    assert "warning: the model predicts no text better than guessing" in err
