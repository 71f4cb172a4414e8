"""A tiny Llama that knows one text: each word is followed by the next one.

Its head gives the word after `w4` to the state of `w4`, whatever the layer does, as
long as the layer does little. So it is a model that is better than guessing by
frequency, made without training.
"""

import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.support import tiny_hf

WORDS, FIRST = 97, 4
CONFIG = {**tiny_hf.config_json("llama"), "num_hidden_layers": 1}
MATRICES = {
    f"model.layers.0.{name}.weight": shape
    for name, shape in {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (48, 32),
        "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48),
    }.items()
}
NORMS = ("input", "post_attention")


def following(tokens):
    """The word after a word; the last is followed by the first."""
    return (np.asarray(tokens) - FIRST + 1) % (WORDS - FIRST) + FIRST


def tensors(seed=0, layers=1):
    """The model's tensors."""
    rng = np.random.default_rng(seed)
    embedding = rng.normal(0, 1, (WORDS, 32)).astype(np.float32)
    head = np.zeros_like(embedding)
    words = np.arange(FIRST, WORDS)
    head[following(words)] = embedding[words] / 2
    layer = {
        name.replace(".0.", f".{i}."): rng.normal(0, 0.1, shape).astype(np.float32)
        for i in range(layers)
        for name, shape in MATRICES.items()
    }
    norms = [
        *(f"layers.{i}.{name}_layernorm" for i in range(layers) for name in NORMS),
        "norm",
    ]
    return {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": head,
        **layer,
        **{
            f"model.{name}.weight": rng.uniform(0.8, 1.2, 32).astype(np.float32)
            for name in norms
        },
    }


def tokenizer(folder, *, template=True, **settings):
    """Writes a tokenizer of 93 words, which begins texts with <s> by its template."""
    import tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    words |= {f"w{i}": i for i in range(FIRST, WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    if template:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    made.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "add_bos_token": template, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def model(folder, dtype="float32", layers=1):
    """Writes the model's folder."""
    made = {k: v.astype(dtype) for k, v in tensors(layers=layers).items()}
    folder.mkdir(parents=True)
    config = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    tokenizer(folder)
    return folder


def ids(count, seed=0):
    """Tokens: each word is followed by the next one, with now and then a leap."""
    rng = np.random.default_rng(seed)
    found = [FIRST]
    for leap in rng.random(count - 1) < 0.1:
        random = int(rng.integers(FIRST, WORDS))
        found.append(random if leap else int(following(found[-1])))
    return np.array(found, np.int32)


def text(count, seed=0):
    """The same as words."""
    return " ".join(f"w{i}" for i in ids(count, seed))


def weights(folder):
    """All tensors of a folder of one file."""
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the model, two texts, and token ids."""
    root = tmp_path_factory.mktemp("cli")
    model(root / "model")
    (root / "a.txt").write_text(text(900))
    (root / "b.txt").write_text(text(900, seed=1))
    np.save(root / "rows.npy", ids(8 * 16, seed=2).reshape(8, 16))
    np.save(root / "other.npy", ids(4 * 16, seed=3).reshape(4, 16))
    return root


def run(capsys, *arguments):
    """The exit code, the object on stdout, and stderr."""
    from jaxprune.lm import cli

    code = cli.main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def shrink(capsys, *words):
    """`run` of `shrink`."""
    return run(capsys, "shrink", *words)


def config_of(folder):
    """The parsed config.json of a folder."""
    return json.loads((folder / "config.json").read_text())


def logits(folder, tokens, **options):
    """Of a folder's model, in float64."""
    from jaxprune.lm.models import hf

    return called(hf.load(folder, **options).model, tokens)


def called(model, tokens):
    """What a decoder gives in one program, in float64."""
    found = _logits(*nnx.split(model), np.asarray(tokens, np.int32))
    return np.asarray(found, np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def nats(folder, tokens, **options):
    """Loss of each token after the first of each row, in float64."""
    scores = logits(folder, tokens, **options)[:, :-1]
    scores -= scores.max(-1, keepdims=True)
    chance = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return -np.take_along_axis(chance, np.asarray(tokens)[:, 1:, None], -1)[..., 0]
