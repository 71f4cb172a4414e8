"""What a program prints against what a page says that it prints."""

import re

import numpy as np

_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def assert_prints(printed: str, page: str) -> None:
    """Words are the same but for the spaces; numbers nearly so.

    Losses and shares depend, in the last digits, on the processor and on the version of
    JAX; whole numbers do not.
    """
    words, claimed = (_NUMBER.sub("0", text).split() for text in (printed, page))
    assert words == claimed
    values, claims = (_NUMBER.findall(text) for text in (printed, page))
    for value, claim in zip(values, claims, strict=True):
        value, claim = value.replace(",", ""), claim.replace(",", "")
        if "." not in claim:
            assert value == claim, (value, claim, printed)
        np.testing.assert_allclose(float(value), float(claim), rtol=0.15, atol=0.03)
