"""A model that knows nothing is not made smaller: there is nothing to keep."""

from collections.abc import Mapping
from typing import Any

from jaxprune.lm.measure import perplexity
from jaxprune.lm.measure.tables import format_perplexity


def check_sane(
    texts: Mapping[str, Mapping[str, Any]], vocab_size: int, suspects: str
) -> None:
    """Refuses a dense model that predicts no text better than by frequency.

    Args:
      texts: name of a text to its perplexities, "dense" and "by_frequency"; a model may
        know one kind of text and not another, so one that it knows is enough.
      vocab_size: number of tokens, which is the perplexity of uniform guessing.
      suspects: what may be wrong with a directory, in words.

    Raises:
      ValueError: it knows none of the texts.
    """
    sane = [
        perplexity.is_sane(text["dense"], text["by_frequency"], vocab_size)
        for text in texts.values()
    ]
    results = ", ".join(
        f"{format_perplexity(text['dense']['perplexity'])} on {name}, where "
        f"guessing by frequency has {format_perplexity(text['by_frequency'])}"
        for name, text in texts.items()
    )
    if texts and not any(sane):
        raise ValueError(
            "the dense model must know something before anything is removed, but its "
            f"perplexity is {results} (vocabulary {vocab_size}); look at the "
            f"{suspects}, or give --any-perplexity"
        )
