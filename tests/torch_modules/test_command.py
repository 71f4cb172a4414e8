"""The command on directories that are no family of ours: transformers' classes judge.

What is written must load in the class of config.architectures with nothing missing, and
hold what the library gives for the same batches.
"""

import json
import math
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest

import jaxprune as jp
from jaxprune.lm import cli
from tests.support import tiny_hf, tiny_transformers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("jaxprune.torch.environment")  # torchax
safetensors = pytest.importorskip("safetensors.numpy")
pytestmark = [pytest.mark.parity, pytest.mark.full]

SMALL = ["--sequences", "8", "--batch", "4", "--length", "16"]
SAMPLES = ["--sequences", "8", "--batch", "4"]
HALF = ["--sparsity", "0.5"]


def run(capsys, *words):
    """Exit code, the object of --json, and stderr."""
    capsys.readouterr()
    code = cli.main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if code == 0 else None, err


def loaded(folder):
    """The module of a directory, which must hold all of it."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    module, info = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "mismatched_keys"))
    assert not info["unexpected_keys"]
    return module.eval()


def weights(folder):
    return safetensors.load_file(folder / "model.safetensors")


def assert_same_form(before, after):
    """The same files, tensors, shapes and dtypes, but for the two that are added."""
    made = {path.name for path in after.iterdir()}
    assert made - {"jaxprune.json", "report.html"} == {p.name for p in before.iterdir()}
    tensors = [
        {n: (t.shape, t.dtype) for n, t in weights(f).items()} for f in (before, after)
    ]
    assert tensors[0] == tensors[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("through_torch")
    tiny_transformers.bert(root / "bert")
    tiny_transformers.vit(root / "vit")
    tiny_transformers.t5(root / "t5")
    tiny_transformers.clip(root / "clip")
    (root / "text.txt").write_text(tiny_transformers.text())
    tiny_transformers.pictures(root / "pictures")
    return root


def test_bert_is_pruned_on_a_text(place, capsys):
    out = place / "bert_out"
    code, found, err = run(
        capsys, "prune", place / "bert", out, "--calibration", place / "text.txt",
        *SMALL, *HALF,
    )  # fmt: skip
    assert code == 0, err
    assert "model_type bert is no family of jaxprune's" in err
    assert_same_form(place / "bert", out)
    before, after = weights(place / "bert"), weights(out)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {n for n in before if ".layer." in n and before[n].ndim == 2} | {
        "cls.predictions.transform.dense.weight"
    }
    assert all(np.mean(after[name] == 0) == 0.5 for name in changed)
    assert found["achieved"] == 0.5
    text = found["perplexity"]["text.txt"]
    assert text["role"] == "held out from calibration"
    assert text["dense"]["tokens"] == text["pruned"]["tokens"] > 0
    module = loaded(out)
    # The head is the embedding, as it was.
    assert module.cls.predictions.decoder.weight is (
        module.bert.embeddings.word_embeddings.weight
    )
    code, measured, err = run(
        capsys, "eval", out, "--text", place / "text.txt", "--context", "16"
    )
    assert code == 0, err
    assert math.isfinite(measured["texts"]["text.txt"]["perplexity"])


def test_the_weights_are_those_that_prune_trained_gives(place, capsys, tmp_path):
    tokens = np.random.default_rng(0).integers(5, 60, (8, 12))
    np.savez(tmp_path / "ids.npz", input_ids=tokens)
    words = ["--calibration", tmp_path / "ids.npz", "--evaluate", tmp_path / "ids.npz"]
    code, found, err = run(
        capsys, "prune", place / "bert", tmp_path / "out", *words, *SAMPLES,
        "--sparsity", "0.5", "--method", "wanda",
    )  # fmt: skip
    assert code == 0, err
    assert found["outputs"]["ids.npz"]["role"] == "calibrated on too"
    module = loaded(place / "bert")
    example = {"input_ids": torch.as_tensor(tokens[:4])}
    fn, params = jp.torch.function(module, example)
    batches = [{"input_ids": part.astype(np.int32)} for part in np.split(tokens, 2)]
    written = dict(loaded(tmp_path / "out").named_parameters())
    expected = jp.prune_trained(
        fn,
        params,
        batches,
        jp.passes.wanda(relative=True),
        sparsity=0.5,
        prunable=lambda name, leaf: leaf.ndim == 2 and "embeddings" not in name,
    ).params
    for name, array in expected.items():
        result = written[name].detach().numpy()
        # The program of another batch rounds the statistics otherwise.
        assert np.mean((result == 0) == (np.asarray(array) == 0)) > 0.995, name


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_rows_of_token_ids_beside_a_text_are_used_as_they_are(place, tmp_path, name):
    from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
    from jaxprune.lm.steps.settings import Calibration
    from jaxprune.lm.torch_models.model_inputs import read_inputs
    from jaxprune.lm.torch_models.opening import open_torch_model

    rows = np.random.default_rng(0).integers(5, 60, (6, 12)).astype(np.int32)
    np.save(tmp_path / "rows.npy", rows)
    files = (tmp_path / "rows.npy", place / "text.txt")
    calibration = Calibration(
        calibration=files, sequences=8, length=8, evaluate=files[:1]
    )
    inputs = read_inputs(calibration, open_torch_model(open_directory(place / name)))
    # An encoder and a decoder share a row.
    size = {"bert": 12, "t5": 6}[name]
    found = inputs.calibration.arrays["input_ids"]
    assert found.shape == (8, size)
    expected = {tuple(row[:size]) for row in rows}
    of_text = [row for row in found.tolist() if tuple(row) not in expected]
    assert len(of_text) == 4
    first, last = {"bert": (2, 3), "t5": (None, 3)}[name]
    assert all(row[-1] == last and first in (None, row[0]) for row in of_text)
    measured = inputs.measured["rows.npy"]
    if name == "bert":  # the tokens that are hidden are those of the rows
        hidden = measured.targets >= 0
        np.testing.assert_array_equal(measured.targets[hidden], rows[hidden])
        shown = measured.samples.arrays["input_ids"]
        np.testing.assert_array_equal(shown[~hidden], rows[~hidden])
    else:
        np.testing.assert_array_equal(
            measured.samples.arrays["input_ids"], rows[:, :size]
        )
        assert inputs.calibration.arrays["decoder_input_ids"].shape == (8, 6)


def test_only_what_was_pruned_counts_as_pruned(place, capsys, tmp_path):
    out = tmp_path / "out"
    code, found, err = run(
        capsys, "prune", place / "vit", out, "--calibration", place / "pictures",
        *SAMPLES, *HALF, "--method", "wanda",
    )  # fmt: skip
    assert code == 0, err
    before, after = weights(place / "vit"), weights(out)
    moved = {n for n in before if not np.array_equal(before[n], after[n])}
    pruned = {row["name"] for row in found["weights"]}
    assert moved == pruned == found["tensors"].keys()
    zeros = sum(int(np.sum(after[name] == 0)) for name in pruned)
    assert found["achieved"] == zeros / sum(after[name].size for name in pruned)
    assert found["sizes"]["zeros"] == zeros


def test_a_vision_model_is_pruned_on_a_folder_of_pictures(place, capsys):
    out = place / "vit_out"
    code, found, err = run(
        capsys, "prune", place / "vit", out, "--calibration", place / "pictures",
        *SAMPLES, *HALF,
    )  # fmt: skip
    assert code == 0, err
    assert_same_form(place / "vit", out)
    assert found["calibration"]["arguments"] == ["pixel_values"]
    assert 0 < found["outputs"]["pictures"]["pruned"]["error"] < 1
    loaded(out)
    report = (out / "report.html").read_text()
    assert "Outputs beside those of the dense model" in report
    # Beside itself a model has lost nothing.
    words = ["--text", place / "pictures", "--dense", out]
    code, measured, err = run(capsys, "eval", out, *words)
    assert code == 0, err
    likeness = measured["outputs"]["pictures"]["model"]
    assert likeness == {"error": 0.0, "agreement": 1.0}
    words[-1] = place / "bert"
    code, _, err = run(capsys, "eval", out, *words)
    assert code == 1
    assert "--dense must be the model as it was before, of the same class" in err
    code, _, err = run(capsys, "eval", out, "--text", place / "pictures")
    assert code == 1
    assert "give --dense DIRECTORY, or --metric MODULE:FUNCTION" in err


@pytest.mark.full
def test_a_processor_that_makes_only_tensors_of_torch_reads_pictures(
    place, monkeypatch, tmp_path
):
    from jaxprune.lm.torch_models import media_samples
    from jaxprune.lm.torch_models.opening import TorchModel

    # As timm's does in transformers 5.24.
    def processor(images, return_tensors):
        assert return_tensors == "pt"
        pixels = [np.asarray(image, np.float32).transpose(2, 0, 1) for image in images]
        return {"pixel_values": torch.tensor(np.stack(pixels))}

    monkeypatch.setattr(media_samples, "load_reader", lambda *_: processor)
    module = types.SimpleNamespace(main_input_name="pixel_values", config=None)
    model = TorchModel(None, module, ())
    samples, files = media_samples.read_folder(place / "pictures", model, 3)
    assert len(files) == 3
    assert samples.arrays["pixel_values"].shape == (3, 3, 32, 32)
    assert isinstance(samples.arrays["pixel_values"], np.ndarray)


def test_a_model_that_was_widened_is_measured_as_it_is_written(place, tmp_path, capsys):
    module = loaded(place / "vit").to(torch.bfloat16)
    shutil.copytree(place / "vit", tmp_path / "vit")
    module.save_pretrained(tmp_path / "vit")
    out = tmp_path / "out"
    words = ["--ffn", "0.5", "--dtype", "float32", "--calibration", place / "pictures"]
    code, _, err = run(capsys, "shrink", tmp_path / "vit", out, *words)
    assert code == 0, err
    assert {array.dtype.name for array in weights(out).values()} == {"bfloat16"}


def test_the_dtype_is_that_of_the_files_whatever_the_configuration_says(
    place, tmp_path
):
    from jaxprune.lm.torch_models import opening

    shutil.copytree(place / "vit", tmp_path / "vit")
    tiny_hf.edit(tmp_path / "vit", dtype="bfloat16")
    module, _ = opening.load_module(tmp_path / "vit", type(loaded(place / "vit")))
    assert module.dtype is torch.float32


def test_experts_that_were_joined_are_rounded_and_named_as_they_are(tmp_path):
    from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
    from jaxprune.lm.torch_models import opening, prune

    tiny_transformers.deepseek(tmp_path)
    loaded(tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    source = open_directory(tmp_path)
    module = opening.open_torch_model(source, "float32").module
    by_tensor = opening.parameters_of_tensors(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.001)
    opening.round_as_stored(source, module, by_tensor)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, parameter.bfloat16().float()), name
    # Neither the first expert nor the first half of it is the second expert.
    joined = "model.layers.0.mlp.experts.gate_up_proj/1"
    assert prune._tensor_name(by_tensor, joined) == joined
    whole = "model.layers.0.self_attn.o_proj.weight"
    assert prune._tensor_name(by_tensor, whole) == whole


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wav2vec2", "whisper"])
def test_a_speech_model_is_pruned_on_a_folder_of_wav_files(name, tmp_path, capsys):
    getattr(tiny_transformers, name)(tmp_path / "model")
    tiny_transformers.sounds(tmp_path / "sounds")
    code, found, err = run(
        capsys, "prune", tmp_path / "model", tmp_path / "out", "--calibration",
        tmp_path / "sounds", *SAMPLES, *HALF,
    )  # fmt: skip
    assert code == 0, err
    assert_same_form(tmp_path / "model", tmp_path / "out")
    decodes = "decoder_input_ids" in found["calibration"]["arguments"]
    assert decodes == (name == "whisper")
    loaded(tmp_path / "out")


@pytest.mark.slow
def test_whisper_becomes_smaller_on_wav_files_and_is_measured(tmp_path, capsys):
    tiny_transformers.whisper(tmp_path / "model")
    tiny_transformers.sounds(tmp_path / "sounds")
    out, sounds = tmp_path / "out", tmp_path / "sounds"
    words = ["--ffn", "0.5", "--calibration", sounds, *SAMPLES]
    code, found, err = run(capsys, "shrink", tmp_path / "model", out, *words)
    assert code == 0, err
    small = loaded(out)
    config = small.config
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (12, 12)
    parameters = sum(p.numel() for p in small.parameters())
    assert found["sizes"]["after"]["parameters"] == parameters
    words = ["--text", sounds, "--dense", tmp_path / "model"]
    code, measured, err = run(capsys, "eval", out, *words)
    assert code == 0, err
    assert 0 < measured["outputs"]["sounds"]["model"]["error"] < 1


@pytest.mark.slow
def test_an_encoder_and_a_decoder_share_a_text(place, capsys):
    out = place / "t5_out"
    code, found, err = run(
        capsys, "prune", place / "t5", out, "--calibration", place / "text.txt",
        *SMALL, *HALF,
    )  # fmt: skip
    assert code == 0, err
    assert found["calibration"]["arguments"] == ["decoder_input_ids", "input_ids"]
    assert_same_form(place / "t5", out)
    loaded(out)


def test_an_interrupted_run_goes_on(place, capsys, monkeypatch):
    from jaxprune.lm.torch_models import prune

    words = [
        *("prune", place / "vit", place / "resumed"),
        *("--calibration", place / "pictures", *SAMPLES, "--method", "wanda", *HALF),
    ]
    write = prune.write_replaced

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(prune, "write_replaced", interrupted)
    assert run(capsys, *words)[0] == 130
    assert not (place / "resumed").exists()
    progress = {path.name for path in (place / ".resumed.work").iterdir()}
    assert len(progress) > 1
    monkeypatch.setattr(prune, "write_replaced", write)
    code, found, err = run(capsys, *words)
    assert code == 0, err
    assert not (place / ".resumed.work").exists()
    assert found["achieved"] == 0.5


@pytest.mark.parametrize(
    ("name", "words", "entries"),
    [
        ("bert", ["--ffn", "0.5"], {"intermediate_size": 12}),
        ("bert", ["--ffn", "0.4", "--multiple", "8"], {"intermediate_size": 16}),
        ("vit", ["--ffn", "0.25"], {"intermediate_size": 18}),
        ("t5", ["--ffn", "0.5", "--heads", "0.5"], {"d_ff": 12, "num_heads": 2}),
    ],
)
def test_a_smaller_directory_loads_with_the_sizes_of_its_configuration(
    place, capsys, tmp_path, name, words, entries
):
    code, found, err = run(capsys, "shrink", place / name, tmp_path / "out", *words)
    assert code == 0, err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((place / name / "config.json").read_text())
    assert config == {**before, **entries}
    small = loaded(tmp_path / "out")
    parameters = sum(p.numel() for p in small.parameters())
    assert found["sizes"]["after"]["parameters"] == parameters
    assert found["error"] < 1e-5


def test_a_directory_that_would_not_give_the_same_is_not_written(place):
    from jaxprune.lm.torch_models.shrink import check_loads

    small = loaded(place / "vit")
    with torch.no_grad():
        small.classifier.weight.mul_(2)
    pixels = np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype("f4")
    with pytest.raises(ValueError, match="as ViTForImageClassification it differs by"):
        check_loads(place / "vit", small, {"pixel_values": pixels})


def test_the_neurons_are_chosen_on_a_text(place, capsys, tmp_path):
    code, found, err = run(
        capsys, "shrink", place / "bert", tmp_path / "out", "--ffn", "0.5",
        "--calibration", place / "text.txt", *SMALL,
    )  # fmt: skip
    assert code == 0, err
    assert found["method"] == "shrink by obs"
    assert set(found["perplexity"]["text.txt"]) >= {"dense", "shrunk"}
    loaded(tmp_path / "out")


def test_inspect_says_what_is_possible_through_torch(place, capsys):
    code, found, _ = run(capsys, "inspect", place / "bert")
    assert code == 0
    assert found["through"] == "torch, as BertForMaskedLM"
    assert found["methods"] == ["magnitude", "wanda", "ria", "sparsegpt", "alps"]
    assert found["shrinkable"] == ["neurons"]


PAGE = Path(__file__).resolve().parents[2] / "docs" / "torch.md"
LINES = re.findall(r"^jaxprune .*$", PAGE.read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", LINES)
def test_the_documented_line_runs(place, capsys, monkeypatch, tmp_path, line):
    names = {"BERT": "bert", "VIT": "vit", "PICTURES": "pictures"}
    for name, source in {**names, "prose.txt": "text.txt"}.items():
        (tmp_path / name).symlink_to(place / source)
    monkeypatch.chdir(tmp_path)
    words = line.split()[1:]
    plan = ["--plan"] if words[0] in ("prune", "shrink") else []
    code, _, err = run(capsys, *words, *plan)
    assert code == 0, err


PRUNE = ["prune", "bert", "out", "--sparsity", "0.5", "--calibration", "text.txt"]
SHRINK = ["shrink", "bert", "out", "--calibration", "text.txt"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([*PRUNE, "self"], "writes no --calibration self"),
        ([*PRUNE, "--mesh", "fsdp=2"], "takes no --mesh"),
        ([*PRUNE, "--bos", "no"], "takes no --bos"),
        ([*PRUNE, "--ignore-config", "a"], "takes no --ignore-config"),
        ([*PRUNE, "pictures"], "inputs must be of one kind"),
        ([*PRUNE[:5], "--method", "wanda"], "by what it does to inputs, and none"),
        ([*PRUNE, "--length", "64", *SMALL[:4]], "at most 32 tokens for this model"),
        ([*PRUNE, "--exclude", "*.nothing"], "every --exclude must match"),
        ([*SHRINK, "--layers", "1"], "takes no --layers; build a smaller model"),
        ([*SHRINK, "--budget", "0.5"], "takes no --budget"),
        ([*SHRINK, "--heads", "0.5"], "cannot say that there are fewer heads"),
        (
            ["prune", "vit", "out", *PRUNE[3:]],
            "texts are for models that take tokens alone, but ViTForImage",
        ),
        (
            ["prune", "clip", "out", *PRUNE[3:]],
            "tokens alone, but CLIPModel takes input_ids and more; give a folder",
        ),
        (
            ["prune", "bert", "out", *PRUNE[3:6], "pictures"],
            "a picture needs the model's own processor, but",
        ),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else None,
)
def test_what_does_not_go_is_refused_before_anything_is_written(
    place, capsys, monkeypatch, words, sentence
):
    monkeypatch.chdir(place)
    before = {path.name for path in place.iterdir()}
    code, _, err = run(capsys, *words)
    assert code == 1
    assert sentence in " ".join(err.split())
    assert {path.name for path in place.iterdir()} == before


def test_code_that_depends_on_values_is_named_before_anything_is_written(
    place, capsys, monkeypatch
):
    part = transformers.models.bert.modeling_bert.BertSelfOutput
    monkeypatch.setattr(part, "forward", lambda _, h, x: h if h.sum() > 0 else x)
    monkeypatch.chdir(place)
    code, _, err = run(capsys, *PRUNE, *SMALL)
    assert code == 1
    assert "_local_scalar_dense in 'bert.encoder.layer.0.attention.output' reads" in err
    assert not (place / "out").exists()
    assert not (place / ".out.work").exists()


def test_a_weight_that_is_missing_is_refused(place, capsys, tmp_path):
    shutil.copytree(place / "vit", tmp_path / "vit")
    tensors = weights(tmp_path / "vit")
    tensors.pop("classifier.weight")
    file = tmp_path / "vit" / "model.safetensors"
    safetensors.save_file(tensors, file, {"format": "pt"})
    words = ["--calibration", place / "pictures", *SAMPLES, *HALF]
    code, _, err = run(capsys, "prune", tmp_path / "vit", tmp_path / "out", *words)
    assert code == 1
    assert "must hold all weights of ViTForImageClassification, but lacks" in err


def test_a_users_own_measure_is_called_with_the_module(place, capsys, monkeypatch):
    (place / "own.py").write_text(
        "def rows(module, batches):\n"
        "    assert type(module).__name__ == 'ViTForImageClassification'\n"
        "    return {'rows': sum(len(batch['pixel_values']) for batch in batches)}\n"
    )
    monkeypatch.chdir(place)
    words = ["--text", "pictures", "--metric", "own:rows"]
    code, found, err = run(capsys, "eval", "vit", *words)
    assert code == 0, err
    assert found["metric"] == {"model": {"rows": 12.0}}


def test_the_perplexity_of_equal_logits_is_the_vocabulary():
    from jaxprune.lm.torch_models import measures
    from jaxprune.lm.torch_models.samples import Measured, Samples

    class Ignorant(torch.nn.Module):
        def forward(self, input_ids):
            return transformers.modeling_outputs.MaskedLMOutput(
                logits=torch.zeros(*input_ids.shape, 37)
            )

    tokens = np.arange(20).reshape(4, 5)
    targets = np.where(tokens % 3 == 0, tokens, -1)
    item = Measured(Samples({"input_ids": tokens}), "", targets)
    result = measures.token_perplexity(Ignorant(), item, batch=3)
    assert result["perplexity"] == pytest.approx(37)
    assert result["tokens"] == 7
