"""Fewer channels of the residual stream: the model with zeros in their place."""

import re

import numpy as np
import pytest
from flax import nnx

from jaxprune.lm.models import hf
from tests.support import tiny_cli, tiny_hf

KEPT = np.sort(np.random.default_rng(0).permutation(32)[:20])  # of 32 channels
IDS = tiny_hf.tokens(2, 24)
# Tensors that write into the stream, and which of their axes is that of its channels.
WRITERS = {
    r"model\.embed_tokens\.weight": -1,
    r"model\.layers\..*\.(o_proj|down_proj|w2)\.(weight|bias)": 0,
    r"model\.layers\..*\.experts\.down_proj(_bias)?": -1,
}
OTHERS = (
    "gemma3",
    "qwen2-moe",
    "llama-3",
    "gemma2",
    "qwen3",
    "phi3",
    "granite",
    "mixtral",
    "qwen3-moe",
)
FAMILIES = [
    "llama",
    *(
        pytest.param(name, marks=pytest.mark.full)
        for name in (*OTHERS, "gpt-oss", "olmo2")
    ),
]


def write_whole(name, folder):
    """A random model, whose epsilon is large enough to matter."""
    more = {"head_dim": 8} if name == "olmo2" else {}
    return tiny_hf.random_folder(name, folder, layers=1, rms_norm_eps=0.3, **more)


def write_zeroed(folder, config, tensors):
    """The same where nothing writes into the channels that go."""
    removed = np.setdiff1d(np.arange(32), KEPT)
    zeroed = {name: tensor.copy() for name, tensor in tensors.items()}
    for name, tensor in zeroed.items():
        for rule, axis in WRITERS.items():
            if re.fullmatch(rule, name):
                np.moveaxis(tensor, axis, 0)[removed] = 0
    tiny_hf.save(folder, config, zeroed)


def write_narrow(folder, out):
    loaded = hf.load(folder)
    params = nnx.state(loaded.model, nnx.Param)
    _, small = hf.keep_channels(loaded.config, params, KEPT)
    config = tiny_cli.config_of(folder) | {"hidden_size": len(KEPT)}
    settings = {"config.json": config}
    hf.write_smaller(folder, out, small, loaded.names, settings=settings)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_narrower_model_is_the_one_whose_channels_are_zero(name, tmp_path):
    tensors = write_whole(name, tmp_path / "whole")
    config = tiny_cli.config_of(tmp_path / "whole")
    write_zeroed(tmp_path / "zeroed", config, tensors)
    write_narrow(tmp_path / "whole", tmp_path / "small")
    small = tiny_cli.config_of(tmp_path / "small")
    assert (small["hidden_size"], small["rms_norm_eps"]) == (20, 0.3)
    expected = tiny_cli.logits(tmp_path / "zeroed", IDS)
    logits = tiny_cli.logits(tmp_path / "small", IDS)
    # Float32 logits of up to some dozens.
    tolerance = 1e-5 * max(1, np.abs(expected).max() / 4)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)
    whole = tiny_cli.logits(tmp_path / "whole", IDS)
    assert np.abs(whole - expected).max() > 0.1


@pytest.mark.parity
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        *(pytest.param(name, marks=pytest.mark.full) for name in (*OTHERS, "olmo2")),
    ],
)
def test_transformers_loads_a_narrower_directory_with_equal_logits(name, tmp_path):
    pytest.importorskip("torch")
    import transformers

    write_whole(name, tmp_path / "whole")
    write_narrow(tmp_path / "whole", tmp_path / "small")
    transformers.logging.set_verbosity_error()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    assert not info["mismatched_keys"]
    logits = tiny_cli.logits(tmp_path / "small", IDS)
    np.testing.assert_allclose(
        tiny_hf.torch_logits(model.eval(), IDS),
        logits,
        rtol=0,
        atol=1e-5 * max(1, np.abs(logits).max() / 4),
    )


@pytest.mark.parametrize(
    ("name", "kept", "sentence"),
    [
        (
            "starcoder2",
            KEPT,
            r"subtract the mean of all channels too \(LayerNorm\); rem",
        ),
        ("llama", [], "ascending numbers from 0 to 31, at least one, got 0 of them"),
        (
            "llama",
            [3, 2],
            "ascending numbers from 0 to 31, at least one, got 2 of them",
        ),
        ("llama", [31, 32], "ascending numbers from 0 to 31"),
    ],
)
def test_channels_that_cannot_stay_are_refused(name, kept, sentence, tmp_path):
    tiny_hf.random_folder(name, tmp_path, layers=1)
    loaded = hf.load(tmp_path, lazy=True)
    params = nnx.state(loaded.model, nnx.Param)
    with pytest.raises(ValueError, match=sentence):
        hf.keep_channels(loaded.config, params, kept)


def test_a_width_that_a_family_cannot_say_is_refused(tmp_path):
    tiny_hf.random_folder("olmoe", tmp_path / "whole", layers=1)
    with pytest.raises(
        ValueError, match=r"cannot say this shape.*remove layers and exp"
    ):
        write_narrow(tmp_path / "whole", tmp_path / "small")


def test_heads_that_do_not_divide_the_new_width_are_refused(tmp_path):
    tiny_hf.random_folder("llama", tmp_path / "whole", layers=1)
    loaded = hf.load(tmp_path / "whole")
    params = nnx.state(loaded.model, nnx.Param)
    _, small = hf.keep_channels(loaded.config, params, range(18))
    with pytest.raises(ValueError, match="18, is a multiple of its query heads, got 4"):
        hf.write_smaller(
            tmp_path / "whole",
            tmp_path / "out",
            small,
            loaded.names,
            settings={
                "config.json": tiny_cli.config_of(tmp_path / "whole")
                | {"hidden_size": 18}
            },
        )
