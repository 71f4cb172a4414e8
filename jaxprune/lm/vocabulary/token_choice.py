"""Which tokens stay: those that texts need, and those that these are made of.

A BPE tokenizer makes a token by merging shorter ones, so a token is of no use without
the tokens on its way. With all of them a text whose tokens all stay is split as before:
the merges that made its tokens are still there, in the same order, and no merge is new.
Unigram takes the likeliest split and WordPiece the longest token, which stay what they
were when others go.
"""

import heapq
import json
from collections.abc import Callable, Mapping, Set
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxprune.arrays.messages import listed

_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")


def token_ids(content: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json to its id, added tokens included.

    Args:
      content: parsed tokenizer.json.

    Returns:
      Token to id.
    """
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of token and log probability
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    return {**vocabulary, **added}


def choose_tokens(
    content: Mapping[str, Any],
    counts: Int[np.ndarray, " rows"] | Float[np.ndarray, " rows"],
    size: int,
    needed: Set[int] = frozenset(),
) -> Int[np.ndarray, " size"]:
    """The tokens that stay.

    Added tokens, bytes, single characters and the unknown token stay in any case; of a
    tokenizer that falls back to bytes only ASCII and the characters that its own steps
    name, as for a space, since all others can be written by their bytes. Then comes, by
    its count in the texts, each token with those that it is merged from. Of equal
    counts come first those of characters that the texts have, then those of the lowest
    ids, which in most tokenizers were the more frequent tokens.

    Args:
      content: parsed tokenizer.json.
      counts: number of times that each id was seen or is expected, (rows of the
        embedding,).
      size: number of tokens to keep.
      needed: ids that stay in any case too, as those that config.json names.

    Returns:
      Ascending ids, int64 (size,).

    Raises:
      ValueError: the model is not understood, or so few tokens cannot stay.

    Example:
      >>> content = {"added_tokens": [], "model": {
      ...     "type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "abb": 3, "ba": 4},
      ...     "merges": ["a b", "ab b", "b a"]}}
      >>> choose_tokens(content, np.array([0, 0, 0, 5, 1]), 4).tolist()
      [0, 1, 2, 3]
    """
    model = content["model"]
    kind = model_kind(model)
    prefix = model.get("continuing_subword_prefix") if kind == "BPE" else ""
    if kind not in _MODELS:
        raise ValueError(
            "tokens are left out of tokenizers of the models BPE, Unigram, WordPiece "
            f"and WordLevel, got {kind}; keep the vocabulary whole"
        )
    if prefix:
        raise ValueError(
            f"a BPE tokenizer that marks the inside of words with '{prefix}' is not "
            "understood; keep the vocabulary whole"
        )
    ids = token_ids(content)
    kept = _always_kept(content, ids) | needed
    tokens = len(ids)
    if not size < tokens:
        raise ValueError(
            f"fewer tokens must stay than the {tokens} that there are, got {size}"
        )
    if not size >= len(kept):
        raise ValueError(
            f"{len(kept)} tokens must stay: added tokens, bytes and single characters, "
            f"got {size}; keep more"
        )
    made_from = _parts_of(model)
    # What the texts do not have they would sooner have in their own script.
    script = {letter for token, i in ids.items() if counts[i] for letter in token}
    order = sorted(
        ids.items(),
        key=lambda item: (
            -float(counts[item[1]]),
            not script.issuperset(item[0]),
            item[1],
        ),
    )
    for token, number in order:
        if len(kept) == size:
            break
        if number in kept:
            continue
        new = {ids[part] for part in made_from(token)} - kept | {number}
        # One with too many parts for what is free; shorter ones fill it up.
        if len(kept) + len(new) <= size:
            kept |= new
    return np.array(sorted(kept), np.int64)


def _always_kept(content: Mapping[str, Any], ids: Mapping[str, int]) -> set[int]:
    """Ids without which some text, or some prompt, could not be written."""
    model = content["model"]
    kept = {token["id"] for token in content["added_tokens"]}
    if isinstance(model["vocab"], list):
        if model.get("unk_id") is not None:
            kept.add(model["unk_id"])
        # An unknown character costs so much more than the least likely token.
        scores = [score for _, score in model["vocab"]]
        kept.add(int(np.argmin(scores)))
    elif (unknown := model.get("unk_token")) in ids:
        kept.add(ids[unknown])
    marks = (
        model.get("end_of_word_suffix") or "",
        model.get("continuing_subword_prefix") or "",
    )
    spelled = _spelled_in_bytes(content, ids)
    for token, number in ids.items():
        text = token.removesuffix(marks[0]).removeprefix(marks[1])
        if token in _BYTES or (len(text) == 1 and not spelled(text)):
            kept.add(number)
    return kept


def _spelled_in_bytes(
    content: Mapping[str, Any], ids: Mapping[str, int]
) -> Callable[[str], bool]:
    """Which characters, where they are no tokens, become bytes and are read back."""
    decoder = content.get("decoder") or {}
    decoders = [decoder, *decoder.get("decoders", ())]
    falls_back = (
        bool(content["model"].get("byte_fallback"))
        and ids.keys() >= _BYTES
        and any(part.get("type") == "ByteFallback" for part in decoders)
    )
    steps = [content.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    # What stands for a space is looked for among tokens, before bytes are joined.
    named = {*json.dumps(steps, ensure_ascii=False)}
    return lambda letter: falls_back and not letter.isascii() and letter not in named


def _parts_of(model: Mapping[str, Any]) -> Callable[[str], Set[str]]:
    """A function of a token to the tokens that it is merged from, step by step."""
    if model_kind(model) != "BPE":
        return lambda token: frozenset()
    ranks = {pair: rank for rank, pair in enumerate(merge_pairs(model))}
    suffix = model.get("end_of_word_suffix") or ""

    def parts(token: str) -> Set[str]:
        made = merged_tokens(symbols_of(token, suffix), ranks)
        # Where no merges make it, it is only found as a whole word.
        return made if token in made else frozenset()

    return parts


def model_kind(model: Mapping[str, Any]) -> str:
    """The kind of a tokenizer's model; older files leave it to what the model has."""
    if "type" in model:
        return str(model["type"])
    if "merges" in model:
        return "BPE"
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def merge_pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model, in order; older files have them as one string each."""
    pairs = (
        merge.split(" ", 1) if isinstance(merge, str) else merge
        for merge in model["merges"]
    )
    return [(first, second) for first, second in pairs]


def symbols_of(token: str, suffix: str) -> list[str]:
    """The characters of a token, the last one with the mark of a word's end."""
    text = token.removesuffix(suffix)
    symbols = list(text)
    if symbols and len(text) < len(token):
        symbols[-1] += suffix
    return symbols


def merged_tokens(symbols: list[str], ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """All tokens that BPE makes of symbols: they themselves, and what merges give.

    Args:
      symbols: characters of one word, in order.
      ranks: pair of tokens to the place of its merge; the first that applies is taken.

    Returns:
      Every token that stood somewhere on the way, the last ones included.
    """
    made, symbols = set(symbols), list(symbols)
    following = [*range(1, len(symbols)), -1]  # linked list; merged ones fall out
    before = [*range(-1, len(symbols) - 1)]
    pending: list[tuple[int, int, str, str]] = []

    def note(left: int) -> None:
        if left >= 0 and (right := following[left]) >= 0:
            pair = symbols[left], symbols[right]
            if pair in ranks:
                heapq.heappush(pending, (ranks[pair], left, *pair))

    for left in range(len(symbols)):
        note(left)
    while pending:
        _, left, first, second = heapq.heappop(pending)
        right = following[left]
        # One of the two may have been merged with another neighbour since.
        if right < 0 or (symbols[left], symbols[right]) != (first, second):
            continue
        symbols[left] = first + second
        symbols[right] = ""
        following[left] = following[right]
        if following[left] >= 0:
            before[following[left]] = left
        made.add(symbols[left])
        note(left)
        note(before[left])
    return made


def check_ids(ids: Mapping[str, int], rows: int) -> None:
    """Refuses a tokenizer whose ids are no rows of the model's embedding.

    Args:
      ids: token to id.
      rows: number of rows.

    Raises:
      ValueError: ids lie beyond, or two tokens have one.
    """
    beyond = [token for token, number in ids.items() if not 0 <= number < rows]
    if beyond:
        raise ValueError(
            f"each token must have a row of the embedding, which has {rows}, but "
            f"{listed(beyond)} have none; look for the tokenizer.json of this model"
        )
    if len({*ids.values()}) < len(ids):
        raise ValueError(
            "each token must have an id of its own, but two share one; repair "
            "tokenizer.json"
        )
