"""Characters as tokens, and texts of the user's as corpora."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.datasets import Corpus, Vocabulary, load

# Vocabulary and corpus


def test_vocabulary_is_nanogpts():
    text = "To be, or not to be:\nthat is the question.\N{EM DASH}\U0001f3ad"
    characters = sorted(set(text))  # nanoGPT, data/shakespeare_char/prepare.py
    index = {character: i for i, character in enumerate(characters)}
    vocabulary = Vocabulary.of(text)
    assert vocabulary.characters == "".join(characters)
    assert len(vocabulary) == len(characters)
    tokens = vocabulary.encode(text)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [index[character] for character in text]


@given(st.text())
@settings(max_examples=50, deadline=None)
def test_decode_undoes_encode(text):
    vocabulary = Vocabulary.of(text)
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_more_characters_than_16_bits_are_kept_apart():
    text = "".join(map(chr, range(0x10000, 0x10000 + 2**16 + 1)))
    vocabulary = Vocabulary.of(text)
    tokens = vocabulary.encode(text)
    assert tokens.dtype == np.int32
    assert tokens[-1] == 2**16


def test_encode_names_the_unknown_character():
    message = re.escape("vocabulary's 3 characters, got 'z' at position 2")
    with pytest.raises(ValueError, match=message):
        Vocabulary("abc").encode("abz")
    with pytest.raises(ValueError, match="0 characters, got 'a' at position 0"):
        Vocabulary("").encode("a")


def test_fingerprint_depends_on_the_text_and_the_split():
    parts = [("ab", "cd"), ("abc", "d"), ("ab", "ce"), ("", "abcd"), ("abcd", "")]
    fingerprints = {Corpus.of("x", *part).fingerprint for part in parts}
    assert len(fingerprints) == len(parts)
    assert Corpus.of("y", "ab", "cd").fingerprint in fingerprints


# A text of the user's


def test_a_file_is_split_90_to_10(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1019))
    path = tmp_path / "letters.txt"
    path.write_text(text)
    corpus = load(text=path)
    assert corpus.name == "letters.txt"
    assert (len(corpus.train), len(corpus.validation)) == (917, 102)  # int(917.1)
    decode = corpus.vocabulary.decode
    assert decode(corpus.train) + decode(corpus.validation) == text
    assert corpus.fingerprint == load(text=str(path)).fingerprint


def test_a_folder_gives_its_texts_in_order_of_path(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in {
        "c.txt": "third",
        "a.md": "first",
        "b/z.TXT": "second",
        "b/data.bin": "\0",
    }.items():
        (tmp_path / name).write_text(text)
    corpus = load(text=tmp_path)
    tokens = np.concatenate([corpus.train, corpus.validation])
    assert corpus.vocabulary.decode(tokens) == "first\nsecond\nthird"
    assert corpus.name == tmp_path.name


def test_line_ends_and_byte_order_mark_are_made_plain(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert load(text=tmp_path / "dos.txt").vocabulary == Vocabulary.of("one\ntwo")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "'PATH' must hold text"),
        (b" \n\n", "'PATH' must hold text"),
        (b"caf\xe9 noir", "UTF-8 file or directory, got 'PATH' .*0xe9 in position 3"),
        (None, r"readable .* got 'PATH' .*No such file or directory"),
    ],
)
def test_a_bad_text_is_named(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message.replace("PATH", re.escape(str(path)))):
        load(text=path)


def test_a_folder_without_texts_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must hold text, in .txt or .md files"):
        load(text=tmp_path)


def test_an_unknown_name_lists_the_known():
    message = "one of shakespeare_plays, tiny_shakespeare_char, got 'hamlet'; .*--text"
    with pytest.raises(ValueError, match=message):
        load("hamlet")
