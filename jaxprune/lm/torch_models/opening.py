"""A directory as the torch module of the class that its config.json names.

Which tensor of the directory a parameter is, transformers says: it reverts the changes
of names and layouts that it made when it loaded them. That is held against the files
before anything is done, so what is written later has the names that were read.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from jaxprune import leaves
from jaxprune.arrays.messages import first_line, listed
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.checkpoints.finite import check_names, nonfinite_tensors
from jaxprune.lm.steps.exclusions import matches_any
from jaxprune.torch.conversion import as_numpy, as_tensor
from jaxprune.typing import Prunable


class TorchModel(NamedTuple):
    """A directory and the module that it holds.

    Attributes:
      source: the directory.
      module: torch module in eval mode.
      unread: names of tensors that the class does not read; they are copied.
    """

    source: CheckpointDir
    module: Any
    unread: tuple[str, ...]

    @property
    def class_name(self) -> str:
        """Name of the module's class, as config.json has it."""
        return type(self.module).__name__


def open_torch_model(source: CheckpointDir, dtype: str | None = None) -> TorchModel:
    """Loads the module of a directory.

    Args:
      source: directory whose weights are finite.
      dtype: dtype of the parameters; None as they are stored.

    Returns:
      The module, with all parameters in memory.

    Raises:
      ValueError: transformers has no such class, a weight of it is missing or has
        another shape, a tensor is NaN, or it is not known what became of one.
    """
    check_names(nonfinite_tensors(source))
    module, info = load_module(source.path, class_of(source.config), dtype)
    class_name = type(module).__name__
    if missing := sorted(map(str, info["missing_keys"])):
        raise ValueError(
            f"'{source.path}' must hold all weights of {class_name}, but lacks "
            f"{listed(missing)}; bring the files back from a copy, or name the class "
            "that they are of in config.json"
        )
    if mismatched := sorted(map(str, info["mismatched_keys"])):
        raise ValueError(
            f"'{source.path}' must hold weights of the shapes that {class_name} has, "
            f"but {listed(mismatched)} differ; repair the sizes in config.json"
        )
    # Caches of keys and values are for generation, and only in the way here.
    module.config.use_cache = False
    # Every tensor must be known again, or it could not be written.
    stored = stored_tensors(module)
    unread = [name for name in source.tensors if name not in stored]
    # What transformers does not expect, as a pooler that the class has not, is copied.
    foreign = [name for name in unread if name not in info["unexpected_keys"]]
    changed = changed_tensors(source, stored)
    if unknown := [*foreign, *changed]:
        raise ValueError(
            f"each tensor must be one that {class_name} has read as it is stored, but "
            f"it has other values for {listed(unknown)}; load the directory in "
            "transformers, save it with save_pretrained, and give that"
        )
    return TorchModel(source, module, tuple(unread))


def _stored_dtype(source: CheckpointDir) -> str | None:
    """The widest floating dtype of the tensors that torch computes in, if any."""
    dtypes = {info.dtype.name for info in source.tensors.values()}
    return next((name for name in _WIDEST_FIRST if name in dtypes), None)


_WIDEST_FIRST = ("float64", "float32", "bfloat16", "float16")


def class_of(config: Any) -> Any:
    """The class of transformers that a config.json names.

    Args:
      config: content of the config.json.

    Returns:
      The class.

    Raises:
      ValueError: transformers has none of that name.
    """
    name = config["architectures"][0] if config["architectures"] else ""
    model_class = getattr(transformers, str(name), None)
    # Code that a directory brings itself is never run.
    if not (inspect.isclass(model_class) and hasattr(model_class, "from_pretrained")):
        raise ValueError(
            "config.json must name a class of transformers, but "
            f"{transformers.__version__} has no {name!r} (model_type "
            f"{config.get('model_type')}); install the transformers that has it; code "
            "that a directory brings is not run"
        )
    return model_class


def load_module(path: Any, module_class: Any, dtype: str | None = None) -> Any:
    """The module of a directory and what transformers says of its loading.

    Args:
      path: the directory.
      module_class: class of transformers.
      dtype: dtype of the parameters; None as they are stored.

    Returns:
      The module in eval mode, and the loading info.

    Raises:
      ValueError: transformers refuses the directory.
    """
    # config.json, which "auto" goes by, may say another than the files have.
    dtype = dtype or _stored_dtype(open_directory(path))
    with silent_transformers():
        try:
            module, info = module_class.from_pretrained(
                path,
                dtype="auto" if dtype is None else getattr(torch, dtype),
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                # Reported with all others, not raised in transformers' own words.
                ignore_mismatched_sizes=True,
            )
        except (TypeError, KeyError, AttributeError, RuntimeError) as failure:
            raise ValueError(
                f"{module_class.__name__} of transformers cannot be loaded from "
                f"'{path}' ({type(failure).__name__}: {failure}); look at config.json"
            ) from failure
    return module.eval(), info


def load_reader(
    loader: Any, model: TorchModel, inputs: str, reader: str, instead: str
) -> Any:
    """The tokenizer or processor in the directory of a model.

    Args:
      loader: class of transformers that loads it.
      model: directory and module.
      inputs: what it is for, in words.
      reader: what it is, in words.
      instead: what the user can give in its place, in words.

    Returns:
      The tokenizer or processor.

    Raises:
      ValueError: there is none that transformers can load.
    """
    path = model.source.path
    with silent_transformers():
        try:
            return loader.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, ImportError, KeyError, TypeError) as failure:
            raise ValueError(
                f"{inputs} needs the model's own {reader}, but '{path}' has none that "
                f"transformers can load ({first_line(failure)}); give {instead}"
            ) from failure


@contextlib.contextmanager
def silent_transformers() -> Iterator[None]:
    """Without transformers' bars and warnings, which are not the command's."""
    logger = transformers.utils.logging  # settings of the process, put back below
    verbosity, bars = logger.get_verbosity(), logger.is_progress_bar_enabled()
    logger.set_verbosity_error()
    logger.disable_progress_bar()
    try:
        yield
    finally:
        logger.set_verbosity(verbosity)
        if bars:
            logger.enable_progress_bar()


def stored_tensors(module: Any) -> dict[str, Any]:
    """The tensors of a module as they are stored, by the names of its directory.

    Args:
      module: torch module that `from_pretrained` loaded.

    Returns:
      {name: tensor}, tied ones under all their names.
    """
    # Both names of a tied tensor, since directories have one or the other.
    with silent_transformers(), torch.no_grad():
        return dict(revert_weight_conversion(module, module.state_dict()))


def parameters_of_tensors(module: Any) -> dict[str, set[str]]:
    """Which parameters each stored tensor holds, in whole or in part.

    Args:
      module: torch module that `from_pretrained` loaded.

    Returns:
      {name of a tensor: names of parameters}. A tied parameter has one name, its first;
      its tensors are there under all their names.
    """
    tensors = module.state_dict(keep_vars=True)
    # By identity: tied ones are one object.
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    names = list(first.values())
    # Whole numbers up to 2^24; what is joined on the way takes four bytes a weight.
    numbers = {
        key: torch.tensor(number, dtype=torch.float32)
        for number, key in enumerate(first)
    }
    # Loading may have joined tensors or split them. So each number, as a tensor without
    # memory of its own, is sent the way back, and arrives where the parameter would.
    marks = {
        name: numbers[id(tensor)].expand(tensor.shape)
        for name, tensor in tensors.items()
    }
    with silent_transformers(), torch.no_grad():
        stored = revert_weight_conversion(module, marks)
    return {
        name: {names[int(number)] for number in _distinct_values(mark)}
        for name, mark in stored.items()
    }


def _distinct_values(mark: Any) -> list[float]:
    if mark.numel() and not any(mark.stride()):  # still one number, repeated
        mark = mark.flatten()[:1]
    return mark.unique().tolist()


def changed_tensors(source: CheckpointDir, stored: Any) -> list[str]:
    """The names of a directory's tensors that a module has other values for.

    Args:
      source: the directory.
      stored: {name: tensor} of `stored_tensors`.

    Returns:
      Names, in the order of the files.
    """
    return [
        name
        for name in source.tensors
        if name in stored and not _is_equal(source.read(name), stored[name])
    ]


def round_as_stored(
    source: CheckpointDir, module: Any, by_tensor: Mapping[str, set[str]]
) -> None:
    """Rounds the weights of a module to what its directory can hold, in place.

    Args:
      source: directory that the module was loaded from.
      module: module, in a dtype that may be wider than that of the files.
      by_tensor: parameters of each tensor; see `parameters_of_tensors`.
    """
    dtypes: dict[str, set[np.dtype]] = {}
    for name, parameters in by_tensor.items():
        for parameter in parameters if name in source.tensors else ():
            dtypes.setdefault(parameter, set()).add(source.tensors[name].dtype)
    # The parameters, not the tensors: those that were split or joined are copies.
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            for dtype in dtypes.get(name, ()):
                values = as_numpy(tensor)
                tensor.copy_(as_tensor(values.astype(dtype).astype(values.dtype)))


def _is_equal(array: np.ndarray, tensor: Any) -> bool:
    values = as_numpy(tensor)
    # In the loaded dtype, narrower or wider: rounding on the way in is no change.
    return values.shape == array.shape and bool(
        (values == array.astype(values.dtype)).all()
    )


def prunable_parameter(module: Any, exclude: tuple[str, ...]) -> Prunable:
    """The rule for parameters of a module: matrices and convolutions of its layers.

    Args:
      module: torch module of transformers.
      exclude: globs on the names of parameters.

    Returns:
      Whether a parameter, by its name and shape, may be pruned.
    """
    kept = _embedding_names(module)

    def may_be_pruned(name: str, leaf: Any) -> bool:
        allowed = leaves.prunable(name, leaf) and name not in kept
        return allowed and not matches_any(name, exclude)

    return may_be_pruned


def _embedding_names(module: Any) -> set[str]:
    """The parameters of embeddings and of the head that predicts tokens."""
    parts = [part for part in module.modules() if isinstance(part, torch.nn.Embedding)]
    getter = getattr(module, "get_output_embeddings", None)
    if getter is not None and getter() is not None:
        parts.append(getter())
    # By identity: a tied head is called as the embedding is.
    shared = {id(parameter) for part in parts for parameter in part.parameters()}
    return {n for n, parameter in module.named_parameters() if id(parameter) in shared}
