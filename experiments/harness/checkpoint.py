"""A checkpoint is a folder that is whole or is not there, read only onto a target.

One checkpoint is `step_00000500/`: orbax's arrays, and a manifest with the step, the
configuration, the kind of every leaf and the digest of every file. It is written
beside, manifest last, and then renamed, so an interrupted save is never taken for one;
damage that comes later is found by the digests. A leaf is stored under its name, so
containers (NamedTuple, dict, NNX state, `optax.MaskedNode()`, None) come from the
target, and so does the sharding: what four devices saved loads onto two.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from experiments.harness import manifest
from experiments.harness.manifest import differences as differences
from jaxprune.arrays import processes
from jaxprune.formats import atomic

_ARRAYS = "arrays"
_PARTIAL, _REMOVED = ".partial_", ".removed_"
_STEP = re.compile(r"step_(\d{8,})")
_LISTED = 8

_log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """What a checkpoint says of itself without its arrays.

    Attributes:
      step: how many steps were done when it was saved.
      configuration: the JSON-able dictionary given to `save`; tuples are lists now.
      path: its folder.
    """

    step: int
    configuration: dict[str, Any]
    path: Path


class Restored(NamedTuple):
    """A restored checkpoint.

    Attributes:
      state: a tree like the abstract target, with its containers and shardings.
      step: how many steps were done when it was saved.
      configuration: the dictionary given to `save`; tuples are lists now.
    """

    state: Any
    step: int
    configuration: dict[str, Any]


def save(
    directory: str | os.PathLike[str],
    state: Any,
    *,
    step: int,
    configuration: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Saves a tree of arrays as the newest checkpoint of a folder.

    Returns when the checkpoint is whole on disk, so the state may be donated to the
    next step at once. All processes of a distributed run call it together, on a folder
    that they share.

    Args:
      directory: a folder that holds checkpoints only; made when it is missing.
      state: any tree of JAX or NumPy arrays: parameters, optimizer state with
        importance, masks (boolean or packed), the data position. Random keys go in
        as `jax.random.key_data(key)`.
      step: how many steps were done; grows from save to save.
      configuration: JSON-able; what a resumed run must agree with.
      keep: how many checkpoints stay, the newest ones, at least 1.

    Returns:
      The checkpoint's folder.

    Raises:
      ValueError: the folder holds other things, or a whole checkpoint of this step or
        a later one; `step` or `keep` out of range; NaN in the configuration; in a run
        of several processes, a leaf on the devices of one.
      TypeError: a leaf is no array, or the configuration no JSON.
      OSError: the checkpoint could not be written; the earlier ones are untouched.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from experiments.harness import checkpoint
      >>> folder, state = tempfile.mkdtemp(), {"w": jnp.ones(3)}
      >>> path = checkpoint.save(folder, state, step=10, configuration={"seed": 0})
      >>> path.name, checkpoint.latest(folder).configuration
      ('step_00000010', {'seed': 0})
    """
    directory = Path(directory).absolute()
    if step < 0 or keep < 1:
        raise ValueError(
            f"save needs step >= 0 and keep >= 1, got step={step} and keep={keep}."
        )
    leaves = _arrays(state)
    _check_global(leaves)
    settings = _as_json(configuration)
    stale = processes.on_first(lambda: _check_newest(directory, step))
    final = directory / f"step_{step:08d}"
    partial = directory / f"{_PARTIAL}{final.name}"

    def begin() -> None:
        _clear_leftovers(directory)
        partial.mkdir(parents=True)

    def finish() -> None:
        manifest.write(partial, step, settings, leaves)
        _commit(partial, final, stale, keep)

    try:
        processes.on_first(begin)
        processes.together(lambda: _save_arrays(partial / _ARRAYS, leaves))
        processes.on_first(finish)
    except Exception as error:
        if processes.is_first():
            shutil.rmtree(partial, ignore_errors=True)
        number, reason = _explain(error)
        raise OSError(
            number,
            f"the checkpoint of step {step} could not be written to '{directory}' "
            f"({reason}); free space there or choose another folder, earlier "
            f"checkpoints are untouched",
        ) from error
    return final


def latest(directory: str | os.PathLike[str]) -> Checkpoint | None:
    """Finds the newest whole checkpoint of a folder, reading no arrays into memory.

    Interrupted saves are not looked at. A damaged checkpoint is passed over for an
    older whole one, with a warning to this module's logger. All processes of a
    distributed run call it together; the first one looks, and all get its answer.

    Args:
      directory: a folder given to `save`; need not exist.

    Returns:
      The newest whole checkpoint, or None when nothing was saved there yet.

    Raises:
      ValueError: the folder holds other things, or checkpoints of another format
        version, or damaged checkpoints only.
    """
    found = processes.on_first(lambda: _newest(directory))
    return found and found[0]


def restore(directory: str | os.PathLike[str], abstract_state: Any) -> Restored:
    """Loads the newest whole checkpoint of a folder onto an abstract target.

    All processes of a distributed run call it together.

    Args:
      directory: a folder given to `save`.
      abstract_state: a tree like the one saved, of arrays or `jax.ShapeDtypeStruct`.
        A leaf is placed by the target's `sharding`, on the default device where that
        is None, and stays in NumPy where the target is a NumPy array.

    Returns:
      The state, its step and its configuration.

    Raises:
      FileNotFoundError: the folder holds no checkpoint.
      ValueError: as for `latest`, or the leaves' names, shapes or dtypes differ from
        the target's.
      TypeError: a leaf of the target is no array.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from experiments.harness import checkpoint
      >>> folder, state = tempfile.mkdtemp(), {"w": jnp.ones(3)}
      >>> path = checkpoint.save(folder, state, step=10, configuration={})
      >>> checkpoint.restore(folder, state).state["w"].shape
      (3,)
    """
    target = _arrays(abstract_state)
    newest = processes.on_first(lambda: _newest(directory))
    if newest is None:
        raise FileNotFoundError(
            f"'{Path(directory).absolute()}' holds no checkpoint; give the folder that "
            f"`save` was given."
        )
    found, saved = newest
    manifest.check_leaves(found.path, saved, target)
    state = _load_arrays(found.path / _ARRAYS, list(saved), target)
    leaves = [state[name] for name in target]
    tree = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
    return Restored(tree, found.step, found.configuration)


def _newest(
    directory: str | os.PathLike[str],
) -> tuple[Checkpoint, dict[str, Any]] | None:
    """The newest whole checkpoint and the kinds of its leaves."""
    directory = Path(directory).absolute()
    reasons = []
    for _, path in _scan(directory):
        try:
            body = manifest.verify(path)
        except manifest.Broken as error:
            reasons.append(f"'{path.name}' {error}")
            continue
        for reason in reasons:
            _log.warning("%s: %s; using '%s'.", directory, reason, path.name)
        found = Checkpoint(body["step"], body["configuration"], path)
        return found, body["leaves"]
    if reasons:
        raise ValueError(
            f"no checkpoint in '{directory}' is whole ({'; '.join(reasons)}); bring "
            f"the files back from a copy, or remove the folder to begin again."
        )
    return None


def _arrays(tree: Any) -> dict[str, Any]:
    """The leaves by name, refusing what is no array."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(
                f"a checkpoint holds arrays only, got {type(leaf).__name__} at "
                f"'{name}'; wrap it in jnp.asarray."
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"a checkpoint holds no typed random keys, got one at '{name}'; store "
                f"jax.random.key_data(key) and wrap it again after loading."
            )
        if name in leaves:
            raise ValueError(
                f"a checkpoint stores leaves by name, got two named '{name}'; rename "
                f"one."
            )
        leaves[name] = leaf
    return leaves


def _check_global(leaves: Mapping[str, Any]) -> None:
    if jax.process_count() == 1:
        return
    local = [
        name
        for name, leaf in leaves.items()
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable
    ]
    if local:
        raise ValueError(
            f"several processes save arrays on a mesh of all of them, got "
            f"{', '.join(map(repr, local[:_LISTED]))} on one process's devices; place "
            f"the state with `out_shardings`, `jaxprune.state_shardings` gives them."
        )


def _as_json(configuration: Mapping[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(dict(configuration), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"the configuration must be JSON-able without NaN ({error}); give numbers, "
            f"strings, lists and dictionaries."
        ) from None


def _scan(directory: Path) -> list[tuple[int, Path]]:
    """The folder's checkpoints, whole or not, newest first."""
    if not directory.exists():
        return []
    if not directory.is_dir():
        raise ValueError(f"'{directory}' must be a folder of checkpoints, got a file.")
    found, foreign = [], []
    for path in directory.iterdir():
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
        elif not path.name.startswith("."):
            foreign.append(path.name)
    if foreign:
        names = ", ".join(repr(name) for name in sorted(foreign)[:_LISTED])
        raise ValueError(
            f"'{directory}' must hold checkpoints of jaxprune only, it also holds "
            f"{names}; choose another folder."
        )
    return sorted(found, reverse=True)


def _check_newest(directory: Path, step: int) -> list[Path]:
    """Refuses whole checkpoints of `step` or later; gives the broken ones."""
    stale = []
    for other, path in _scan(directory):
        if other < step:
            continue
        try:
            manifest.verify(path)
        except manifest.Broken:
            stale.append(path)
            continue
        raise ValueError(
            f"steps must grow from save to save, got step {step} where '{path}' is "
            f"saved already; go on from it or choose another folder."
        )
    return stale


def _save_arrays(path: Path, leaves: Mapping[str, Any]) -> None:
    # Keys are numbers: a leaf's name may be empty or hold anything. An array without
    # elements is in the manifest only, orbax cannot store one.
    arrays = {
        str(index): np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
        for index, leaf in enumerate(leaves.values())
        if leaf.size
    }
    if arrays:
        with _quiet():
            ocp.save(path, arrays)


def _load_arrays(
    path: Path, names: list[str], target: Mapping[str, Any]
) -> dict[str, Any]:
    default = jnp.zeros(()).sharding
    wanted: dict[str, Any] = {}
    state: dict[str, Any] = {}
    for index, name in enumerate(names):
        leaf = target[name]
        sharding = getattr(leaf, "sharding", None) or default
        if isinstance(leaf, np.ndarray | np.generic):
            empty: Any = np.empty(leaf.shape, leaf.dtype)
        else:
            empty = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        if 0 not in leaf.shape:
            wanted[str(index)] = empty
        elif isinstance(empty, np.ndarray):
            state[name] = empty
        else:
            state[name] = jax.device_put(np.empty(leaf.shape, leaf.dtype), sharding)
    if wanted:
        with _quiet():
            loaded = ocp.load(path, wanted)
        state |= {names[int(index)]: leaf for index, leaf in loaded.items()}
    return state


def _commit(partial: Path, final: Path, stale: list[Path], keep: int) -> None:
    for path in stale:
        os.replace(path, path.with_name(f"{_REMOVED}{path.name}"))
    os.rename(partial, final)
    atomic.sync(final.parent)
    for _, path in _scan(final.parent)[keep:]:
        os.replace(path, path.with_name(f"{_REMOVED}{path.name}"))
    _clear_leftovers(final.parent)


def _clear_leftovers(directory: Path) -> None:
    for pattern in (_PARTIAL, _REMOVED):
        for path in directory.glob(f"{pattern}step_*"):
            shutil.rmtree(path, ignore_errors=True)


def _explain(error: Exception) -> tuple[int, str]:
    """The number and the words of the operating system's error behind this one."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.strerror or os.strerror(error.errno)
    text = str(error) or type(error).__name__
    # The name that tensorstore gives to a full disk or quota.
    if "RESOURCE_EXHAUSTED" in text:
        return errno.ENOSPC, os.strerror(errno.ENOSPC)
    return errno.EIO, text.strip().splitlines()[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Mutes orbax's log: it warns of what is normal, and errors are raised anyway."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
