"""A tokenizer.json in the words of GGUF: two kinds of BPE that llama.cpp has.

Bytes: merges in order, with the name of a pre-tokenizer that llama.cpp has a copy of.
Characters with bytes as the last resort ("SPM"): no merges, but a score for each token;
of two neighbours those are joined first whose token scores highest, so the score is the
place of the first merge that makes the token.
"""

from collections.abc import Mapping
from typing import Any

from jaxprune.arrays.rules import refusal
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.models import hf
from jaxprune.lm.vocabulary.token_choice import merge_pairs, model_kind

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Name of a pre-tokenizer in llama.cpp, by the pattern that tokenizer.json splits by.
_BY_PATTERN = {
    _WORDS.format(digits="{1,3}"): "llama-bpe",
    _WORDS.format(digits=""): "qwen2",
}


def write_tokenizer(
    writer: Any,
    source: CheckpointDir,
    content: Mapping[str, Any],
    tokenizer: hf.Tokenizer,
    rows: int,
) -> None:
    """Writes the tokens, how texts are split into them, and the special ones.

    Args:
      writer: the `gguf.GGUFWriter`.
      source: directory of the model.
      content: parsed tokenizer.json.
      tokenizer: tokenizer of the directory.
      rows: number of rows of the embedding, each of which is a token's.

    Raises:
      ValueError: llama.cpp has no such tokenizer.
    """
    import gguf

    model = content["model"]
    if model_kind(model) != "BPE":
        raise refusal(
            "GGUF is written with tokenizers of the model BPE, got "
            f"{model_kind(model)}",
            "",
            "convert it with llama.cpp's convert_hf_to_gguf.py",
        )
    tokens, types = _tokens(content, rows)
    by_bytes = not model.get("byte_fallback")
    if by_bytes:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(content))
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_begins_with_space(content))
    writer.add_token_list(tokens)
    if not by_bytes:
        writer.add_token_scores(_scores(model, tokens))
    writer.add_token_types(types)
    special = gguf.SpecialVocab(source.path, load_merges=by_bytes, n_vocab=rows)
    # What begins a text is decided once, as everywhere here.
    if tokenizer.bos is not None:
        special.special_token_ids["bos"] = tokenizer.bos
    special.add_special_token["bos"] = tokenizer.begins
    special.add_to_gguf(writer, quiet=True)


def _tokens(content: Mapping[str, Any], rows: int) -> tuple[list[bytes], list[int]]:
    """The token of each row, in order, and GGUF's types of them."""
    from gguf import TokenType

    model = content["model"]
    # A row that no token has is filled.
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for token, number in model["vocab"].items():
        if number >= rows:
            continue
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        use = TokenType.BYTE if is_byte else TokenType.NORMAL
        tokens[number], types[number] = token, int(use)
    # Gemma 3 has a token for pictures, of which models of text have no row.
    for token in (t for t in content["added_tokens"] if t["id"] < rows):
        use = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        text = token["content"]
        # llama.cpp looks for them in the text itself, not in the marked one.
        text = text if token["special"] else text.replace("▁", " ")
        tokens[token["id"]], types[token["id"]] = text, int(use)
    if (unknown := model.get("unk_token")) in model["vocab"]:
        types[model["vocab"][unknown]] = int(TokenType.UNKNOWN)
    return [token.encode() for token in tokens], types


def _scores(model: Mapping[str, Any], tokens: list[bytes]) -> list[float]:
    """Minus the place of the first merge that makes each token."""
    places: dict[bytes, int] = {}
    for place, (first, second) in enumerate(merge_pairs(model)):
        places.setdefault((first + second).encode(), place)
    # Nothing makes the others, characters and bytes: their scores are never asked for.
    return [-float(places.get(token, len(places))) for token in tokens]


def _pre_tokenizer(content: Mapping[str, Any]) -> str:
    """The name that llama.cpp gives to what splits a text into words."""
    parts = content.get("pre_tokenizer") or {}
    parts = parts.get("pretokenizers", [parts])
    patterns = [p["pattern"].get("Regex") for p in parts if p.get("type") == "Split"]
    splits = [part for part in parts if part.get("type") == "ByteLevel"]
    shapes = [part.get("type") for part in parts]
    name = None
    if shapes == ["Split", "ByteLevel"] and not splits[0].get("use_regex", True):
        name = _BY_PATTERN.get(patterns[0])
    elif shapes == ["ByteLevel"] and splits[0].get("use_regex", True):
        name = "gpt-2"
    elif shapes == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        name = "smollm"
    if name is None:
        raise refusal(
            "llama.cpp must have the splitting into words that tokenizer.json asks "
            f"for, but {', '.join(map(str, shapes))} with these settings is none of "
            "Llama 3's, Qwen 2's, GPT-2's and SmolLM's",
            "",
            "convert it with llama.cpp's convert_hf_to_gguf.py",
        )
    return str(name)


def _begins_with_space(content: Mapping[str, Any]) -> bool:
    """Whether a text is split as if a space stood before it."""
    normalizer = content.get("normalizer") or {}
    splitter = content.get("pre_tokenizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    prepended = any(part.get("type") == "Prepend" for part in parts)
    spaced = splitter.get("add_prefix_space", True)  # of older files
    scheme = splitter.get("prepend_scheme", "always" if spaced else "never")
    return prepended or (splitter.get("type") == "Metaspace" and scheme != "never")
