"""Text as tokens: a corpus by name or from a path, and batches as functions of a step.

Two corpora are built with TensorFlow Datasets (without TensorFlow): `shakespeare_plays`
needs no network, `tiny_shakespeare_char` is nanoGPT's. Tokens are characters.
"""

from experiments.datasets.batches import Batches as Batches
from experiments.datasets.batches import prefetch as prefetch
from experiments.datasets.batches import validation_batches as validation_batches
from experiments.datasets.corpus import NAMES as NAMES
from experiments.datasets.corpus import Corpus as Corpus
from experiments.datasets.corpus import Vocabulary as Vocabulary
from experiments.datasets.corpus import load as load
