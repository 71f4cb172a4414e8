"""What the decoders of MaxText and Tunix would compute in another way is refused."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxprune.lm import cli
from jaxprune.lm.export.maxtext_checkpoint import export_maxtext
from jaxprune.lm.export.tunix_model import load_in_tunix
from tests.support.tiny_hf import LLAMA3
from tests.support.trainer_folders import pruned_folder

LOCAL, FULL = "sliding_attention", "full_attention"
REFUSED = {
    "llama3": ("llama", {"rope_parameters": LLAMA3}, "one scheme for all contexts"),
    "bias": ("llama", {"attention_bias": True}, "has no such biases"),
    "windows": (
        "gemma3",
        {"layer_types": [LOCAL, FULL, *[LOCAL] * 5]},
        "one window in all but each sixth layer",
    ),
    "scale": ("gemma3", {"query_pre_attn_scalar": 24}, "scales scores by head_dim"),
}


@pytest.mark.full
@pytest.mark.parametrize("case", REFUSED)
def test_another_function_is_refused_before_anything_is_written(case, tmp_path):
    name, changes, sentence = REFUSED[case]
    folder = pruned_folder(name, tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=f"^Tunix's decoder .*{sentence}"):
        load_in_tunix(folder)
    pytest.importorskip("orbax.checkpoint")
    with pytest.raises(ValueError, match=f"^MaxText's decoder .*{sentence}"):
        export_maxtext(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_base_that_tunix_does_not_read_is_refused(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5e5}
    folder = pruned_folder("llama", tmp_path / "model", rope_parameters=rope)
    with pytest.raises(ValueError, match=r"the base 1000000, .* this model by 500000"):
        load_in_tunix(folder)


def test_an_epsilon_that_tunix_does_not_read_is_refused(tmp_path):
    folder = pruned_folder("gemma3", tmp_path / "model", rms_norm_eps=1e-5)
    with pytest.raises(
        ValueError, match=r"rms_norm_eps 1e-06, .* this model has 1e-05"
    ):
        load_in_tunix(folder)


def test_buffers_and_copies_of_an_old_directory_are_left_out(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    folder = pruned_folder("llama", tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    weights = sum(tensor.size for tensor in tensors.values())
    # As Llama 2 was published, and as torch saves a tied head.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = export_maxtext(folder, tmp_path / "out")
    assert result.weights == weights


def test_a_type_of_gguf_is_refused_of_a_checkpoint_of_maxtext(tmp_path, capsys):
    words = ("export", tmp_path, "--maxtext", tmp_path / "out", "--type", "q8_0")
    assert cli.main([*map(str, words)]) == 1
    assert "--type q8_0 is for --gguf" in " ".join(capsys.readouterr().err.split())
