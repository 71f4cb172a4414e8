"""A run's checkpoints: steps that orbax saves, each with a manifest of its files.

`orbax.checkpoint.v1.training.Checkpointer` names the steps, writes each one beside and
renames it, on all processes at once, and places what it loads. Added here: the manifest
(`experiments.harness.manifest`), written into a step's directory after orbax is done.
A step without a whole one is not taken for a checkpoint, so an interrupted save
never is, and damage that comes later is found. Leaves are stored by number and named in
the manifest, so containers (NamedTuple, dict, NNX state, `optax.MaskedNode()`, None)
come from the target, and so does the sharding: what four devices saved loads onto two.
"""

import contextlib
import errno
import logging
import operator
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from experiments.harness import checkpoint_leaves, manifest
from jaxprune.arrays import processes

_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of what orbax has not renamed yet


# Of a repeated leaf each replica would write a slice, and each slice of each shape is a
# program to compile: hundreds at the first save of a small model.
_SMALLEST_SLICE = 2**20

_log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A whole checkpoint.

    Attributes:
      step: how many steps were done when it was saved.
      configuration: the JSON-able dictionary given to `save`; tuples are lists now, and
        keys that were numbers are strings.
      path: its directory.
      state: a tree like the target, with its containers and shardings; None where only
        the manifest was read.
    """

    step: int
    configuration: dict[str, Any]
    path: Path
    state: Any = None


def save(
    directory: str | os.PathLike[str],
    state: Any,
    *,
    step: int,
    configuration: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Saves a tree of arrays as the newest checkpoint of a directory; returns its path.

    Returns when the checkpoint is whole on disk, so the state may be donated to the
    next step at once. All processes of a distributed run call it together, on a
    directory that they share.

    Args:
      directory: directory of checkpoints alone; made when it is missing.
      state: tree of JAX or NumPy arrays: parameters, optimizer state with
        importance, masks (boolean or packed), the data position. Random keys are
        given as `jax.random.key_data(key)`.
      step: number of steps that were done, any integer, `state.step` too; grows from
        save to save.
      configuration: settings that a resumed run must agree with, JSON-able.
      keep: number of checkpoints that stay, the newest ones, at least 1.

    Raises:
      ValueError: the directory holds other things, or a whole checkpoint of this step
        or a later one; `step` or `keep` out of range; NaN in the configuration; in a
        run of several processes, a leaf on the devices of one.
      TypeError: a leaf is no array, the configuration no JSON, or the step no integer.
      OSError: the checkpoint could not be written; the earlier ones are untouched.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from experiments.harness import checkpoint
      >>> directory, state = tempfile.mkdtemp(), {"w": jnp.ones(3)}
      >>> path = checkpoint.save(directory, state, step=10, configuration={"seed": 0})
      >>> path.name, checkpoint.latest(directory).configuration
      ('10', {'seed': 0})
      >>> checkpoint.restore(directory, state).state["w"].shape
      (3,)
    """
    directory = Path(directory).absolute()
    step = _integer(step)
    if not (step >= 0 and keep >= 1):
        raise ValueError(
            f"save needs step >= 0 and keep >= 1, got step={step} and keep={keep}"
        )
    leaves = checkpoint_leaves.by_name(state)
    checkpoint_leaves.check_global(leaves)
    settings = manifest.as_json(configuration)
    # Before anything is written: a refused save leaves the directory as it was.
    broken = processes.on_first(lambda: _check_newest(directory, step))
    path = directory / str(step)

    def finish() -> None:
        manifest.write(path, step, settings, leaves)
        _remove(directory, _steps(directory)[keep:])

    def clear() -> None:
        # orbax's own way to do it is a thread that outlives a save that fails.
        _remove(directory, broken)
        _remove_unfinished(directory, "*")

    try:
        processes.on_first(clear)
        with _quiet(), _checkpointer(directory) as checkpointer:
            _save_arrays(checkpointer, step, leaves)
        processes.on_first(finish)
    # orbax and tensorstore raise errors of many types for a full disk.
    except Exception as error:
        if processes.is_first():
            shutil.rmtree(path, ignore_errors=True)
            _remove_unfinished(directory, step)
        # An OSError with the errno of the cause, so that callers can tell a full disk.
        number, reason = _explain(error)
        raise OSError(
            number,
            f"the checkpoint of step {step} could not be written to '{directory}' "
            f"({reason}); free space there or choose another directory, earlier "
            f"checkpoints are untouched",
        ) from error
    return path


def latest(directory: str | os.PathLike[str]) -> Checkpoint | None:
    """The newest whole checkpoint of a directory, its arrays unread, if there is one.

    A damaged checkpoint is passed over for an older whole one, with a warning to this
    module's logger. All processes of a distributed run call it together; the first one
    looks, and all get its answer.

    Raises:
      ValueError: the directory holds other things, or checkpoints of another format
        version, or damaged checkpoints only.
    """
    newest = processes.on_first(lambda: _newest(Path(directory).absolute()))
    return newest and newest[0]


def restore(directory: str | os.PathLike[str], abstract_state: Any) -> Checkpoint:
    """Loads the newest whole checkpoint of a directory onto an abstract target.

    All processes of a distributed run call it together. The target is a tree like the
    one saved, of arrays or `jax.ShapeDtypeStruct`: a leaf is placed by the target's
    `sharding`, on the default device where that is None, and stays in NumPy where the
    target is a NumPy array.

    Raises:
      FileNotFoundError: the directory holds no checkpoint.
      ValueError: as for `latest`, or the leaves' names, shapes or dtypes differ from
        the target's.
      TypeError: a leaf of the target is no array.
    """
    target = checkpoint_leaves.by_name(abstract_state)
    newest = processes.on_first(lambda: _newest(Path(directory).absolute()))
    if newest is None:
        raise FileNotFoundError(
            f"'{Path(directory).absolute()}' holds no checkpoint; give the directory "
            f"that `save` was given"
        )
    snapshot, saved = newest  # and the dtype and shape of each saved leaf
    manifest.check_leaves(snapshot.path, saved, target)
    state = _load_arrays(snapshot.path, list(saved), target)
    tree = jax.tree.unflatten(
        jax.tree.structure(abstract_state), [state[name] for name in target]
    )
    return snapshot._replace(state=tree)


def _integer(step: Any) -> int:
    """A step as JSON has it, from Python, NumPy or JAX."""
    try:
        return operator.index(step)
    except TypeError:
        raise TypeError(f"save needs an integer step, got {step!r}") from None


def _newest(directory: Path) -> tuple[Checkpoint, dict[str, Any]] | None:
    """The newest whole checkpoint and the kinds of its leaves."""
    reasons, damaged = [], False
    for step in _steps(directory):
        path = directory / str(step)
        try:
            body = manifest.verify(path)
        except manifest.Broken as error:
            reasons.append(f"'{path.name}' {error}")
            # A save that was interrupted is no damage: the step before it is whole.
            damaged |= not isinstance(error, manifest.Unfinished)
            continue
        for reason in reasons:
            _log.warning("%s: %s; using '%s'", directory, reason, path.name)
        return Checkpoint(step, body["configuration"], path), body["leaves"]
    if damaged:
        raise ValueError(
            f"no checkpoint in '{directory}' is whole ({'; '.join(reasons)}); bring "
            f"the files back from a copy, or remove the directory to begin again"
        )
    return None


def _check_newest(directory: Path, step: int) -> list[int]:
    """Refuses whole checkpoints of `step` or later; gives the broken ones."""
    broken = []
    # Newest first, so the first one below `step` ends the search.
    for saved_step in _steps(directory):
        if saved_step < step:
            break
        try:
            manifest.verify(directory / str(saved_step))
        except manifest.Broken:
            broken.append(saved_step)
            continue
        raise ValueError(
            f"steps must grow from save to save, got step {step} where "
            f"'{directory / str(saved_step)}' is saved already; continue from it "
            f"or choose another directory"
        )
    return broken


def _remove(directory: Path, steps: list[int]) -> None:
    # orbax' own way to keep the newest would do so before there is a manifest.
    for step in steps:
        shutil.rmtree(directory / str(step), ignore_errors=True)


def _remove_unfinished(directory: Path, step: int | str) -> None:
    for path in directory.glob(f"{step}{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _steps(directory: Path) -> list[int]:
    """The steps that orbax has renamed, whole or not, newest first."""
    if not directory.exists():
        return []
    if not directory.is_dir():
        raise ValueError(
            f"'{directory}' must be a directory of checkpoints, got a file"
        )
    steps, foreign = [], []
    for path in directory.iterdir():
        # "007" is no name that orbax gives.
        if path.is_dir() and path.name.isdecimal() and path.name == str(int(path.name)):
            steps.append(int(path.name))
        elif not path.name.startswith(".") and _UNFINISHED not in path.name:
            foreign.append(repr(path.name))
    if foreign:
        raise ValueError(
            f"'{directory}' must hold checkpoints only, it also holds "
            f"{', '.join(sorted(foreign)[: manifest.LISTED])}; choose another directory"
        )
    return sorted(steps, reverse=True)


def _checkpointer(directory: Path) -> ocp.training.Checkpointer:
    saving = ocp.options.ArrayOptions.Saving(
        min_slice_bytes_for_replica_parallel=_SMALLEST_SLICE
    )
    context = ocp.Context(array_options=ocp.options.ArrayOptions(saving=saving))
    return ocp.training.Checkpointer(directory, context=context)


def _save_arrays(
    checkpointer: ocp.training.Checkpointer, step: int, leaves: Mapping[str, Any]
) -> None:
    # Keys are numbers: a leaf's name may be empty or hold anything. orbax stores no
    # array without elements and no empty tree, so those are in the manifest only and
    # the step is in every tree. Without `force` it skips a step below its newest.
    arrays = {
        str(index): np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
        for index, leaf in enumerate(leaves.values())
        if leaf.size
    }
    checkpointer.save(step, {"step": np.asarray(step), **arrays}, force=True)


def _load_arrays(
    path: Path, names: list[str], target: Mapping[str, Any]
) -> dict[str, Any]:
    # Of the default device, whatever that is set to.
    default = jnp.zeros(()).sharding
    abstract: dict[str, Any] = {"step": ocp.PLACEHOLDER}
    state: dict[str, Any] = {}
    for index, name in enumerate(names):
        leaf = target[name]
        sharding = getattr(leaf, "sharding", None) or default
        in_numpy = isinstance(leaf, np.ndarray | np.generic)
        if 0 in leaf.shape:
            empty = np.empty(leaf.shape, leaf.dtype)
            state[name] = empty if in_numpy else jax.device_put(empty, sharding)
        elif in_numpy:
            # orbax reads into the kind of array that the target has.
            abstract[str(index)] = np.empty(leaf.shape, leaf.dtype)
        else:
            abstract[str(index)] = jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            )
    if len(abstract) > 1:
        with _quiet():
            loaded = ocp.load(path, abstract)
        state |= {names[int(i)]: leaf for i, leaf in loaded.items() if i != "step"}
    return state


def _explain(error: Exception) -> tuple[int, str]:
    """The number and the words of the operating system's error behind this one."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.strerror or os.strerror(error.errno)
    text = str(error) or type(error).__name__
    # The name that tensorstore gives to a full disk or quota.
    if "RESOURCE_EXHAUSTED" in text:
        return errno.ENOSPC, os.strerror(errno.ENOSPC)
    # The rest of a tensorstore error is a stack of its own annotations.
    return errno.EIO, text.strip().splitlines()[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Mutes orbax's log: it warns of what is normal, and errors are raised anyway."""
    # By absl's logger, and in some of its modules by the root's.
    loggers = logging.getLogger("absl"), logging.getLogger()
    for logger in loggers:
        logger.addFilter(_is_not_of_orbax)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_not_of_orbax)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts
