"""Gemma 3's rotary schemes where config.json has the newer and the older form."""

import numpy as np
import pytest

from jaxprune.lm.models import hf
from tests.support import tiny_hf

LINEAR = {"rope_type": "linear", "factor": 8.0}
SLIDING = {"rope_type": "default", "rope_theta": 100.0}


def schemes(full, **changes):
    """Attributes of config.json: a scheme for each kind of layer, and others."""
    nested = {"full_attention": full, "sliding_attention": SLIDING}
    return {"rope_parameters": nested, **changes}


CASES = {
    "the newer form": schemes({"rope_type": "default", "rope_theta": 5e5}),
    "the older form": {
        "rope_parameters": ...,
        "rope_scaling": LINEAR,
        "rope_theta": 5e5,
        "rope_local_base_freq": 100.0,
    },
    "both": schemes({"rope_type": "default", "rope_theta": 5e5}, rope_scaling=LINEAR),
    "both, and a base outside": schemes(
        {"rope_type": "default"}, rope_scaling=LINEAR, rope_theta=5e5
    ),
    "a base in the older form": schemes(
        {"rope_type": "default", "rope_theta": 7.0},
        rope_scaling={**LINEAR, "rope_theta": 5e5},
    ),
    "the older word beside no type": schemes(
        {"rope_theta": 5e5}, rope_scaling={"type": "linear", "factor": 8.0}
    ),
}


def read(**changes):
    config = tiny_hf.config_json("gemma3", **changes)
    return hf.decoder_config({k: v for k, v in config.items() if v is not ...})


def test_the_older_form_changes_what_the_newer_one_says():
    merged = schemes({**LINEAR, "rope_theta": 5e5})
    for name in CASES.keys() - {"the newer form"}:
        assert read(**CASES[name]) == read(**merged), name


@pytest.mark.parametrize(
    "changes",
    [
        schemes({"rope_type": "default"}, rope_scaling={"type": "linear", "factor": 8}),
        {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 8}},
    ],
)
def test_the_older_word_that_transformers_does_not_read_is_refused(changes):
    with pytest.raises(ValueError, match=r"rope_scaling.rope_type must be given"):
        read(**changes)


@pytest.mark.full
@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_gemma3_is_read_as_transformers_reads_it(tmp_path, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tiny_hf.torch_model("gemma3", tmp_path)
    tiny_hf.edit(tmp_path, rope_scaling=..., rope_theta=...)
    tiny_hf.edit(tmp_path, **CASES[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = tiny_hf.tokens(time=60)
    expected = tiny_hf.torch_logits(model.eval(), tokens)
    ours = hf.load(tmp_path, dtype="float32").model(tokens)
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=1e-4, atol=2e-5)
