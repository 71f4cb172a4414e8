"""Data sets of TensorFlow Datasets, prepared once and read without TensorFlow.

A prepared data set is written beside and renamed, so preparing may be interrupted or
run twice at once.
"""

import importlib
import sys
from pathlib import Path
from typing import Any


def examples(
    name: str,
    split: str,
    data_dir: Path | str | None = None,
    *,
    instead: str | None = None,
) -> list[dict[str, Any]]:
    """The examples of a split, features by name, in the order they were made.

    Args:
      name: name of a module of `experiments.datasets` with a `Builder`.
      split: "train" or "validation".
      data_dir: directory of prepared data sets; None: TensorFlow Datasets' default.
      instead: advice to the user where a package is missing.

    Raises:
      ModuleNotFoundError: if a package of the extra `experiments` is missing.
      ConnectionError: if a download fails.
      OSError: if `data_dir` cannot be written, or what is prepared there is damaged.
    """
    return _read(_prepared_builder(name, data_dir, instead), split)


def _prepared_builder(
    name: str, data_dir: Path | str | None, instead: str | None
) -> Any:
    # Imported here, for it takes a second and a user's own text does not need it.
    try:
        tfds = importlib.import_module("tensorflow_datasets")
        module = importlib.import_module(f"experiments.datasets.{name}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the data set {name!r} needs the package {error.name!r}, which is not "
            "installed; install the extra with `pip install '.[experiments]'`"
            + (f", or {instead}" if instead else ""),
            name=error.name,
        ) from error
    # In a log each step of a bar would be a line.
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()

    def make() -> Any:
        return module.Builder(data_dir=data_dir, file_format="array_record")

    builder = make()
    try:
        builder.download_and_prepare(
            # Prepared data sets in TFDS's bucket are those of its own builders.
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except ConnectionError:
        raise
    except OSError as error:
        # Another process that prepares it too may have renamed its directory first.
        if not builder.is_prepared():
            raise OSError(
                f"the directory of data sets must be writable, got "
                f"'{builder.data_dir}' ({error.strerror or error}); choose another "
                "with --data-dir DIR"
            ) from error
        builder = make()
    return builder


def _read(builder: Any, split: str) -> list[dict[str, Any]]:
    try:
        return list(builder.as_data_source(split))
    except Exception as error:  # array_record's reader raises RuntimeError and others
        raise OSError(
            f"the prepared data set must be whole, got '{builder.data_dir}' ({error}); "
            "delete that directory to have it made again"
        ) from error
