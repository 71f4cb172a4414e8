import json

import numpy as np
import pytest

from tests.support import tiny_cli
from tests.support.plain_decoder import plain

pytest.importorskip("tokenizers")

from jaxprune.lm.corpora import long_text, text_files
from jaxprune.lm.measure import perplexity
from jaxprune.lm.models import hf


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return hf.load_tokenizer(tiny_cli.model(tmp_path_factory.mktemp("texts") / "model"))


def made(path, tokens):
    return text_files.Text(path, "", np.asarray(tokens, np.int32))


def test_a_text_is_read_without_bos_and_lines_of_json_are_joined(tokenizer, tmp_path):
    (tmp_path / "a.md").write_text("w5 w6 unheard")
    lines = [json.dumps({"text": "w5 w6", "id": 1}), "", json.dumps({"text": "w7"})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    for name, expected in (("a.md", [5, 6, 3]), ("b.jsonl", [5, 6, 7])):
        text = text_files.read_text(tmp_path / name, tokenizer, 97)
        assert text.tokens.tolist() == expected
        assert not text.is_rows


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"\xff\xfe", "must be UTF-8"),
        (
            "a.jsonl",
            b'{"text": "w5"}\n{"words": 1}',
            "line 2 is not: .*words.*; mend",
        ),
        ("a.jsonl", b"[", "line 1 is not"),
        ("a.npy", np.zeros(4, np.int32), "sequences, length"),
        ("a.npy", np.zeros((4, 4)), "got float64"),
        ("a.npy", np.zeros((4, 1), np.int32), "at least 2 tokens"),
        ("a.npy", np.full((4, 4), 97), "from 0 to 96"),
        ("a.npy", np.array([{}]), r"a.npy' must be an array that numpy.save wrote"),
        ("a.npy", b"w5 w6", r"a.npy' must be an array that numpy.save wrote"),
        ("a.npy", b"", r"a.npy' must be an array that numpy.save wrote"),
        ("a.txt", b"w5 " * 2**23 + b"\xff", "must be UTF-8"),
        ("a.txt", b"w5 w6 w7" * (2**21 - 1) + b"w5 w6 w\xe2", "must be UTF-8"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(
    tokenizer, tmp_path, name, content, told
):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=told):
        text_files.read_text(path, tokenizer, 97)


def test_text_without_a_tokenizer_or_with_anothers_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("w5 w90")
    with pytest.raises(ValueError, match=r"give token ids as \.npy"):
        text_files.read_text(tmp_path / "a.txt", None, 97)
    with pytest.raises(ValueError, match="another model's"):
        text_files.read_text(tmp_path / "a.txt", tokenizer, 50)


@pytest.mark.parametrize("bos", [1, None])
def test_pieces_do_not_overlap_and_the_end_is_never_drawn(tmp_path, bos):
    stream = np.arange(1000)
    begin, end = text_files.hold_out_end(made(tmp_path, stream), most=60)
    assert end.tokens.tolist() == stream[-60:].tolist()
    drawn = text_files.draw_sequences([begin], sequences=40, length=20, bos=bos, seed=0)
    assert drawn.tokens.shape == (40, 20)
    body = drawn.tokens if bos is None else drawn.tokens[:, 1:]
    if bos is not None:
        assert (drawn.tokens[:, 0] == bos).all()
    assert (np.diff(body, axis=1) == 1).all()  # pieces as they are in the text
    assert len(np.unique(body)) == body.size
    assert body.max() < 940


def test_the_held_out_end_is_a_tenth_and_rows_have_none(tmp_path):
    begin, end = text_files.hold_out_end(made(tmp_path, np.arange(105)), most=60)
    assert (begin.tokens.size, end.tokens.size) == (95, 10)
    for tokens in (np.arange(19), np.zeros((30, 4))):
        text = made(tmp_path, tokens)
        assert text_files.hold_out_end(text, most=60) == (text, None)


def test_a_mixture_has_equal_shares_and_every_batch_sees_all_of_it(tmp_path):
    low, high = made(tmp_path, np.arange(400)), made(tmp_path, 1000 + np.arange(400))
    rows = made(tmp_path, 5000 + np.arange(90).reshape(9, 10))
    drawn = text_files.draw_sequences(
        [low, high, rows], sequences=11, length=10, bos=None, seed=3
    )
    assert drawn.counts == [4, 4, 3]
    kinds = np.digitize(drawn.tokens[:, 0], [1000, 5000])
    assert np.bincount(kinds).tolist() == [4, 4, 3]
    assert set(kinds[:3]) == {0, 1, 2}
    for part, begin in zip(drawn.parts, (0, 1000, 5000), strict=True):
        own = drawn.tokens[kinds == np.digitize(begin, [1000, 5000])]
        np.testing.assert_array_equal(part, own)
    assert drawn.undrawn[:2] == [None, None]
    left = drawn.undrawn[2].tokens
    whole = np.concatenate([left, drawn.tokens[kinds == 2]])
    np.testing.assert_array_equal(np.unique(whole), np.arange(5000, 5090))


def test_rows_that_are_all_needed_come_as_they_are(tmp_path):
    rows = made(tmp_path, np.arange(40).reshape(4, 10))
    drawn = text_files.draw_sequences([rows], sequences=4, length=10, bos=1, seed=0)
    np.testing.assert_array_equal(drawn.tokens, rows.tokens)
    assert drawn.undrawn == [None]


def test_the_seed_decides_what_is_drawn(tmp_path):
    text = made(tmp_path, np.arange(5000))

    def drawn(seed):
        return text_files.draw_sequences(
            [text], sequences=8, length=10, bos=None, seed=seed
        ).tokens

    np.testing.assert_array_equal(drawn(0), drawn(0))
    assert (drawn(0) != drawn(1)).any()


def test_too_short_texts_say_how_much_is_needed(tmp_path):
    low, rows = made("a.txt", np.arange(30)), made("b.npy", np.zeros((1, 10)))
    with pytest.raises(ValueError, match=r"'a.txt' has 30 .* of 40 \(4 .* of 10\); 'b"):
        text_files.draw_sequences([low, rows], sequences=8, length=10, bos=None, seed=0)


def test_a_sequence_of_bos_alone_is_refused(tmp_path):
    text = made("a.txt", np.arange(50))
    with pytest.raises(ValueError, match="a token beside BOS, got a length of 1"):
        text_files.draw_sequences([text], sequences=2, length=1, bos=1, seed=0)


@pytest.mark.parametrize("bos", [1, None])
@pytest.mark.parametrize("stride", [1, 3, 4, 6, 7])
@pytest.mark.parametrize("count", [2, 6, 7, 20])
def test_windows_predict_each_token_once(bos, stride, count):
    stream = np.arange(10, 10 + count)
    seen = perplexity.slide(stream, context=7, stride=stride, bos=bos)
    predicted = seen.tokens[:, 1:][seen.counted]
    expected = stream if bos is not None else stream[1:]
    np.testing.assert_array_equal(predicted, expected)
    place = seen.tokens[:, 1:] - seen.tokens[:, :-1]
    inside = place[:, 1:][seen.counted[:, 1:]]
    assert (inside == 1).all()  # each token stands behind the one before it
    first = seen.tokens[:, 0]
    assert (first == 1).all() if bos is not None else (first[:1] == 10).all()


def test_a_limit_of_no_window_is_refused():
    with pytest.raises(ValueError, match="limit of at least 1, got 0"):
        perplexity.slide(np.arange(20), context=4, limit=0)
    rows = made("a.npy", np.ones((5, 9)))
    with pytest.raises(ValueError, match="limit of at least 1, got -1"):
        perplexity.windows_of_text(rows, context=9, limit=-1, longest=32)


def test_no_batch_is_refused():
    seen = perplexity.slide(np.arange(20), context=4)
    with pytest.raises(ValueError, match=r"batch of at least 1, got \d+ and 0"):
        perplexity.measure_perplexity(plain(), seen, batch=0)


def test_windows_are_limited_from_the_beginning():
    whole = perplexity.slide(np.arange(50), context=8, stride=4, bos=None)
    some = perplexity.slide(np.arange(50), context=8, stride=4, bos=None, limit=3)
    np.testing.assert_array_equal(some.tokens, whole.tokens[:3])
    np.testing.assert_array_equal(some.counted, whole.counted[:3])


@pytest.mark.parametrize(("count", "bos"), [(0, 1), (1, None)])
def test_a_text_without_a_token_to_predict_is_refused(count, bos):
    with pytest.raises(ValueError, match="token to predict"):
        perplexity.slide(np.arange(count), context=8, stride=8, bos=bos)


def test_guessing_by_frequency_is_held_against_a_uniform_and_a_constant_text():
    rows = np.tile(np.arange(4), (1, 1000))
    counted = np.ones((1, 3999), bool)
    seen = perplexity.Windows(rows, counted, {})
    assert perplexity.unigram_perplexity(seen) == pytest.approx(4, rel=1e-3)
    seen = perplexity.Windows(np.zeros((1, 4000), int), counted, {})
    assert perplexity.unigram_perplexity(seen) == 1


@pytest.mark.parametrize(
    ("found", "frequency", "sane"),
    [
        (30.0, 600.0, True),
        (700.0, 600.0, False),
        (None, 600.0, False),
        (99, 1e3, False),
    ],
)
def test_a_sane_model_beats_frequency_and_vocabulary(found, frequency, sane):
    assert perplexity.is_sane({"perplexity": found}, frequency, 97) is sane


class Letters:
    """A tokenizer whose tokens are the characters, white space too."""

    chat, begins = None, True

    def encode(self, text, *, bos):
        return [min(ord(letter), 255) for letter in text]


def letters(tokens):
    return "".join(map(chr, tokens))


def test_strings_of_json_may_hold_any_separator_and_files_a_byte_order_mark(tmp_path):
    documents = ["one\u2028two", "three\x85four", "five\u2029six"]
    lines = [json.dumps({"text": own}, ensure_ascii=False) for own in documents]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\r\n".join(lines) + "\n", newline="")
    (tmp_path / "b.txt").write_text("\ufeffone two")
    found = text_files.read_text(tmp_path / "a.jsonl", Letters(), 256)
    assert len(found.tokens) == len("\n\n".join(documents))
    assert (
        letters(text_files.read_text(tmp_path / "b.txt", Letters(), 256).tokens)
        == "one two"
    )


def test_a_byte_order_mark_may_stand_before_an_empty_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"text":"ab"}\n')
    text = long_text.LongText(path, "", Letters(), 999, path.stat().st_size)
    assert letters(text.first()) == "ab"


@pytest.mark.parametrize("size", [90, 600_000])
def test_documents_of_a_long_file_stay_apart(tmp_path, size):
    count = 2_400_000 // size + 1
    with open(tmp_path / "long.jsonl", "w") as file:
        for _ in range(count):
            file.write(json.dumps({"text": "a" * size}) + "\n")
    found = text_files.read_text(tmp_path / "long.jsonl", Letters(), 256)
    assert letters(found.first()) == "\n\n".join(["a" * size] * count)
    drawn = text_files.draw_sequences(
        [found], sequences=4, length=400, bos=None, seed=0
    ).tokens
    assert ["\n\n" in letters(piece) for piece in drawn] == [size < 400] * 4
    begin, end = text_files.hold_out_end(found, 1000)
    if size < 400:
        assert begin.stop < found.stop
        assert len(end.tokens) == 1000
    else:  # no document begins in the last tenth
        assert (begin, end) == (found, None)


def test_more_texts_than_sequences_are_refused(tmp_path):
    every = [made(tmp_path / f"{i}.npy", np.arange(40)) for i in range(3)]
    with pytest.raises(ValueError, match="2 are asked of 3 texts; ask for more"):
        text_files.draw_sequences(every, sequences=2, length=8, bos=None, seed=0)
