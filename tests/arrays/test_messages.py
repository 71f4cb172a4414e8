"""Errors name the first few of many leaves, and say how many more there are."""

import pytest

from jaxprune.arrays.messages import listed


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([], ""),
        (["a"], "'a'"),
        (("a", "b"), "'a', 'b'"),
        ({"a": 1, "b": 2}, "'a', 'b'"),
        ([3, 4], "3, 4"),
        (list("abcdefg"), "'a', 'b', 'c', 'd', 'e', 'f' and 1 more"),
        (range(10), "0, 1, 2, 3, 4, 5 and 4 more"),
    ],
)
def test_the_first_few_are_named_and_the_rest_is_counted(items, expected):
    assert listed(items) == expected
