"""What a checkpoint's directory says of itself: written last, checked first.

The manifest has the step, the configuration, the name, shape and dtype of every leaf,
the size and SHA-256 of every file, and its own digest. A directory without a valid
manifest, or with a file that differs from it, is not whole.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.files.atomic import digest, sync

FORMAT = "jaxprune.checkpoint"
VERSION = 1
LISTED = 8
"""How many names an error lists."""

_NAME = "checkpoint.json"


class Broken(Exception):
    """A checkpoint's directory is not whole; the message says why."""


class Unfinished(Broken):
    """Its save was interrupted: there is no manifest yet."""


def write(
    directory: Path, step: int, configuration: Any, leaves: Mapping[str, Any]
) -> None:
    """Describes a directory whose other files are complete, and syncs it to disk."""
    body = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "configuration": configuration,
        "leaves": {name: _spec(leaf) for name, leaf in leaves.items()},
        "files": {
            path.relative_to(directory).as_posix(): _fingerprint(path)
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        },
    }
    partial = directory / f".{_NAME}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(body | {"digest": _digest(body)}, file, indent=1)
        file.flush()
        # The rename may reach the disk before the content, and a power cut lies
        # between.
        os.fsync(file.fileno())
    # Last of all: from here on the directory counts as whole.
    os.replace(partial, directory / _NAME)
    sync(directory)


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's directory, after every file was compared with it.

    Raises:
      Broken: the directory is not whole.
      ValueError: it is of another format or version.
    """
    try:
        body = json.loads((path / _NAME).read_bytes())
        # The digest is of all the other entries, itself left out.
        digest_matches = body.pop("digest") == _digest(body)
        format_, version = body["format"], body["version"]
    except FileNotFoundError:
        raise Unfinished(f"has no {_NAME}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Broken(f"has a damaged {_NAME}") from None
    if not digest_matches:
        raise Broken(f"has a damaged {_NAME}")
    if (format_, version) != (FORMAT, VERSION):
        raise ValueError(
            f"'{path}' must be of format {FORMAT} version {VERSION}, got {format_} "
            f"version {version}; read it with the jaxprune that wrote it, or choose "
            f"another directory"
        )
    for name, fingerprint in body["files"].items():
        try:
            intact = _fingerprint(path / name) == fingerprint
        except OSError:
            raise Broken(f"has no readable file '{name}'") from None
        if not intact:
            raise Broken(f"has a damaged file '{name}'")
    return dict(body)


def check_leaves(
    path: Path, saved: Mapping[str, Any], target: Mapping[str, Any]
) -> None:
    """Refuses a checkpoint whose leaves are not the target's, naming each difference.

    Raises:
      ValueError: a name, shape or dtype differs.
    """
    specs = {name: _spec(leaf) for name, leaf in target.items()}
    problems = [
        f"'{name}' is {_spell(saved.get(name))} in it and {_spell(specs.get(name))} "
        f"in the target"
        for name in {**saved, **specs}
        if saved.get(name) != specs.get(name)
    ]
    if problems:
        unlisted = len(problems) - LISTED
        tail = f"; and {unlisted} more" if unlisted > 0 else ""
        raise ValueError(
            f"'{path}' must have the leaves of the target, but "
            f"{'; '.join(problems[:LISTED])}{tail}; build the model and the optimizer "
            f"that it was saved from, or choose another directory"
        )


def as_json(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as its JSON holds it: tuples are lists.

    Raises:
      ValueError: there is a NaN in it.
      TypeError: something in it is no JSON.
    """
    try:
        return dict(json.loads(json.dumps(dict(configuration), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"the configuration must be JSON-able without NaN ({error}); give numbers, "
            f"strings, lists and dictionaries"
        ) from None


def _fingerprint(path: Path) -> list[Any]:
    return [path.stat().st_size, digest(path)]


def _digest(body: Mapping[str, Any]) -> str:
    # Sorted: JSON read back may have its keys in another order.
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _spell(spec: list[Any] | None) -> str:
    return "absent" if spec is None else f"{spec[1]}{tuple(spec[0])}"


def _spec(leaf: Any) -> list[Any]:
    # Lists, because tuples would come back from JSON as lists and compare unequal.
    return [list(leaf.shape), np.dtype(leaf.dtype).name]
