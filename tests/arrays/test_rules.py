"""Rules as data: the first broken one speaks, to Python and to the command."""

import math

import pytest

from jaxprune.arrays.rules import (
    Rule,
    check,
    command_words,
    excludes,
    finds_none,
    needs,
    refusal,
    reworded,
    within,
)

RULES = (
    within("share", 0, 1, "share must lie in [0, 1], got {share}", "give 0.5"),
    excludes("mesh", "refine", "refine takes no mesh", "leave one out", command="no"),
    needs("bits", "group", "bits need a group", "give {bits} and a group"),
    Rule(lambda v: v.share != 0.25, "a quarter is refused", error=TypeError),
)
NONE = {"share": None, "mesh": None, "refine": None, "bits": None, "group": None}


@pytest.mark.parametrize("share", [None, 0, 0.5, 1])
def test_what_keeps_all_rules_passes(share):
    check(RULES, **{**NONE, "share": share})


@pytest.mark.parametrize(
    ("values", "sentence", "command"),
    [
        ({"share": 1.5}, "share must lie in [0, 1], got 1.5; give 0.5", None),
        ({"share": math.nan}, "share must lie in [0, 1], got nan; give 0.5", None),
        (
            {"mesh": 1, "refine": 2, "bits": 3},
            "refine takes no mesh; leave one out",
            "refine takes no mesh; no",
        ),
        ({"bits": 4}, "bits need a group; give 4 and a group", None),
        ({"share": 0.25}, "a quarter is refused", None),
    ],
)
def test_the_first_broken_rule_speaks(values, sentence, command):
    with pytest.raises((ValueError, TypeError)) as refusal:
        check(RULES, **{**NONE, **values})
    assert str(refusal.value) == sentence
    assert refusal.value.command == (command or sentence)


def test_all_that_breaks_a_rule_is_named_at_once():
    def negative(values):
        return [name for name, size in values.sizes.items() if size < 0]

    rule = finds_none(negative, "{what} must be positive, but {names} are not")
    check([rule], sizes={"a": 1}, what="sizes")
    sentence = "sizes must be positive, but 'b', 'c' are not"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        check([rule], sizes={"a": 1, "b": -1, "c": -2}, what="sizes")


def test_a_rule_names_its_error():
    with pytest.raises(TypeError):
        check(RULES, **{**NONE, "share": 0.25})


def test_a_refusal_says_the_way_out_to_both():
    refused = refusal("no place", "pass place=", "give --place", OSError)
    assert isinstance(refused, OSError)
    assert str(refused) == "no place; pass place="
    assert command_words(refused) == "no place; give --place"
    moved = reworded(refused, ValueError, "'a': ")
    assert str(moved) == "'a': no place; pass place="
    assert command_words(moved) == "'a': no place; give --place"
    assert command_words(KeyError("x")) == "'x'"
