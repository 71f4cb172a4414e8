"""Turns text into tokens and back with the tokenizer of a model's directory.

tokenizer.json is read by the `tokenizers` package. Its template of special tokens is
not applied, since the template may add other tokens than BOS, the token that a text
begins with. `Tokenizer.encode` adds BOS itself, where the caller says so or, if the
caller says nothing, where the template does. tokenizer_config.json does not decide:
transformers 5 does not look at `add_bos_token` where there is a tokenizer.json.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxprune.lm.checkpoints.checkpoint_dir import (
    CONFIG,
    Damaged,
    Unknown,
    open_directory,
)
from jaxprune.lm.models.hf import chat_template
from jaxprune.lm.models.hf.chat_template import ChatTemplate

_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_GENERATION, _SPECIAL = "generation_config.json", "special_tokens_map.json"
# transformers 5 makes this class anew, without the template of tokenizer.json.
_WITHOUT_TEMPLATE = ("GPTNeoXTokenizer", "GPTNeoXTokenizerFast")
# It takes that class for these where none is named, and another for those whichever is.
_UNNAMED = ("gpt_neox", "olmoe")
_ANOTHER = ("granite", "mistral", "mixtral", "olmo2", "phi3", "qwen2")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and what its directory says of special tokens.

    Attributes:
      tokens: the `tokenizers.Tokenizer`.
      bos: the token that texts begin with; None if there is none.
      eos: the tokens that end a text.
      begins: whether texts begin with `bos` unless the caller says otherwise.
      overruled: whether tokenizer_config.json says otherwise too.
      chat: template of conversations; None where the directory does not say.
    """

    tokens: Any = dataclasses.field(repr=False)
    bos: int | None
    eos: tuple[int, ...]
    begins: bool
    overruled: bool = False
    chat: ChatTemplate | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the highest token."""
        return max(self.tokens.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def special(self) -> set[int]:
        """The tokens that stand for no text: BOS, EOS, padding and the like."""
        added = self.tokens.get_added_tokens_decoder().items()
        named = {token for token, about in added if about.special}
        return named | {*self.eos} | ({self.bos} if self.bos is not None else set())

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
        """The tokens of a text.

        Args:
          text: any text.
          bos: whether to begin with `self.bos`; None does as the directory says.

        Returns:
          Integers.

        Raises:
          ValueError: `bos` is True and there is no such token.
        """
        try:
            text.encode()
        except UnicodeEncodeError:  # half a pair, from JSON or a command line
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        with _panics_refused("the text cannot be tokenized"):  # without the template
            ids = list(self.tokens.encode(text, add_special_tokens=False).ids)
        if not (self.begins if bos is None else bos):
            return ids
        if self.bos is None:
            raise ValueError(
                "encode with bos=True needs a token that begins a text, but neither "
                f"{_SETTINGS} nor config.json names one; use bos=False"
            )
        return [self.bos, *ids]

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens, with the special ones if `special`."""
        ids = [int(token) for token in tokens]
        return str(self.tokens.decode(ids, skip_special_tokens=not special))


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a model's directory.

    A text begins with BOS where the template of tokenizer.json puts one token before
    it, whatever `add_bos_token` of tokenizer_config.json says, as in transformers 5.

    Args:
      directory: path of a local directory with config.json, safetensors and
        tokenizer.json.

    Returns:
      The tokenizer.

    Raises:
      FileNotFoundError: there is no such directory.
      ModuleNotFoundError: the `tokenizers` package is not installed.
      Unknown: the directory has no tokenizer.json.
      Damaged: a file cannot be read as what it is.
    """
    opened = open_directory(directory)
    tokens = _read_tokenizer(opened.path)
    settings = _settings(opened.path, _SETTINGS)
    if "added_tokens_decoder" not in settings:  # an older directory
        named = _settings(opened.path, _SPECIAL)
        settings |= {key: named[key] for key in named if key.endswith("_token")}
    generating = _settings(opened.path, _GENERATION)
    bos = _token(tokens, settings.get("bos_token"))
    if bos is None:
        ids = _ids(opened.path, opened.config, "bos_token_id")
        bos = ids[0] if ids else None
    prefix = []
    if _tokenizer_class(settings, opened.config) not in _WITHOUT_TEMPLATE:
        prefix = _template_prefix(tokens, opened.path / _FILE)
    # The template may write another token than the one that is named.
    bos = prefix[0] if len(prefix) == 1 else bos
    begins = bool(prefix) and prefix[0] == bos
    asked = settings.get("add_bos_token")
    ends = set(_ids(opened.path, opened.config, "eos_token_id"))
    # Generation goes by these.
    ends |= set(_ids(opened.path, generating, "eos_token_id", _GENERATION))
    if (end := _token(tokens, settings.get("eos_token"))) is not None:
        ends.add(end)
    return Tokenizer(
        tokens=tokens,
        bos=bos,
        eos=tuple(sorted(ends)),
        begins=begins,
        overruled=isinstance(asked, bool) and asked != begins,
        chat=chat_template.find_chat_template(opened.path, settings),
    )


def _read_tokenizer(directory: Path) -> Any:
    path = directory / _FILE
    if not path.is_file():
        has_older = (directory / "tokenizer.model").is_file()
        older_file = " but a tokenizer.model" if has_older else ""
        raise Unknown(
            f"'{directory}' has no {_FILE}{older_file}; make one with transformers: "
            "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
        )
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"reading '{path}' needs the package tokenizers; pip install tokenizers"
        ) from None
    with _panics_refused(f"'{path}' is no tokenizer"):
        try:
            tokens = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise Damaged(f"'{path}' is no tokenizer: {error}") from None
    # As its last user had them; transformers does not go by them either.
    tokens.no_truncation()
    tokens.no_padding()
    return tokens


@contextlib.contextmanager
def _panics_refused(sentence: str) -> Iterator[None]:
    """Makes a panic of the package, written in Rust, a `Damaged` of a sentence."""
    try:
        yield
    except BaseException as error:
        # No Exception, and of a class that no module exports.
        if type(error).__name__ != "PanicException":
            raise
        raise Damaged(
            f"{sentence}: the package tokenizers ended with {error}; save the "
            f"tokenizer again, or bring {_FILE} back from a copy"
        ) from None


def _tokenizer_class(settings: dict[str, Any], config: dict[str, Any]) -> Any:
    """The name of transformers' class, as far as a directory says it."""
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    family = config.get("model_type")
    if family in _ANOTHER:
        return None
    return named or (_WITHOUT_TEMPLATE[0] if family in _UNNAMED else None)


def _template_prefix(tokens: Any, path: Path) -> list[int]:
    """The special tokens that tokenizer.json puts before a text."""
    with _panics_refused(f"'{path}' is no tokenizer"):
        # A text of some tokens shows what stands before it and what behind.
        for text in _short_texts(tokens):
            encoding = tokens.encode(text)
            if body := tokens.encode(text, add_special_tokens=False).ids:
                marks = encoding.special_tokens_mask  # 1 for what the template added
                count = marks.index(0) if 0 in marks else len(marks) - len(body)
                return list(encoding.ids[:count])
    return []


def _short_texts(tokens: Any) -> Iterator[str]:
    """Texts of which a tokenizer that knows any makes a token of one."""
    yield "a"
    # Rarely needed: a real vocabulary takes a while to list.
    yield from sorted(tokens.get_vocab(with_added_tokens=True))[:64]


def _settings(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Damaged(f"'{path}' is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise Damaged(f"'{path}' must hold an object, got {type(settings).__name__}")
    return settings


def _ids(
    directory: Path, config: dict[str, Any], name: str, file: str = CONFIG
) -> list[int]:
    """The tokens that an attribute of a file names: one, a list, or none."""
    value = config.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise Damaged(
            f"'{directory / file}' must have a token or a list of tokens as {name}, "
            f"got {value!r}"
        )
    return ids


def _token(tokens: Any, named: Any) -> int | None:
    text = named.get("content") if isinstance(named, dict) else named
    return tokens.token_to_id(text) if isinstance(text, str) else None
