"""A conversation as the text that a model was trained on, by its directory's template.

The template is Jinja's, run in a sandbox, since it comes with the model. It sees what
transformers' `apply_chat_template` gives it, but no clock: where it would write today's
date, it writes its own default date, or a fixed one.

Reference:
  Hugging Face transformers, `utils/chat_template_utils.py`.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = "chat_template.jinja"

_DAY = datetime.date(2024, 7, 26)  # that of Llama 3's own template
_RAISED: tuple[type[Exception], ...] = (
    *(TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
    SyntaxError,  # of what a template is compiled to
)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How a model's conversations are written.

    Attributes:
      source: the Jinja template.
      special: name of a special token, "bos_token" say, to its text.
    """

    source: str = dataclasses.field(repr=False)
    special: Mapping[str, str]

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation, with the BOS that the template writes.

        Args:
          messages: each with a "role" and a "content", in their order.

        Returns:
          The text, special tokens written out.

        Raises:
          ValueError: the template refuses the messages, or cannot be read.
          ModuleNotFoundError: jinja2 is not installed.
        """
        try:
            import jinja2
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "conversations need the package jinja2; pip install jinja2"
            ) from None
        try:
            text: str = _compiled(self.source).render(
                messages=list(map(_with_reasoning, messages)),
                tools=None,
                documents=None,
                add_generation_prompt=False,
                **self.special,
            )
        # A template is a program, and what it was not written for may fail anywhere.
        except (jinja2.TemplateError, *_RAISED) as error:  # type: ignore[misc]
            raise ValueError(
                f"the model's chat template cannot write these messages ({error}); "
                "give conversations that it knows, or plain text"
            ) from None
        return text


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose reasoning has the names that templates know, as transformers'."""
    texts = (message.get(name) for name in _REASONING)
    reasoning = next((text for text in texts if text is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


_REASONING = ("reasoning_content", "thinking", "reasoning")


def find_chat_template(
    directory: Path, settings: Mapping[str, Any]
) -> ChatTemplate | None:
    """The template of a directory: chat_template.jinja, or tokenizer_config.json's.

    Args:
      directory: path of the model.
      settings: content of tokenizer_config.json.

    Returns:
      The template, or of several the one called "default". None where there is none
      that can be read: that is no error, since only conversations need a template.
    """
    source: Any = settings.get("chat_template")
    if (path := directory / FILE).is_file():
        source = path.read_text(encoding="utf-8")
    elif isinstance(source, list):
        templates = [entry for entry in source if isinstance(entry, dict)]
        source = {entry.get("name"): entry.get("template") for entry in templates}.get(
            "default"
        )
    if not isinstance(source, str):
        return None
    special = {}
    for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        name = f"{role}_token"
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
    return ChatTemplate(source, special)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks what the model says; here it is only text."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    # Without the escapes for HTML that Jinja's own has.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    if "strftime_now is defined" not in source:  # else it has a date of its own
        environment.globals["strftime_now"] = _DAY.strftime
    return environment.from_string(source)
