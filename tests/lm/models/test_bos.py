"""What a text begins with, where the files of a tokenizer contradict each other.

tokenizer.json may put a token before a text by its template, tokenizer_config.json may
say `add_bos_token`, and either may name the token. transformers 5 goes by the template.
"""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from jaxprune.lm.checkpoints.checkpoint_dir import Damaged
from jaxprune.lm.models import hf
from tests.support import tiny_cli, tiny_hf

TEXT = "w5 w6 w7"
IDS = [5, 6, 7]
TEMPLATES = {
    "none": None,
    "bos": ["<s>", "A"],
    "eos": ["A", "</s>"],
    "bos and eos": ["<s>", "A", "</s>"],
    "another bos": ["<pad>", "A"],
}
CLASSES = (
    *("PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2TokenizerFast"),
    *("Qwen2TokenizerFast", "CohereTokenizerFast", "GPTNeoXTokenizerFast", None),
)
NAMED = {
    "text": "<s>",
    "object": {"content": "<s>", "__type": "AddedToken", "lstrip": False}
    | dict.fromkeys(("rstrip", "single_word", "normalized"), False),
    "absent": None,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bos")
    config = tiny_cli.CONFIG | {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    tiny_hf.save(folder, config, tiny_cli.tensors())
    tiny_cli.tokenizer(folder)
    return folder


def write(folder, template, add=None, bos="<s>", name=None, processor=...):
    """Gives a folder's tokenizer another template and other settings."""
    made = json.loads((folder / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in made["added_tokens"]}
    parts = TEMPLATES[template]
    made["post_processor"] = processor
    if processor is ...:
        made["post_processor"] = parts and {
            "type": "TemplateProcessing",
            "single": [
                {
                    "Sequence" if part == "A" else "SpecialToken": {
                        "id": part,
                        "type_id": 0,
                    }
                }
                for part in parts
            ],
            "pair": [{"Sequence": {"id": x, "type_id": 0}} for x in "AB"],
            "special_tokens": {
                part: {"id": part, "ids": [ids[part]], "tokens": [part]}
                for part in parts
                if part != "A"
            },
        }
    (folder / "tokenizer.json").write_text(json.dumps(made))
    pairs = {"add_bos_token": add, "bos_token": bos, "tokenizer_class": name}
    pairs = {key: value for key, value in pairs.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(pairs))


@settings(deadline=None)
@given(
    template=st.sampled_from([*TEMPLATES]),
    add=st.sampled_from([True, False, None]),
    bos=st.sampled_from([*NAMED.values(), "</s>", "w9", "not a token"]),
    ids=st.sampled_from([None, 1, 2, [1, 2]]),
)
def test_the_template_alone_says_what_a_text_begins_with(
    place, template, add, bos, ids
):
    write(place, template, add, bos)
    tiny_hf.edit(place, bos_token_id=ids)
    tokenizer = hf.load_tokenizer(place)
    before = {"bos": [1], "bos and eos": [1], "another bos": [0]}.get(template, [])
    assert tokenizer.encode(TEXT) == [*before, *IDS]
    assert tokenizer.overruled == (add is not None and add != bool(before))
    tiny_hf.edit(place, bos_token_id=1)


def test_an_eos_of_the_template_is_not_taken_for_the_bos_of_the_same_token(place):
    write(place, "eos", bos="</s>")
    assert hf.load_tokenizer(place).encode(TEXT) == IDS


@pytest.mark.parametrize(
    ("template", "add", "sentence"),
    [
        ("bos", False, "BOS (1), as tokenizer.json says, not as add_bos_token=false"),
        ("none", True, "no BOS, as tokenizer.json says, not as add_bos_token=true"),
        ("bos", True, "BOS (1), as the directory says"),
    ],
)
def test_files_that_contradict_are_named_where_the_beginning_is_said(
    place, capsys, template, add, sentence
):
    write(place, template, add)
    words = ["sample", place, "--prompt", TEXT, "--steps", 1]
    code, result, _ = tiny_cli.run(capsys, *words)
    assert code == 0
    assert result["bos"].startswith(sentence)


def test_a_template_that_names_no_token_of_its_table_is_refused(place):
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    processor = {"type": "TemplateProcessing", "single": [bos, text]}
    processor |= {"pair": [text], "special_tokens": {}}
    write(place, "none", processor=processor)
    with pytest.raises(Damaged, match=r"tokenizer.json' is no tokenizer"):
        hf.load_tokenizer(place)


@pytest.mark.parametrize(
    ("family", "name", "begins"),
    [
        ("llama", "GPTNeoXTokenizerFast", False),
        ("gpt_neox", None, False),
        ("olmoe", None, False),
        ("olmo2", "GPTNeoXTokenizerFast", True),
        ("qwen2", "GPTNeoXTokenizer", True),
    ],
)
def test_the_class_is_that_of_transformers_for_a_family(place, family, name, begins):
    write(place, "bos", name=name)
    tiny_hf.edit(place, model_type=family)
    assert hf.load_tokenizer(place).begins == begins
    tiny_hf.edit(place, model_type="llama")


def test_special_tokens_of_an_older_directory_are_those_of_its_map(place):
    write(place, "none", bos=None)
    tokens = {"bos_token": "<s>", "eos_token": {"content": "<pad>"}}
    (place / "special_tokens_map.json").write_text(json.dumps(tokens))
    tokenizer = hf.load_tokenizer(place)
    assert (tokenizer.bos, 0 in tokenizer.eos) == (1, True)
    settings = {"added_tokens_decoder": {}}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    assert 0 not in hf.load_tokenizer(place).eos
    (place / "special_tokens_map.json").unlink()


@pytest.mark.full
@pytest.mark.parity
@pytest.mark.parametrize(
    "family", ["llama", "gpt-neox", "olmo2", "granite", "phi3", "mistral", "qwen2"]
)
@pytest.mark.parametrize("name", CLASSES)
def test_texts_begin_as_those_of_transformers(place, name, family):
    transformers = pytest.importorskip("transformers")
    config = tiny_hf.config_json(family, bos_token_id=1, eos_token_id=2)
    (place / "config.json").write_text(json.dumps(config))
    for template, add, bos in itertools.product(
        TEMPLATES, (True, False, None), NAMED.values()
    ):
        write(place, template, add, bos, name)
        ids = transformers.AutoTokenizer.from_pretrained(place)("w5").input_ids
        begins = [token for token in ids[:1] if token in (0, 1)]  # <pad> or <s>
        tokenizer = hf.load_tokenizer(place)
        beginning = [tokenizer.bos] * tokenizer.begins
        assert beginning == begins, (template, add, bos, ids)
