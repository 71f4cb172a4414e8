"""Any text of the user's: a UTF-8 file, or all such files of a directory in order."""

from pathlib import Path

SUFFIXES = (".md", ".txt")


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, or the `.txt` and `.md` files under a directory.

    A directory is searched with those below it; its files are sorted by their path
    below it and joined by line feeds. Line ends become line feeds; a byte order mark is
    dropped. The text is not empty.

    Raises:
      ValueError: if the path cannot be read, is not UTF-8, or holds no text.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        text = _read_file(path)
    else:
        files = sorted(
            (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES),
            # By the path below the directory, so that moving it changes no token.
            key=lambda file: file.relative_to(path).as_posix(),
        )
        text = "\n".join(_read_file(file) for file in files)
    if not text.strip():
        raise ValueError(f"'{path}' must hold text, in .txt or .md files, got none")
    return text


def _read_file(path: Path) -> str:
    try:
        # "sig" drops a byte order mark, which would be a character of the vocabulary.
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(
            f"the text must be a readable UTF-8 file or directory, got '{path}' "
            f"({error})"
        ) from error
