"""Data sets of TensorFlow Datasets, prepared once and read without TensorFlow.

A prepared data set is written beside and renamed, so preparing may be interrupted or
run twice at once.
"""

import importlib
import sys
from pathlib import Path
from typing import Any


def examples(
    name: str, split: str, data_dir: Path | str | None = None
) -> list[dict[str, Any]]:
    """The examples of a split, features by name, in the order they were made.

    Args:
      name: name of a module of `experiments.datasets` with a `Builder`.
      split: "train" or "validation".
      data_dir: directory of prepared data sets; None: TensorFlow Datasets' default.

    Raises:
      ModuleNotFoundError: if a package of the extra `experiments` is missing.
      ConnectionError: if a download fails.
      OSError: if `data_dir` cannot be written, or what is prepared there is damaged.
    """
    # Imported here, for it takes a second and a user's own text does not need it.
    try:
        tfds = importlib.import_module("tensorflow_datasets")
        module = importlib.import_module(f"experiments.datasets.{name}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the data set {name!r} needs the package {error.name!r}, which is not "
            "installed; install the extra with `pip install '.[experiments]'`",
            name=error.name,
        ) from error
    # In a log each step of a bar would be a line.
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()

    def make() -> Any:
        return module.Builder(data_dir=data_dir, file_format="array_record")

    # Prepared data sets in TFDS's bucket are those of its own builders.
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder = make()
    try:
        builder.download_and_prepare(download_config=config)
    except FileExistsError:
        # Another process that prepares it too has renamed its directory first.
        builder = make()
    try:
        return list(builder.as_data_source(split))
    except RuntimeError as error:  # array_record's own
        raise OSError(
            f"the prepared data set must be whole, got '{builder.data_dir}' ({error}); "
            "delete that directory to have it made again"
        ) from error
