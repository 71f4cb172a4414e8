"""What our TFDS builders share: a description, and no questions to the network.

TFDS looks for every data set it does not find on disk in its cloud bucket first, which
without a network costs seconds and cannot find ours.
"""

from typing import Any

import tensorflow_datasets as tfds


class OfflineInfo(tfds.core.DatasetInfo):
    """A `DatasetInfo` that does not ask TFDS's bucket for a description."""

    def initialize_from_bucket(self) -> None:
        """Does nothing: these data sets are not in the bucket."""


def describe(
    builder: tfds.core.DatasetBuilder,
    description: str,
    homepage: str,
    features: dict[str, Any] | None = None,
) -> tfds.core.DatasetInfo:
    """Describes a data set whose examples are kept in the order they are made."""
    return OfflineInfo(
        builder=builder,
        description=description,
        homepage=homepage,
        features=tfds.features.FeaturesDict(features or {"text": tfds.features.Text()}),
        # The order is part of the data: a split's text is its examples joined.
        disable_shuffling=True,
    )
