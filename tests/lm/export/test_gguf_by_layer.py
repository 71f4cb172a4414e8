"""GGUF of layers of different sizes: llama.cpp's deci, read back by its package."""

import numpy as np
import pytest

from jaxprune.lm.export.gguf_file import export_gguf
from jaxprune.lm.export.gguf_shape import NO_NEURONS
from jaxprune.lm.models import hf
from jaxprune.lm.models.loaded_model import open_model
from jaxprune.lm.shrinking import units
from tests.support import tiny_hf
from tests.support.tiny_tokenizers import model_folder
from tests.support.unequal_layers import LAYERS, unequal, written

pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")


@pytest.mark.full
def test_deci_has_the_sizes_of_each_layer_and_zeros_for_no_mlp(tmp_path):
    model_folder(tmp_path / "whole", "byte-level", layers=LAYERS)
    dense, small, _ = unequal(tmp_path / "whole")
    written(dense, small, tmp_path / "whole", tmp_path / "small")
    export_gguf(tmp_path / "small", tmp_path / "small.gguf", type="f32")
    reader = gguf.GGUFReader(tmp_path / "small.gguf")

    def value(key):
        return reader.fields[key].contents()

    assert value("general.architecture") == "deci"
    assert value("deci.attention.head_count") == [2, 0, 4]
    assert value("deci.attention.head_count_kv") == [1, 0, 2]
    assert value("deci.feed_forward_length") == [24, 48, NO_NEURONS]
    assert value("deci.attention.key_length") == small.config.head_dim
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    # A tensor that the graph does not ask for would be refused.
    in_layer = [n for n in tensors if n.startswith("blk.1.")]
    assert not [name for name in in_layer if "attn" in name]
    model = hf.load(tmp_path / "small").model
    dim, width = small.config.head_dim, small.config.width
    for layer, heads in ((0, 2), (2, 4)):
        query = np.asarray(model.layers[layer].attention.q.kernel[...]).T
        # Feature i and i + dim / 2 of a head are neighbours.
        order = np.arange(dim).reshape(2, dim // 2).T.reshape(-1)
        stored = tensors[f"blk.{layer}.attn_q.weight"].reshape(heads, dim, width)
        expected = query.reshape(heads, dim, width)[:, order]
        np.testing.assert_array_equal(stored, expected)
    down = np.asarray(model.layers[0].mlp.down.kernel[...]).T  # (width, neurons)
    np.testing.assert_array_equal(tensors["blk.0.ffn_down.weight"], down)
    assert tensors["blk.2.ffn_up.weight"].shape == (NO_NEURONS, width)
    for part in ("gate", "up", "down"):
        assert not tensors[f"blk.2.ffn_{part}.weight"].any()


def test_a_first_layer_without_attention_has_a_head_of_zeros(tmp_path):
    # Where that layer has none, llama.cpp takes the heads of all to be of size 0.
    model_folder(tmp_path / "whole", "byte-level", layers=2)
    dense = open_model(tmp_path / "whole").read()
    small = units.without_parts(dense, {(0, "heads"), (1, "heads")})
    written(dense, small, tmp_path / "whole", tmp_path / "small")
    export_gguf(tmp_path / "small", tmp_path / "small.gguf", type="f32")
    reader = gguf.GGUFReader(tmp_path / "small.gguf")
    for key in ("head_count", "head_count_kv"):
        assert reader.fields[f"deci.attention.{key}"].contents() == [1, 0]
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    width, size = small.config.width, small.config.head_dim
    for part in ("q", "k", "v"):
        assert tensors[f"blk.0.attn_{part}.weight"].shape == (size, width)
    assert tensors["blk.0.attn_output.weight"].shape == (width, size)
    attention = [name for name in tensors if ".attn" in name]
    assert len(attention) == 5
    assert not any(tensors[name].any() for name in attention)


def test_what_deci_cannot_say_is_refused(tmp_path):
    tiny_hf.random_folder("gemma3", tmp_path / "whole", "float32", LAYERS)
    dense, small, _ = unequal(tmp_path / "whole")
    written(dense, small, tmp_path / "whole", tmp_path / "small")
    with pytest.raises(ValueError, match=r"deci.* cannot say a gemma3_text; jaxprune"):
        export_gguf(tmp_path / "small", tmp_path / "small.gguf")
    assert not (tmp_path / "small.gguf").exists()
