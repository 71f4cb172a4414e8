"""`jaxprune export`: a directory as a file or checkpoint that another program reads."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.cli.options import Options
from jaxprune.lm.export.gguf_file import GGUFType, export_gguf
from jaxprune.lm.export.maxtext_checkpoint import export_maxtext
from jaxprune.lm.jobs.console import Console, byte_progress
from jaxprune.lm.jobs.option_types import ModelPath, Names, Switch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Options):
    """Writes a model as GGUF, for llama.cpp, or as MaxText's checkpoint.

    Llama, Gemma 3 and Qwen 3, pruned, shrunk or with a smaller vocabulary. What the
    other program would compute in another way is refused.

    Attributes:
      model: the directory.
      gguf: the GGUF file to write.
      maxtext: the directory to write for MaxText: an Orbax checkpoint, and student.yml
        with its student_overrides.
      type: the type of GGUF's matrices: f32, f16, bf16, or blocks of 32 weights with 8
        or 4 bits each (q8_0, q4_0). Vectors stay f32.
      ignore_config: attributes of config.json to read as if they were not there.
      overwrite: replace an earlier export.
    """

    EXAMPLE: ClassVar = "jaxprune export MODEL --gguf model.gguf --type q8_0"

    model: ModelPath
    gguf: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")
    ] = None
    maxtext: Annotated[
        Path | None, tyro.conf.arg(metavar="DIRECTORY", help_behavior_hint="")
    ] = None
    type: GGUFType = "f16"
    ignore_config: Names = ()
    overwrite: Switch = False

    def run(self, console: Console, words: list[str]) -> dict[str, Any]:
        """Writes the file or checkpoint, and says what is in it."""
        outputs = [p for p in (self.gguf, self.maxtext) if p is not None]
        check(_RULES, outputs=outputs, maxtext=self.maxtext, type=self.type)
        if self.maxtext is not None:
            return self._maxtext(self.maxtext, console)
        with byte_progress(open_directory(self.model).size, "writing") as progress:
            result = export_gguf(
                self.model,
                self.gguf,  # type: ignore[arg-type]  # the rule above
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

    def _maxtext(self, directory: Path, console: Console) -> dict[str, Any]:
        result = export_maxtext(
            self.model,
            directory,
            ignore_config=self.ignore_config,
            overwrite=self.overwrite,
        )
        console.say(
            f"'{directory}': {result.weights:,} weights; student.yml has MaxText's "
            "student_overrides"
        )
        return {**result._asdict(), "directory": str(directory)}


_RULES = (
    Rule(
        lambda v: len(v.outputs) == 1,
        "export writes one file or directory, got {named}",
        "give --gguf FILE or --maxtext DIRECTORY",
        details=lambda v: {
            "named": " and ".join(f"'{p}'" for p in v.outputs) or "none"
        },
    ),
    Rule(
        lambda v: v.maxtext is None or v.type == "f16",
        "--type {type} is for --gguf, and MaxText's checkpoint has the dtypes of the "
        "directory",
        "leave it out",
    ),
)
