"""Tokenizers of a directory, and directories of several files."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from jaxprune.lm.checkpoints.checkpoint_dir import Damaged, Unknown, open_directory
from jaxprune.lm.models import hf
from tests.support import tiny_hf

# ---- tokenizers


def _tokenizer_folder(folder, *, template=False, **settings):
    tokenizers = pytest.importorskip("tokenizers")
    tiny_hf.random_folder("llama", folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "to": 3, "be": 4, "or": 5}
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({**words, "<unk>": 6}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    if template:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("template", "settings", "begins"),
    [
        (False, {}, False),
        (True, {}, True),
        # transformers 5 goes by the template where there is a tokenizer.json.
        (False, {"add_bos_token": True, "bos_token": {"content": "<s>"}}, False),
        (True, {"add_bos_token": False, "bos_token": "<s>"}, True),
    ],
)
def test_texts_begin_as_the_folder_says(template, settings, begins, tmp_path):
    folder = _tokenizer_folder(tmp_path, template=template, **settings)
    tokenizer = hf.load_tokenizer(folder)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.begins) == (1, (2,), begins)
    assert tokenizer.vocab_size == 7
    assert tokenizer.encode("to be or") == [1] * begins + [3, 4, 5]
    assert tokenizer.encode("to be", bos=True) == [1, 3, 4]
    assert tokenizer.encode("to be", bos=False) == [3, 4]
    assert tokenizer.decode(np.array([1, 3, 4])) == "to be"
    assert tokenizer.decode([1, 3], special=True) == "<s> to"


def test_a_tokenizer_without_bos_says_so(tmp_path):
    folder = _tokenizer_folder(tmp_path, add_bos_token=True)
    tiny_hf.edit(folder, bos_token_id=None, eos_token_id=[2, 5])
    tokenizer = hf.load_tokenizer(folder)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.begins) == (None, (2, 5), False)
    with pytest.raises(ValueError, match=r"token that begins a text.*bos=False"):
        tokenizer.encode("to be", bos=True)


@pytest.mark.parametrize("wrong", [[{}], [1, "x"], "</s>", True, [[1]]])
def test_ends_that_are_no_tokens_are_refused(tmp_path, wrong):
    folder = _tokenizer_folder(tmp_path)
    tiny_hf.edit(folder, eos_token_id=wrong)
    with pytest.raises(
        Damaged, match=r"config.json' must have a token .* eos_token_id"
    ):
        hf.load_tokenizer(folder)


def test_what_is_no_tokenizer_is_told_apart(tmp_path):
    folder = _tokenizer_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(Damaged, match=r"tokenizer_config.json' must hold an object"):
        hf.load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(Damaged, match=r"tokenizer_config.json' is not JSON"):
        hf.load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(Damaged, match="is no tokenizer"):
        hf.load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(Unknown, match=r"no tokenizer.json but a tokenizer.model; make"):
        hf.load_tokenizer(folder)


def test_a_sharded_folder_is_one_model(tmp_path):
    from safetensors.numpy import save_file

    tensors = tiny_hf.random_tensors("llama")
    folder = tiny_hf.save(tmp_path / "one", tiny_hf.config_json("llama"), tensors)
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "config.json").write_text((folder / "config.json").read_text())
    names = list(tensors)
    files = {
        n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)
    }
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, parts / file)
    index = {"metadata": {}, "weight_map": files}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_directory(parts).indexed
    for a, b in zip(
        *(
            jax.tree.leaves(nnx.state(hf.load(p).model, nnx.Param))
            for p in (folder, parts)
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_truncation_and_padding_that_a_file_holds_are_not_gone_by(tmp_path):
    folder = _tokenizer_folder(tmp_path)
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.enable_truncation(max_length=2)
    made.enable_padding(length=8)
    made.save(str(folder / "tokenizer.json"))
    tokenizer = hf.load_tokenizer(folder)
    assert tokenizer.encode("to be or to be") == [3, 4, 5, 3, 4]
    assert tokenizer.encode("to") == [3]


def test_a_text_ends_as_the_generation_config_says_too(tmp_path):
    folder = _tokenizer_folder(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    tokenizer = hf.load_tokenizer(folder)
    assert tokenizer.eos == (2, 5)
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(Damaged, match=r"generation_config\.json' must have a token"):
        hf.load_tokenizer(folder)
