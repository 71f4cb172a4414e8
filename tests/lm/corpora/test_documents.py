"""Conversations by a model's chat template, rows of Parquet, and what is refused."""

import json

import numpy as np
import pytest

from tests.support import tiny_cli

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from jaxprune.lm.corpora import text_files
from jaxprune.lm.models import hf
from jaxprune.lm.models.hf import chat_template
from jaxprune.lm.models.hf.chat_template import ChatTemplate

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

WORDS = (
    "{{ bos_token }}{% for m in messages %}w20 {{ m.content }} "
    "{% if m.role == 'assistant' %}w30 {% endif %}{% endfor %}"
)
MESSAGES = [
    {"role": "user", "content": "w5 w6"},
    {"role": "assistant", "content": "w7"},
]
# What templates of released models make use of.
REAL = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}\n"
    "{%- for message in rest -%}\n"
    "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}\n"
    "        {{ raise_exception('roles must alternate') }}\n    {%- endif -%}\n"
    "    {{ '<start>' + message['role'] + '\n' + (first if loop.first else '') }}\n"
    "    {% generation %}{{ message['content'] | trim }}{% endgeneration %}\n"
    "    {%- if loop.index > 7 %}{% break %}{% endif %}\n"
    "    {{ message | tojson }}{{ eos_token }}\n{%- endfor -%}"
)


def folder(place, template):
    """A model's folder with a chat template in its tokenizer_config.json."""
    tiny_cli.model(place)
    path = place / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | {"chat_template": template}))
    return place


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return hf.load_tokenizer(folder(tmp_path_factory.mktemp("chat") / "model", WORDS))


def test_conversations_are_written_as_the_template_says(tokenizer, tmp_path):
    first = json.dumps({"messages": MESSAGES})
    lines = [first, json.dumps({"text": "w8"}), first]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    chat, bos = [20, 5, 6, 20, 7, 30], [tokenizer.bos] * tokenizer.begins
    text = text_files.read_text(tmp_path / "a.jsonl", tokenizer, 97)
    # A sequence's own BOS is put there when it is drawn.
    assert text.tokens.tolist() == [*chat, 8, *bos, *chat]


def test_rows_of_parquet_are_the_documents_of_the_same_lines(tokenizer, tmp_path):
    rows = [[*MESSAGES, {"role": "user", "content": f"w{i}"}] for i in range(5, 60)]
    lines = [json.dumps({"messages": own}) for own in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    table = pyarrow.table({"messages": rows})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    found = [
        text_files.read_text(tmp_path / name, tokenizer, 97).first().tolist()
        for name in ("a.jsonl", "a.parquet")
    ]
    assert found[0] == found[1]
    assert len(found[0]) > 55 * 8


def test_a_file_of_few_rows_is_cut_whole(tokenizer, tmp_path):
    stream = np.random.default_rng(0).integers(5, 90, 4000)
    parts = [" ".join(f"w{i}" for i in own) for own in np.split(stream, 40)]
    parquet.write_table(pyarrow.table({"text": parts}), tmp_path / "a.parquet")
    text = text_files.read_text(tmp_path / "a.parquet", tokenizer, 97)
    drawn = text_files.draw_sequences(
        [text], sequences=39, length=100, bos=None, seed=0
    ).tokens
    whole = stream.tobytes()
    assert all(piece.astype(stream.dtype).tobytes() in whole for piece in drawn)
    assert len({piece.tobytes() for piece in drawn}) == 39


@pytest.mark.parity
@pytest.mark.parametrize("messages", [MESSAGES, [{"role": "system", "content": "é"}]])
def test_a_template_gives_what_transformers_gives(messages, tmp_path):
    pytest.importorskip("transformers")
    from transformers import PreTrainedTokenizerFast

    messages = [*messages, *MESSAGES] if messages[0]["role"] == "system" else messages
    place = folder(tmp_path / "model", REAL)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(place / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    expected = theirs.apply_chat_template(
        messages, chat_template=REAL, tokenize=False, add_generation_prompt=False
    )
    ours = ChatTemplate(REAL, {"bos_token": "<s>", "eos_token": "</s>"})
    assert ours.render(messages) == expected


@pytest.mark.parametrize(
    "source", ["{{ 1 // (messages | length - 1) }}", "{{ none_such.x }}", "{% break %}"]
)
def test_a_template_that_fails_is_a_sentence(source):
    with pytest.raises(ValueError, match="cannot write these messages"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "a"}])


def test_the_template_is_found_where_folders_have_it(tmp_path):
    several = [
        {"name": "tool_use", "template": "b"},
        {"name": "default", "template": "a"},
    ]
    special = {"eos_token": {"content": "</s>"}, "pad_token": None, "sep_token": "|"}
    found = chat_template.find_chat_template(
        tmp_path, {"chat_template": several, **special}
    )
    assert (found.source, found.special) == (
        "a",
        {"eos_token": "</s>", "sep_token": "|"},
    )
    assert chat_template.find_chat_template(tmp_path, {}) is None
    (tmp_path / "chat_template.jinja").write_text("c")
    assert (
        chat_template.find_chat_template(tmp_path, {"chat_template": "a"}).source == "c"
    )
    for odd in (3, ["a"], [{"name": "rag", "template": "b"}], {"default": "a"}):
        assert (
            chat_template.find_chat_template(tmp_path / "none", {"chat_template": odd})
            is None
        )


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (REAL, "roles must alternate"),
        ("{% if %}", "cannot write these messages"),
        ("{{ messages.pop() }}", "cannot write these messages"),
        ("{{ messages[0].content + 1 }}", "cannot write these messages"),
    ],
)
def test_what_a_template_refuses_is_told(source, told):
    with pytest.raises(ValueError, match=told):
        ChatTemplate(source, {}).render([MESSAGES[1], MESSAGES[0]])


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"words": ["w5"]}, "must have a column 'text' or 'messages', got words"),
        ({"text": ["w5", None]}, "row 1 has not"),
        ({"messages": [[{"role": "user"}]]}, "row 0 has not"),
        ({"messages": [[]]}, "row 0 has not"),
    ],
)
def test_a_table_without_documents_is_refused(tokenizer, tmp_path, columns, told):
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=told):
        text_files.read_text(tmp_path / "a.parquet", tokenizer, 97).first()


def test_what_is_no_parquet_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match=r"a.parquet' must be Parquet, but"):
        text_files.read_text(tmp_path / "a.parquet", tokenizer, 97)


def test_a_model_that_cannot_chat_says_so(tmp_path):
    own = hf.load_tokenizer(tiny_cli.model(tmp_path / "model"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    with pytest.raises(ValueError, match="no chat template that can be read; give"):
        text_files.read_text(tmp_path / "a.jsonl", own, 97)


def test_a_conversation_that_the_template_refuses_is_named_by_its_line(tmp_path):
    place = folder(tmp_path / "model", "{{ raise_exception('roles must alternate') }}")
    own = hf.load_tokenizer(place)
    lines = [{"text": "w5"}, {"messages": MESSAGES}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"a.jsonl', line 2: .*roles must alternate"):
        text_files.read_text(path, own, 97)
    table = pyarrow.table({"messages": [MESSAGES]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet', row 0: .*roles must alternate"):
        text_files.read_text(tmp_path / "a.parquet", own, 97).first()


def test_a_template_that_asks_for_the_date_gets_one_that_stays():
    plain = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {})
    assert plain.render(MESSAGES) == "26 Jul 2024"
    careful = "{% if strftime_now is defined %}x{% else %}its own{% endif %}"
    assert ChatTemplate(careful, {}).render(MESSAGES) == "its own"


def test_a_template_is_told_that_there_are_no_tools():
    source = "{% if tools is not none %}T{% endif %}{{ documents is none }}"
    assert ChatTemplate(source, {}).render(MESSAGES) == "True"


def test_conversations_keep_the_bos_that_only_their_template_writes(tmp_path):
    place = folder(tmp_path / "model", "{{ bos_token }} w5{{ messages[0].content }}")
    path = place / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"bos_token": "w9"}
    written = json.loads((place / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "w9", "type_id": 0}}
    text_alone = {"Sequence": {"id": "A", "type_id": 0}}
    known = {"w9": {"id": "w9", "ids": [9], "tokens": ["w9"]}}
    (tmp_path / "a.jsonl").write_text(
        2 * (json.dumps({"messages": [{"role": "user", "content": " w7 "}]}) + "\n")
    )
    for begins, expected in ((False, [9, 5, 7, 9, 5, 7]), (True, [5, 7, 9, 5, 7])):
        path.write_text(json.dumps(settings))
        template = {
            "type": "TemplateProcessing",
            "single": [bos] * begins + [text_alone],
            "pair": [text_alone],
            "special_tokens": known,
        }
        (place / "tokenizer.json").write_text(
            json.dumps(written | {"post_processor": template})
        )
        text = text_files.read_text(tmp_path / "a.jsonl", hf.load_tokenizer(place), 97)
        assert text.tokens.tolist() == expected


@pytest.mark.parametrize("name", ["reasoning", "thinking", "reasoning_content"])
def test_reasoning_has_the_name_that_the_template_reads(name):
    for read in ("reasoning_content", "thinking"):
        template = ChatTemplate("{{ messages[0]." + read + " }}", {})
        assert template.render([{"role": "assistant", name: "since"}]) == "since"
    silent = ChatTemplate("{{ messages[0].reasoning_content is defined }}", {})
    assert silent.render([{"role": "assistant", "content": "a"}]) == "False"
