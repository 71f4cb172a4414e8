"""The options of a command in groups, as --help shows them.

A command is a flat dataclass that inherits the options which several commands share.
tyro makes a group of each nested dataclass. So each command gets a nested twin, which
tyro fills, and of which `flat` makes the command.
"""

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import tyro

_SECTION = "Attributes:\n"
_METAVARS: dict[Any, str] = {
    float: "NUMBER",
    float | None: "NUMBER",
    int: "N",
    int | None: "N",
    str: "TEXT",
    str | None: "TEXT",
    tuple[Path, ...]: "FILE [FILE ...]",
    tuple[int, ...]: "N [N ...]",
    tuple[str, ...]: "NAME [NAME ...]",
}


def nested(command: type[Any], *, whole: bool) -> type[Any]:
    """The twin of a command: a dataclass with a nested one for each group of options.

    Args:
      command: a dataclass. `GROUPS` of it and of its bases name options by group; those
        in no group are at the top. Its `EXAMPLE` ends its help.
      whole: whether its description is all that its docstring says and the example, or
        the first sentence.

    Returns:
      The dataclass, for `tyro.cli`.
    """
    hints = get_type_hints(command, include_extras=True)
    options = {
        field.name: (field.name, _shown(field, hints[field.name]), _default(field))
        for field in dataclasses.fields(command)
    }
    described = _attributes(command)
    inner: list[Any] = []
    for group, names in _groups(command).items():
        fields = [options.pop(name) for name in names]
        kind = dataclasses.make_dataclass(group, fields, kw_only=True)
        kind.__doc__ = f"{group}.\n\n{described}"
        shown = Annotated[kind, tyro.conf.arg(name=group, help="")]  # type: ignore[valid-type]
        inner.append((f"{group}_options", shown))
    twin = dataclasses.make_dataclass(
        command.__name__, [*options.values(), *inner], kw_only=True
    )
    twin.__doc__ = f"{_description(command, whole=whole)}\n\n{described}"
    return twin


def flat(command: type[Any], filled: Any) -> Any:
    """The command of a twin that tyro has filled."""
    return command(**dict(_values(filled)))


def _values(filled: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(filled):
        value = getattr(filled, field.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value)
        else:
            yield field.name, value


def _groups(command: type[Any]) -> dict[str, list[str]]:
    """Name of a group to its options: the command's own groups come first."""
    found: dict[str, list[str]] = {}
    for kind in command.__mro__:
        for group, names in vars(kind).get("GROUPS", {}).items():
            # Within a group what several commands share comes first.
            found[group] = [*names, *found.get(group, [])]
    return found


def _shown(field: dataclasses.Field[Any], hint: Any) -> Any:
    """An option's type with what --help says of its default and its values."""
    if get_origin(hint) is Annotated:  # it says so itself
        return hint
    # What is done where it is left out stands in the option's own words.
    unset = field.default is None or field.default is False or field.default == ()
    return Annotated[
        hint,
        tyro.conf.arg(
            prefix_name=False,
            metavar=_METAVARS.get(hint),
            help_behavior_hint="" if unset else None,
        ),
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is dataclasses.MISSING:
        return dataclasses.field()
    return dataclasses.field(default=field.default)


def _description(command: type[Any], *, whole: bool) -> str:
    text = inspect.cleandoc(command.__doc__ or "").partition(_SECTION)[0].rstrip()
    if not whole:
        return text.partition("\n\n")[0]
    return f"{text}\n\nFor example:\n  {command.EXAMPLE}"


def _attributes(command: type[Any]) -> str:
    """The section that describes the options; of two descriptions the nearer counts."""
    parts = [
        inspect.cleandoc(kind.__doc__ or "").partition(_SECTION)[2]
        for kind in reversed(command.__mro__)
        if dataclasses.is_dataclass(kind)
    ]
    return _SECTION + "\n".join(filter(None, parts))
