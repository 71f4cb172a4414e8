"""A step of a program as a rule of its primitive sees it.

A program is interpreted several times: its values are dimensions of axes, or views of a
leaf, or sizes that change when units are removed. Each interpretation has a rule for
each primitive (`primitives`), and every rule takes an `Equation`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

Value = TypeVar("Value")


class Equation(NamedTuple, Generic[Value]):
    """One primitive applied to the values that an interpretation has for its operands.

    Attributes:
      name: name of the primitive.
      params: parameters of the primitive.
      operands: value of each operand.
      shapes: shape of each result.
    """

    name: str
    params: Mapping[str, Any]
    operands: Sequence[Value]
    shapes: Sequence[tuple[int, ...]]
