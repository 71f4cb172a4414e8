"""Texts too large to be tokenised whole: the same pieces, in bounded memory."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.support import tiny_cli

pytest.importorskip("tokenizers")

from jaxprune.lm.corpora import long_text, text_files
from jaxprune.lm.measure import perplexity
from jaxprune.lm.models import hf

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

WORDS = 60_000


@pytest.fixture(scope="module", autouse=True)
def a_sixteenth():
    """A text of 0.2 MB is over what is tokenised whole, and is read in many chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_WHOLE", text_files._WHOLE // 16)
        patch.setattr(long_text, "_CHUNK", long_text._CHUNK // 16)
        patch.setattr(long_text, "_LONGEST_LINE", long_text._LONGEST_LINE // 16)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("long")
    tiny_cli.model(root / "model")
    ids = np.random.default_rng(1).integers(tiny_cli.FIRST, tiny_cli.WORDS, WORDS)
    ids = ids.astype(np.int32)
    np.save(root / "ids.npy", ids)
    words = [f"w{i}" for i in ids]
    (root / "a.txt").write_text(" ".join(words))
    cuts = np.sort(np.random.default_rng(0).integers(0, WORDS, 3000))
    parts = [" ".join(part) for part in np.split(words, cuts)]
    rows = pyarrow.table({"n": range(len(parts)), "text": parts})
    parquet.write_table(rows, root / "c.parquet", row_group_size=700)
    (root / "b.jsonl").write_text(
        "".join(
            json.dumps({"text": part, "n": i}) + "\n" for i, part in enumerate(parts)
        )
    )
    return root


@pytest.fixture(scope="module", params=["a.txt", "b.jsonl", "c.parquet"])
def read(request, folder):
    tokenizer = hf.load_tokenizer(folder / "model")
    text = text_files.read_text(folder / request.param, tokenizer, 97)
    assert isinstance(text, long_text.LongText)
    return text, np.load(folder / "ids.npy")


@pytest.fixture(scope="module")
def places(folder):
    """Where each piece stands in the stream, by its first 24 tokens."""
    stream = np.load(folder / "ids.npy").tobytes()
    size, known = np.dtype(np.int32).itemsize, {}
    for i in range(WORDS - 23):
        known[hash(stream[size * i : size * (i + 24)])] = i

    def of(pieces):
        return np.array([known[hash(piece[:24].tobytes())] for piece in pieces])

    return of


@pytest.mark.parametrize("sequences", [8, 300])
def test_pieces_are_of_the_text_do_not_overlap_and_leave_the_end_alone(
    read, places, sequences
):
    text, stream = read
    begin, end = text_files.hold_out_end(text, most=400)
    np.testing.assert_array_equal(end.tokens, stream[-400:])
    drawn = text_files.draw_sequences(
        [begin], sequences=sequences, length=65, bos=1, seed=0
    )
    assert drawn.tokens.shape == (sequences, 65)
    assert (drawn.tokens[:, 0] == 1).all()
    body = drawn.tokens[:, 1:]
    at = places(body)
    for piece, start in zip(body, at, strict=True):
        np.testing.assert_array_equal(piece, stream[start : start + 64])
    assert np.diff(np.sort(at)).min() >= 64
    assert at.max() + 64 <= len(stream) - 400
    # From everywhere in the text.
    assert np.ptp(np.histogram(at, 4, (0, len(stream)))[0]) <= sequences / 2


def test_the_seed_decides_what_is_drawn(read):
    def drawn(seed):
        return text_files.draw_sequences(
            [read[0]], sequences=8, length=64, bos=None, seed=seed
        ).tokens

    np.testing.assert_array_equal(drawn(0), drawn(0))
    assert (drawn(0) != drawn(1)).any()


@pytest.mark.full
def test_where_most_of_the_text_is_needed_all_of_it_is_cut(read, places):
    text, stream = read
    many = len(stream) // 1000 - 1
    drawn = text_files.draw_sequences(
        [text], sequences=many, length=1000, bos=None, seed=0
    ).tokens
    at = places(drawn)
    assert (at % 1000 == 0).all()
    assert len(set(at)) == many
    with pytest.raises(ValueError, match=r"has 60,000 tokens .* of 70,000 \(70 seq"):
        text_files.draw_sequences([text], sequences=70, length=1000, bos=None, seed=0)


def test_windows_and_tokens_are_those_of_the_whole_text(read):
    text, stream = read
    np.testing.assert_array_equal(text.first(), stream)
    seen = perplexity.windows_of_text(
        text, context=16, stride=7, bos=1, limit=9, longest=64
    )
    whole = perplexity.slide(stream, context=16, stride=7, bos=1, limit=9)
    np.testing.assert_array_equal(seen.tokens, whole.tokens)
    np.testing.assert_array_equal(seen.counted, whole.counted)


def test_there_is_room_for_as_many_pieces_as_the_whole_text_has(read):
    text, stream = read
    assert text.room(1000, 10_000) == len(stream) // 1000
    assert text.room(1000, 7) == 7


def test_a_text_without_white_space_is_cut_between_characters(folder, tmp_path):
    (tmp_path / "a.txt").write_text("\u4e2d" * 80_000)
    tokenizer = hf.load_tokenizer(folder / "model")
    text = text_files.read_text(tmp_path / "a.txt", tokenizer, 97)
    assert set(text.first().tolist()) == {3}  # words that nobody knows


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda: b'{"text": "w5"}\n' * 2**14 + b"[]\n", "at byte 245760 is not"),
        (
            lambda: b'{"text": "' + b"w5 " * 2**21 + b'"}\n',
            "line of .* under 4194304 bytes",
        ),
    ],
    ids=["a list", "a long line"],
)
def test_lines_that_are_no_documents_are_refused(folder, tmp_path, content, told):
    (tmp_path / "a.jsonl").write_bytes(content())
    text = text_files.read_text(
        tmp_path / "a.jsonl", hf.load_tokenizer(folder / "model"), 97
    )
    with pytest.raises(ValueError, match=told):
        text.first()


_DRAW = """
import resource, sys
from jaxprune.lm.corpora import text_files
from jaxprune.lm.models import hf
tokenizer = hf.load_tokenizer(sys.argv[1])
kind, sizes = type(tokenizer), []
encode = kind.encode
kind.encode = lambda self, text, **how: (
    sizes.append(len(text)) or encode(self, text, **how)
)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
text = text_files.read_text(text_files.Path(sys.argv[2]), tokenizer, 97)
text, end = text_files.hold_out_end(text, 8192)
drawn = text_files.draw_sequences([text], sequences=64, length=512, bos=1, seed=0)
more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert drawn.tokens.shape == (64, 512) and end.tokens.shape == (8192,)
print(more / 1024, sum(sizes))
"""


@pytest.mark.full
def test_a_large_text_takes_little_memory(folder, tmp_path):
    # 60 MB, of which less than 2 MB are tokenised: time and memory go with those.
    part = (folder / "a.txt").read_bytes()
    (tmp_path / "large.txt").write_bytes(b"\n".join([part] * 250))
    done = subprocess.run(
        [sys.executable, "-c", _DRAW, folder / "model", tmp_path / "large.txt"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    megabytes, characters = map(float, done.stdout.split())
    assert megabytes < 300
    assert characters < 2e6
