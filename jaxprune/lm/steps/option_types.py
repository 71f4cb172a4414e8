"""The types of options, and what --help writes for them.

A setting that is None, empty or off says in its own words what is done then, so --help
adds no default to it.
"""

from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_args

import tyro
from tyro.constructors import PrimitiveConstructorSpec

# tyro's own words for these would be INT, FLOAT, STR and PATH, and {None}|INT.
_arg = tyro.conf.arg

UNSET = _arg(help_behavior_hint="")
"""Of an option whose default says nothing."""


def choice_of(literal: Any) -> PrimitiveConstructorSpec[Any]:
    """The words of a `Literal`, for an option that may be left out as well.

    tyro itself makes "None" one of the words that an error lists, in any order.

    Args:
      literal: `typing.Literal` of the words.

    Returns:
      What tyro reads the option by.
    """
    words = get_args(literal)
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(words) + "}",
        instance_from_str=lambda strings: strings[0],
        is_instance=lambda value: value is None or value in words,
        str_from_instance=lambda value: [str(value)],
        choices=words,
    )


Switch: TypeAlias = Annotated[bool, UNSET]
Number: TypeAlias = Annotated[float, _arg(metavar="NUMBER")]
Count: TypeAlias = Annotated[int, _arg(metavar="N")]
MaybeNumber: TypeAlias = Annotated[
    float | None, _arg(metavar="NUMBER", help_behavior_hint="")
]
MaybeCount: TypeAlias = Annotated[int | None, _arg(metavar="N", help_behavior_hint="")]
MaybeText: TypeAlias = Annotated[
    str | None, _arg(metavar="TEXT", help_behavior_hint="")
]
MaybePath: TypeAlias = Annotated[
    Path | None, _arg(metavar="MODEL", help_behavior_hint="")
]
Files: TypeAlias = Annotated[
    tuple[Path, ...], _arg(metavar="FILE [FILE ...]", help_behavior_hint="")
]
Counts: TypeAlias = Annotated[
    tuple[int, ...], _arg(metavar="N [N ...]", help_behavior_hint="")
]
Names: TypeAlias = Annotated[
    tuple[str, ...], _arg(metavar="NAME [NAME ...]", help_behavior_hint="")
]
ModelPath: TypeAlias = Annotated[tyro.conf.Positional[Path], _arg(metavar="MODEL")]
OutPath: TypeAlias = Annotated[tyro.conf.Positional[Path], _arg(metavar="OUT")]
FilePath: TypeAlias = Annotated[tyro.conf.Positional[Path], _arg(metavar="FILE")]
