"""Tiny Shakespeare as nanoGPT splits it: 90 % of the characters to train, 10 % after.

The file is the one that TFDS's own `tiny_shakespeare` downloads (A. Karpathy, char-rnn,
2015), with the checksum recorded in `checksums.tsv`; that builder splits 90/5/5 and
needs TensorFlow, this one does not.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests  # type: ignore[import-untyped]
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.resource import get_dl_fname

from experiments.datasets.tfds_builder import describe

URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
    "input.txt"
)


class Builder(tfds.core.GeneratorBasedBuilder):
    """Splits `train` and `validation`, each one example with the feature `text`."""

    name = "tiny_shakespeare_char"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "nanoGPT's split."}  # noqa: RUF012 (TFDS's interface)

    def _info(self) -> tfds.core.DatasetInfo:
        return describe(
            self,
            "40,000 lines of Shakespeare; the last tenth of the characters validates.",
            "https://github.com/karpathy/char-rnn",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        expected = self.url_infos[URL].checksum
        try:
            # TFDS tries for minutes; without a network the error comes at once.
            cached = get_dl_fname(URL, expected)
            if not any(Path(dl_manager.download_dir).rglob(cached)):
                requests.get(URL, stream=True, timeout=20).close()
            path = dl_manager.download(URL)
        except Exception as error:
            raise ConnectionError(
                f"{self.name} needs {URL} once, but its download failed "
                f"({type(error).__name__}: {error}); try again, or get the file some "
                "other way and give it with --text PATH"
            ) from error
        content = path.read_bytes()
        # TFDS trusts a file in its cache by name alone.
        if (checksum := hashlib.sha256(content).hexdigest()) != expected:
            raise ValueError(
                f"the file of {self.name} must have the SHA-256 {expected}, got "
                f"{checksum} in '{path}'; delete it to have it downloaded again"
            )
        text = content.decode()
        # In characters, as nanoGPT's prepare.py cuts, not in examples.
        cut = int(0.9 * len(text))
        return {
            "train": self._generate_examples(text[:cut]),
            "validation": self._generate_examples(text[cut:]),
        }

    def _generate_examples(self, text: str) -> Iterator[tuple[int, dict[str, str]]]:
        yield 0, {"text": text}
