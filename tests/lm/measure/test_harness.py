"""The lm-evaluation-harness' own torch model reads our directories as they stand."""

import json

import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("torch")
pytestmark = [
    pytest.mark.full,
    pytest.mark.clients,
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),
]

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from jaxprune.lm import cli  # noqa: E402
from jaxprune.lm.models import hf  # noqa: E402
from tests.support import tiny_tokenizers  # noqa: E402
from tests.support.tiny_cli import nats  # noqa: E402

WORDS = tiny_tokenizers.text(15, seed=3).split()


def test_a_pruned_directory_has_the_scores_of_the_harness(tmp_path):
    dense, pruned = tmp_path / "dense", tmp_path / "pruned"
    tiny_tokenizers.model_folder(dense, "byte-level", max_position_embeddings=128)
    path = dense / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"eos_token": "</s>", "pad_token": "<pad>"}))
    how = ("--method", "magnitude", "--sparsity", "0.5")
    assert cli.main(["prune", str(dense), str(pruned), *how]) == 0
    model = HFLM(pretrained=str(pruned), device="cpu", batch_size=2, dtype="float32")
    text = " ".join(WORDS)
    request = Instance("loglikelihood", {}, ("", text), 0)
    ((score, _),) = model.loglikelihood([request])
    words = hf.load_tokenizer(pruned)
    tokens = np.array([[words.bos, *words.encode(text, bos=False)]], np.int32)
    np.testing.assert_allclose(score, -nats(pruned, tokens).sum(), rtol=1e-4)
