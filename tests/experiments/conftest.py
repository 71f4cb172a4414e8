"""Runs of the experiments are of a model that compiles in a fraction of the time."""

from collections.abc import Iterator

import pytest

from experiments import gpt
from tests.support.tiny_job import SMALL


@pytest.fixture(scope="module", autouse=True)
def small_preset() -> Iterator[None]:
    """The preset "cpu" is `SMALL`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpt.PRESETS, "cpu", SMALL)
        yield
