"""What a trainer hands back is the directory again, with other numbers."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.export import maxtext_checkpoint, tunix_tensors
from jaxprune.lm.export.maxtext_checkpoint import export_maxtext
from jaxprune.lm.export.trained_weights import save_from_maxtext, save_from_tunix
from jaxprune.lm.models import hf
from tests.support import tiny_hf
from tests.support.trainer_folders import CHANGES, pruned_folder

pytestmark = pytest.mark.full


def restored(directory):
    """The parameters of a checkpoint, as Orbax gives them to one who knows nothing."""
    checkpoint = pytest.importorskip("orbax.checkpoint")
    return checkpoint.PyTreeCheckpointer().restore(directory)


@pytest.mark.filterwarnings("ignore")  # Orbax's, of missing shardings
@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_of_maxtext_that_nobody_trained_is_the_directory(name, tmp_path):
    folder = pruned_folder(name, tmp_path / "model")
    result = export_maxtext(folder, tmp_path / "student")
    params = restored(result.overrides["load_parameters_path"])
    save_from_maxtext(params, folder, tmp_path / "back")
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        np.testing.assert_allclose(after[key], tensor, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(after[key] == 0, tensor == 0)
    record = rewrite.read_provenance(tmp_path / "back")
    assert record["trained_by"] == "MaxText"
    zeros = {key: count["zeros"] for key, count in record["tensors"].items()}
    assert zeros == {key: np.sum(before[key] == 0) for key in zeros}
    assert {key for key in before if key.endswith("_proj.weight")} == zeros.keys()


@pytest.mark.parametrize(
    ("part", "gemma", "grouped", "einsum"),
    [
        ("q_proj", False, True, "d,dnh->nh"),
        ("q_proj", True, True, "d,ndh->nh"),
        ("v_proj", True, True, "d,ndh->nh"),
        ("k_proj", True, False, "d,ndh->nh"),
        ("o_proj", True, True, "nh,nhd->d"),
    ],
)
def test_a_matrix_of_tunix_gives_what_its_einsum_does(part, gemma, grouped, einsum):
    rng = np.random.default_rng(0)
    heads, size, width = 2, 4, 6
    origin = tunix_tensors.tunix_place(
        f"model.layers.0.self_attn.{part}.weight", gemma=gemma, grouped=grouped
    )
    axes = einsum.split(",")[1].split("->")[0]
    shape = [{"n": heads, "h": size, "d": width}[axis] for axis in axes]
    stacked = origin.position is not None
    leaf = rng.normal(size=[3, *shape] if stacked else shape)
    x = rng.normal(size=(heads, size) if einsum.startswith("nh") else width)
    expected = np.einsum(einsum, x, leaf[origin.position] if stacked else leaf)
    out = expected.size
    tensor = tunix_tensors.from_tunix(leaf, origin, (out, x.size))
    np.testing.assert_allclose(tensor @ x.ravel(), expected.ravel(), rtol=1e-12)


def test_parameters_of_another_model_are_refused(tmp_path):
    folder = pruned_folder("llama", tmp_path / "model")
    params = {"final_norm": {"w": np.ones(32)}, "adapter": {"w_lora_a": np.ones(2)}}
    sentence = r"must be those of the model of .*but lack 'embedder.*'adapter/w_lora_a'"
    with pytest.raises(ValueError, match=sentence):
        save_from_tunix(params, folder, tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_parameters_of_more_layers_are_refused(tmp_path):
    deep = pruned_folder("qwen3", tmp_path / "deep", num_hidden_layers=3)
    shallow = pruned_folder("qwen3", tmp_path / "shallow", num_hidden_layers=2)
    opened = open_directory(deep)
    loaded = hf.load(opened, lazy=True)
    params = maxtext_checkpoint._params(opened, loaded, "qwen3")
    with pytest.raises(
        ValueError, match=r"sizes of .*shallow', but 'decoder/layers/.*not"
    ):
        save_from_maxtext(params, shallow, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("save", [save_from_tunix, save_from_maxtext])
def test_a_family_that_no_trainer_is_handed_is_refused(save, tmp_path):
    folder = tmp_path / "model"
    tiny_hf.random_folder("gpt2", folder)
    with pytest.raises(ValueError, match=r"is handed model_type llama, .* got gpt2"):
        save({}, folder, tmp_path / "back")


def test_what_was_exported_without_an_attribute_comes_back_without_it(tmp_path):
    folder = pruned_folder("llama", tmp_path / "model")
    tiny_hf.edit(folder, gating="fancy")
    opened = open_directory(folder)
    with pytest.raises(ValueError, match="gating"):
        hf.load(opened, lazy=True)
    loaded = hf.load(opened, lazy=True, ignore_config=["gating"])
    params = maxtext_checkpoint._params(opened, loaded, "llama")
    save_from_maxtext(params, folder, tmp_path / "back", ignore_config=["gating"])
    after = load_file(tmp_path / "back" / "model.safetensors")
    before = load_file(folder / "model.safetensors")
    assert all(np.allclose(after[key], before[key], rtol=1e-6) for key in before)
