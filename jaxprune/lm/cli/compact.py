"""`jaxprune compact` and `jaxprune expand`: a directory in one file, and back."""

import dataclasses
from typing import Any, ClassVar

from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.checkpoints.compact import compact, expand
from jaxprune.lm.cli.options import Options
from jaxprune.lm.steps.console import Console, byte_progress
from jaxprune.lm.steps.option_types import FilePath, ModelPath, OutPath, Switch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compact(Options):
    """Packs a model's directory into one file: a bit for each weight, and what is left.

    For storage and transfer. `jaxprune expand` gives the directory back.

    Attributes:
      model: the directory.
      file: the compact file to write.
      overwrite: replace an earlier compact file.
    """

    EXAMPLE: ClassVar = "jaxprune compact OUT model.jaxprune"

    model: ModelPath
    file: FilePath
    overwrite: Switch = False

    def run(self, console: Console, words: list[str]) -> dict[str, Any]:
        """Packs the directory; the sizes."""
        source = open_directory(self.model)
        with byte_progress(source.size, "packing") as progress:
            result = compact(
                source, self.file, overwrite=self.overwrite, progress=progress
            )
        share = result.compact_bytes / result.dense_bytes
        console.say(
            f"'{self.file}': {result.compact_bytes:,} bytes, {share:.3f} of the "
            f"directory's {result.dense_bytes:,}"
        )
        if result.omitted:
            console.note(
                f"links out of the directory, or no files, are not in it: "
                f"{', '.join(result.omitted)}"
            )
        return {**result._asdict(), "share": share, "file": str(self.file)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expand(Options):
    """Writes the directory that a compact file was made of, every weight bit for bit.

    Attributes:
      file: the compact file.
      out: the directory to write.
    """

    EXAMPLE: ClassVar = "jaxprune expand model.jaxprune RESTORED"

    file: FilePath
    out: OutPath

    def run(self, console: Console, words: list[str]) -> dict[str, Any]:
        """Writes the directory; the names of its files."""
        paths = expand(self.file, self.out)
        console.say(f"'{self.out}': {len(paths)} files, checked by their SHA-256")
        # With "/" on each system, as in the file.
        names = [path.relative_to(self.out.resolve()).as_posix() for path in paths]
        return {"out": str(self.out), "files": names}
