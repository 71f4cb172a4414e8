"""GGUF: the tensors and tokens that llama.cpp's graphs expect, read by its package."""

import itertools
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxprune.lm.export import gguf_shape, gguf_tokenizer
from jaxprune.lm.export.gguf_file import export_gguf
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.rope import linear, llama3
from jaxprune.lm.vocabulary.token_choice import merged_tokens, symbols_of
from jaxprune.lm.vocabulary.trim import trim_vocabulary
from tests.support import tiny_hf
from tests.support.tiny_cli import logits, run
from tests.support.tiny_tokenizers import model_folder, text

pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")

FAMILIES = {"llama": "byte-level", "qwen3": "byte-level", "gemma3": "byte-fallback"}
# What llama.cpp's graphs assume, and what transformers does not read from a file: the
# head_dim of a Qwen 3; the scale of a Gemma 3's scores, and which layers have windows.
USUAL = {
    "llama": {},
    "qwen3": {"head_dim": 128},
    "gemma3": {
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "num_hidden_layers": 6,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    """A directory and its file of float32."""
    root, name = tmp_path_factory.mktemp("gguf"), request.param
    model_folder(root / "model", FAMILIES[name], name, **USUAL[name])
    export_gguf(root / "model", root / "model.gguf", type="f32")
    return root, gguf.GGUFReader(root / "model.gguf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A directory of a Llama with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    model_folder(folder, "byte-level")
    return folder


def value(reader, key):
    return reader.fields[key].contents()


@pytest.mark.full
def test_every_row_has_a_token_and_special_ones_their_ids(exported):
    root, reader = exported
    content = json.loads((root / "model" / "tokenizer.json").read_text())
    tokens = value(reader, "tokenizer.ggml.tokens")
    config = hf.load(root / "model", lazy=True).config
    assert len(tokens) == config.vocab_size
    types = value(reader, "tokenizer.ggml.token_type")
    for token, number in content["model"]["vocab"].items():
        assert tokens[number] == token
    for token in content["added_tokens"]:
        unknown = token["content"] == content["model"].get("unk_token")
        expected = gguf.TokenType.UNKNOWN if unknown else gguf.TokenType.CONTROL
        assert types[token["id"]] == expected
    assert (
        value(reader, "tokenizer.ggml.bos_token_id")
        == hf.load_tokenizer(root / "model").bos
    )
    assert value(reader, "tokenizer.ggml.add_bos_token") is True


def test_queries_turn_neighbours_where_llama_cpp_does(exported):
    root, reader = exported
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    source = hf.load(root / "model").model
    name = value(reader, "general.architecture")
    heads, dim = source.config.heads, source.config.head_dim
    query = np.asarray(source.layers[0].attention.q.kernel[...]).T  # (out, in)
    query = query.reshape(heads, dim, -1)
    order = np.arange(dim)
    if name == "llama":
        # Feature i and i + dim / 2 of a head are neighbours.
        order = order.reshape(2, dim // 2).T.reshape(-1)
    stored = tensors["blk.0.attn_q.weight"].reshape(heads, dim, -1)
    np.testing.assert_array_equal(stored, query[:, order])
    norm = np.asarray(source.norm.scale[...])
    plus = 1.0 if name == "gemma3" else 0.0
    np.testing.assert_array_equal(tensors["output_norm.weight"], norm + plus)


@pytest.mark.parity
def test_transformers_reads_the_file_with_the_same_logits(exported):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    root, _ = exported
    model = transformers.AutoModelForCausalLM.from_pretrained(
        root, gguf_file="model.gguf", dtype=torch.float32
    )
    tokens = np.arange(12).reshape(1, 12)
    with torch.no_grad():
        scores = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(scores, logits(root / "model", tokens), atol=1e-4)


@pytest.mark.parametrize(
    ("type", "error"), [("f16", 2e-3), ("bf16", 8e-3), ("q8_0", 1e-2), ("q4_0", 0.2)]
)
def test_a_type_rounds_matrices_and_no_vectors(type, error, llama, tmp_path):
    result = export_gguf(llama, tmp_path / "a.gguf", type=type)
    exact = export_gguf(llama, tmp_path / "b.gguf", type="f32")
    assert result.bytes < exact.bytes
    pairs = zip(
        *(gguf.GGUFReader(path).tensors for path in (result.file, exact.file)),
        strict=True,
    )
    for rounded, tensor in pairs:
        values = gguf.quants.dequantize(rounded.data, rounded.tensor_type)
        dense = np.asarray(tensor.data, np.float32)
        values = np.asarray(values, np.float32).reshape(dense.shape)
        if dense.ndim == 1:
            np.testing.assert_array_equal(values, dense)
        else:
            change = np.linalg.norm(values - dense) / np.linalg.norm(dense)
            assert 0 < change < error


def test_a_trimmed_vocabulary_is_exported(llama, tmp_path, capsys):
    trim_vocabulary(llama, tmp_path / "small", [text(200)], 320)
    words = ("export", tmp_path / "small", "--gguf", tmp_path / "a.gguf")
    code, record, _ = run(capsys, *words)
    assert code == 0
    assert record["bytes"] == (tmp_path / "a.gguf").stat().st_size
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert len(value(reader, "tokenizer.ggml.tokens")) == 320
    assert value(reader, "llama.vocab_size") == 320
    assert run(capsys, *words)[0] == 1  # taken
    assert run(capsys, *words, "--overwrite")[0] == 0


def test_tokens_are_joined_by_score_as_they_are_by_merges(tmp_path):
    model_folder(tmp_path / "model", "byte-fallback")
    content = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    export_gguf(tmp_path / "model", tmp_path / "a.gguf", type="f32")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    tokens = value(reader, "tokenizer.ggml.tokens")
    scores = dict(zip(tokens, value(reader, "tokenizer.ggml.scores"), strict=True))
    ranks = {tuple(m): i for i, m in enumerate(content["model"]["merges"])}

    def joined(symbols):
        # llama.cpp's way: the neighbours whose token scores highest, the first of them.
        while True:
            pairs = [
                (-scores[a + b], i)
                for i, (a, b) in enumerate(itertools.pairwise(symbols))
                if (a, b) in ranks
            ]
            if not pairs:
                return symbols
            _, i = min(pairs)
            symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]

    encode = hf.load_tokenizer(tmp_path / "model").tokens
    for word in sorted({*text(100).split()})[:50]:
        split = encode.encode("▁" + word, add_special_tokens=False).tokens
        if not any(token.startswith("<0x") for token in split):
            symbols = symbols_of("▁" + word, "")
            assert joined(symbols) == split
            assert {*split} <= merged_tokens(symbols, ranks)


def test_factors_give_the_frequencies_back():
    for rope in (
        linear(5e5, 16),
        linear(1e4, 16, factor=8.0),
        llama3(5e5, 64, factor=8.0, low=1.0, high=4.0, original=8192),
    ):
        theta, factors = gguf_shape.rope_factors(rope)
        pairs = len(rope.frequencies)
        frequencies = theta ** (-np.arange(pairs) / pairs) / factors
        np.testing.assert_allclose(frequencies, rope.frequencies, rtol=1e-5)


def test_words_are_split_as_llama_cpp_knows_them():
    digits = {"type": "Digits", "individual_digits": True}
    by_regex = {"type": "ByteLevel", "use_regex": True}
    plain = {"type": "ByteLevel", "use_regex": False}
    pattern = gguf_tokenizer._WORDS.format(digits="{1,3}")
    split = {"type": "Split", "pattern": {"Regex": pattern}}
    for parts, name in (
        ([by_regex], "gpt-2"),
        ([digits, by_regex], "smollm"),
        ([split, plain], "llama-bpe"),
    ):
        content = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}
        assert gguf_tokenizer._pre_tokenizer(content) == name
    with pytest.raises(ValueError, match="must have the splitting into words"):
        gguf_tokenizer._pre_tokenizer({"pre_tokenizer": plain})


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gpt2", "of model_type llama, qwen3, gemma3_text, got gpt2"),
        ("gemma3", r"scales scores by head_dim\^\(-1/2\)"),
        ("qwen3-bias", "sees all tokens in all layers, but this model has windows"),
        ("llama-yarn", "by one scheme for all contexts, which this model does not"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(name, sentence, tmp_path):
    tiny_hf.random_folder(name, tmp_path / "model")  # refused before the tokenizer
    with pytest.raises(ValueError, match=sentence):
        export_gguf(tmp_path / "model", tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_act": "relu"}, "has the nonlinearity silu, but this model has relu"),
        ({"hidden_act": "gelu"}, "has the nonlinearity silu, but this model has gelu"),
    ],
)
def test_another_nonlinearity_is_refused(changes, sentence, tmp_path):
    tiny_hf.random_folder("llama", tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=sentence):
        export_gguf(tmp_path / "model", tmp_path / "a.gguf")


@pytest.mark.parametrize("windows", [[1, None, 1, 1], [None, 1, None], [1, None, None]])
def test_windows_that_no_period_says_are_refused(windows):
    assert gguf_shape.window_period(windows) is None


@pytest.mark.parametrize("count", range(1, 14))
def test_a_period_says_the_windows_of_each_layer(count):
    for period in range(count + 1):
        full = [period and (i + 1) % period == 0 for i in range(count)]
        windows = [None if whole else 512 for whole in full]
        said = gguf_shape.window_period(windows)
        assert [bool(said) and (i + 1) % said == 0 for i in range(count)] == [
            window is None for window in windows
        ]


def test_an_added_token_without_a_row_is_left_out(tmp_path):
    model_folder(tmp_path / "model", "byte-level")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    rows = hf.load(tmp_path / "model", lazy=True).config.vocab_size
    picture = {**content["added_tokens"][0], "id": rows, "content": "<picture>"}
    content["added_tokens"].append(picture)
    path.write_text(json.dumps(content))
    export_gguf(tmp_path / "model", tmp_path / "a.gguf", type="f32")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert len(fields["tokenizer.ggml.tokens"].data) == rows
    trim_vocabulary(tmp_path / "model", tmp_path / "small", text(100).splitlines(), 320)
    kept = json.loads((tmp_path / "small" / "tokenizer.json").read_text())
    assert "<picture>" not in {token["content"] for token in kept["added_tokens"]}


def test_another_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"type must be one of f32, f16, .*, got 'q5'"):
        export_gguf(tmp_path, tmp_path / "a.gguf", type="q5")


def test_another_tokenizer_is_refused(tmp_path):
    model_folder(tmp_path / "model", "unigram")
    with pytest.raises(ValueError, match="of the model BPE, got Unigram"):
        export_gguf(tmp_path / "model", tmp_path / "a.gguf")
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_a_file_of_another_kind_is_never_replaced(llama, tmp_path):
    (tmp_path / "a.gguf").write_text("notes")
    with pytest.raises(ValueError, match="it is no GGUF file"):
        export_gguf(llama, tmp_path / "a.gguf", overwrite=True)
    assert (tmp_path / "a.gguf").read_text() == "notes"


def test_rows_that_are_no_whole_blocks_stay_f16(llama, tmp_path):
    assert hf.load(llama, lazy=True).config.mlp_width == 48  # no multiple of 32
    export_gguf(llama, tmp_path / "a.gguf", type="q4_0")
    types = {
        tensor.name: tensor.tensor_type.name
        for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors
    }
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q4_0"
    assert types["token_embd.weight"] == "Q8_0"


@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_a_weight_that_is_infinite_in_the_type_is_refused(llama, tmp_path, type):
    shutil.copytree(llama, tmp_path / "model")
    (path,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].astype("f4")
    tensors[name][0, 0] = -1e5
    save_file(tensors, path)
    with pytest.raises(
        ValueError, match=r"holds 100000, which is infinite as F16.*bf1"
    ):
        export_gguf(tmp_path / "model", tmp_path / "a.gguf", type=type)
    assert {p.name for p in tmp_path.iterdir()} == {"model"}
    export_gguf(tmp_path / "model", tmp_path / "a.gguf", type="bf16")


def test_a_tokenizer_of_before_its_models_had_a_type_is_exported(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    del content["model"]["type"]
    path.write_text(json.dumps(content))
    export_gguf(tmp_path / "model", tmp_path / "a.gguf", type="f32")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    trim_vocabulary(tmp_path / "model", tmp_path / "small", text(100).splitlines(), 320)
    assert hf.load_tokenizer(tmp_path / "small").encode("a")
