"""A row of a table of refusals: a call, and the sentence that it is refused with.

A test folder that has some puts them in a file `refused_FOLDER.py` of its own, as
`REFUSED = {"what is wrong": Refusal(lambda: call, "part of the sentence"), ...}`, and
tests/across/test_every_refusal.py runs them. Its calls make what they need themselves:
every process of the tests imports the table.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

# A rule's verb, a value that it got, or a word of a way out.
_RULE = re.compile(
    r"\b(must|needs?|takes?|cannot|may|is|are|has|have|holds?|lacks?|does|do|was|were|"
    r"comes?|belongs?|use|pass|give|say|leave|chain|choose|set|call)\b"
)


class Refusal(NamedTuple):
    """What is refused, and how.

    Attributes:
      call: what raises, with no argument.
      says: a regular expression that the sentence has to have.
      error: the exception's type.
    """

    call: Callable[[], object]
    says: str
    error: type[Exception] = ValueError


def faults(sentence: str) -> list[str]:
    """What is wrong with an error as a sentence: a rule, the value, no full stop.

    Args:
      sentence: message of the exception.

    Returns:
      A few words for each fault; nothing for a good one.
    """
    tests = {
        "it is empty": not sentence.strip(),
        "it ends with a full stop": sentence.rstrip().endswith((".", "!", "?")),
        "it is more than a line": "\n" in sentence,
        "it is more than a sentence": re.search(r"[a-z)'\"][.!?] [A-Z][a-z]", sentence),
        "it says no rule": not _RULE.search(sentence),
    }
    return [fault for fault, wrong in tests.items() if wrong]
