"""Text as tokens: a corpus by name or from a path, and batches as functions of a step.

Two corpora are built with TensorFlow Datasets (without TensorFlow): `shakespeare_plays`
needs no network, `tiny_shakespeare_char` is nanoGPT's. Tokens are characters.
"""

from experiments.datasets.batches import Batches, prefetch, validation_batches
from experiments.datasets.corpus import NAMES, Corpus, Vocabulary, load

__all__ = [
    "NAMES",
    "Batches",
    "Corpus",
    "Vocabulary",
    "batches",
    "corpus",
    "load",
    "picture_questions",
    "prefetch",
    "shakespeare_plays",
    "text",
    "tfds_builder",
    "tfds_reader",
    "tiny_shakespeare_char",
    "validation_batches",
]
