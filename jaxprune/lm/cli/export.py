"""`jaxprune export`: a directory as a GGUF file, which llama.cpp runs."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.cli.options import Options
from jaxprune.lm.export.gguf_file import GGUFType, export_gguf
from jaxprune.lm.steps.console import Console, byte_progress
from jaxprune.lm.steps.option_types import ModelPath, Names, Switch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Options):
    """Writes a model as GGUF, for llama.cpp.

    Llama, Gemma 3 and Qwen 3, pruned, shrunk or with a smaller vocabulary. What
    llama.cpp would compute in another way is refused.

    Attributes:
      model: the directory.
      gguf: the GGUF file to write.
      type: the type of GGUF's matrices: f32, f16, bf16, or blocks of 32 weights with 8
        or 4 bits each (q8_0, q4_0). Vectors stay f32.
      ignore_config: attributes of config.json to read as if they were not there.
      overwrite: replace an earlier export.
    """

    EXAMPLE: ClassVar = "jaxprune export MODEL --gguf model.gguf --type q8_0"

    model: ModelPath
    gguf: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    type: GGUFType = "f16"
    ignore_config: Names = ()
    overwrite: Switch = False

    def run(self, console: Console, words: list[str]) -> dict[str, Any]:
        """Writes the file, and says what is in it."""
        with byte_progress(open_directory(self.model).size, "writing") as progress:
            result = export_gguf(
                self.model,
                self.gguf,
                type=self.type,
                ignore_config=self.ignore_config,
                overwrite=self.overwrite,
                progress=progress,
            )
        types = ", ".join(f"{n:,} {name}" for name, n in result.types.items())
        console.say(
            f"'{self.gguf}': {result.bytes:,} bytes, {result.tensors} tensors; weights "
            f"by type: {types}"
        )
        return {**result._asdict(), "file": str(self.gguf)}
