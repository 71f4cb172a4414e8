"""docs/retraining_in_torch.md: its callback holds a pruned model's zeros in torch."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory

pytestmark = [pytest.mark.parity, pytest.mark.full]

PAGE = Path(__file__).resolve().parents[3] / "docs" / "retraining_in_torch.md"
PRUNED = "_proj"  # the matrices of the layers


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny Llama without the smaller half of each matrix, as `prune` writes it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("torch")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "MODEL")
    source = open_directory(folder / "MODEL")
    dense = {n: source.read(n) for n in source.tensors if PRUNED in n}
    tensors = {
        name: np.where(np.abs(weight) > np.median(np.abs(weight)), weight, 0)
        for name, weight in dense.items()
    }
    rewrite.write_directory(source, folder / "OUT", tensors, provenance={"by": "hand"})
    return folder / "OUT"


def zeros_of(folder):
    tensors = load_file(folder / "model.safetensors")
    return {name: weight == 0 for name, weight in tensors.items() if PRUNED in name}


def pages_callback():
    source = re.search(r"^```{\.python}\n(.*?)^```", PAGE.read_text(), re.M | re.S)[1]
    names = {}
    exec(compile(source, str(PAGE), "exec"), names)
    return names["HoldZeros"]()


def train(model, folder, callbacks, **settings):
    """Two steps of the Trainer, whose optimizer is AdamW, on drawn tokens."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    tokens = np.random.default_rng(0).integers(0, 64, (16, 8))  # (rows, time)
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, callbacks=callbacks
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_pages_callback_holds_the_zeros_exactly(directory, tmp_path, accumulated):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    trainer = train(
        model,
        tmp_path,
        [pages_callback()],
        gradient_accumulation_steps=accumulated,
    )
    trainer.save_model(tmp_path / "RETRAINED")
    after, before = zeros_of(tmp_path / "RETRAINED"), zeros_of(directory)
    assert len(before) == 14
    for name, zeros in before.items():
        assert zeros.mean() == 0.5
        np.testing.assert_array_equal(after[name], zeros)
    old, new = (
        load_file(folder / "model.safetensors")
        for folder in (directory, tmp_path / "RETRAINED")
    )
    assert all((old[name] != new[name])[~zeros].any() for name, zeros in before.items())


def test_without_it_two_steps_fill_the_zeros(directory, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    train(model, tmp_path, []).save_model(tmp_path / "RETRAINED")
    after = zeros_of(tmp_path / "RETRAINED")
    assert not any(zeros.any() for zeros in after.values())


# What peft asks transformers for has another name there by now.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_leaves_the_zeros_until_it_is_merged(directory, tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    settings = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4)
    adapted = peft.get_peft_model(model, settings)
    train(adapted, tmp_path, [])
    base = dict(adapted.base_model.model.named_parameters())
    targets = [name for name in zeros_of(directory) if re.search("q_proj|down_", name)]
    for name in targets:
        weight = base[name.replace(".weight", ".base_layer.weight")]
        np.testing.assert_array_equal(weight.numpy() == 0, zeros_of(directory)[name])
    adapted.merge_and_unload().save_pretrained(tmp_path / "MERGED")
    merged = zeros_of(tmp_path / "MERGED")
    assert not any(merged[name].any() for name in targets)
