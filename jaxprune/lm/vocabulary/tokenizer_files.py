"""The files that hold token ids, written for the tokens that stay.

tokenizer.json is what every loader goes by. Its slower twins (vocab.json, merges.txt,
tokenizer.model ...) would contradict it and are left out. In the other files an id
stands where its key says so: `bos_token_id`, `added_tokens_decoder`, and the like.
"""

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxprune.lm.vocabulary.token_choice import merge_pairs, model_kind

TOKENIZER = "tokenizer.json"
LEFT_OUT = (
    *("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model"),
    "tekken.json",
)
"""Files that say the vocabulary once more, in forms that are not written here."""
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
"""Files whose keys name tokens by id."""

# What holds one id, or a list of ids, or lists of lists.
_ID_KEYS = re.compile(
    r".*_token_ids?|.*_token_index|(begin_)?suppress_tokens|(bad|force)_words_ids"
)


def reindexed_tokenizer(
    content: Mapping[str, Any], new_ids: Mapping[int, int]
) -> dict[str, Any]:
    """A tokenizer.json of the tokens that stay.

    Args:
      content: parsed tokenizer.json.
      new_ids: id before to id after, of the tokens that stay.

    Returns:
      The parsed file of the smaller tokenizer. A merge stays where its two parts and
      its product do.
    """
    new = copy.deepcopy(dict(content))
    model = new["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: by place, in the order of the new ids
        pairs = [(new_ids[i], row) for i, row in enumerate(vocabulary) if i in new_ids]
        model["vocab"] = [row for _, row in sorted(pairs, key=lambda pair: pair[0])]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_ids[model["unk_id"]]
    else:
        model["vocab"] = {
            token: new_ids[number]
            for token, number in vocabulary.items()
            if number in new_ids
        }
    if model_kind(model) == "BPE":
        stay = model["vocab"]
        rows = zip(model["merges"], merge_pairs(model), strict=True)
        model["merges"] = [
            row
            for row, (first, second) in rows
            if first in stay and second in stay and first + second in stay
        ]
    for token in new["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    if new.get("padding"):
        new["padding"]["pad_id"] = new_ids[new["padding"]["pad_id"]]
    if new.get("post_processor"):
        new["post_processor"] = _processor(new["post_processor"], new_ids.__getitem__)
    return new


def _processor(
    processor: dict[str, Any], new_id: Callable[[int], int]
) -> dict[str, Any]:
    """What adds special tokens, with their new ids."""
    new = dict(processor)
    if "processors" in new:  # a sequence of them
        new["processors"] = [_processor(part, new_id) for part in new["processors"]]
    special = new.get("special_tokens")
    if isinstance(special, dict):  # of a template
        new["special_tokens"] = {
            name: {**token, "ids": [new_id(i) for i in token["ids"]]}
            for name, token in special.items()
        }
    for name in ("sep", "cls"):  # of BERT's and RoBERTa's: a token and its id
        if isinstance(new.get(name), list):
            token, number = new[name]
            new[name] = [token, new_id(number)]
    return new


def reindexed_settings(
    content: Mapping[str, Any], new_id: Callable[[int], int]
) -> dict[str, Any]:
    """A file of settings with the new ids of the tokens that it names.

    Args:
      content: parsed file, one of `SETTINGS`.
      new_id: function of an id before to the id after.

    Returns:
      The parsed file.
    """
    new: dict[str, Any] = {}
    for key, value in content.items():
        if key == "added_tokens_decoder":
            new[key] = {
                str(new_id(int(number))): token for number, token in value.items()
            }
        elif _ID_KEYS.fullmatch(key):
            new[key] = _new_value(value, new_id)
        elif key == "forced_decoder_ids" and value:  # places and ids
            new[key] = [[place, _new_value(number, new_id)] for place, number in value]
        elif key == "sequence_bias" and isinstance(value, list):  # ids and a bias
            new[key] = [[_new_value(ids, new_id), bias] for ids, bias in value]
        elif isinstance(value, Mapping):
            new[key] = reindexed_settings(value, new_id)
        else:
            new[key] = value
    return new


def _new_value(value: Any, new_id: Callable[[int], int]) -> Any:
    """An id, or lists of ids, after; -1 or null, which name none, stay."""
    if isinstance(value, list):
        return [_new_value(x, new_id) for x in value]
    return new_id(value) if _is_id(value) else value


def named_ids(content: Mapping[str, Any]) -> set[int]:
    """The ids that a file of settings or a tokenizer's template names: they must stay.

    Args:
      content: parsed file, one of `SETTINGS` or `TOKENIZER`.

    Returns:
      Ids.
    """
    ids: set[int] = set()

    def note(number: int) -> int:
        ids.add(number)
        return number

    if "model" in content:  # a tokenizer.json
        _processor(content.get("post_processor") or {}, note)
        ids.update({content["padding"]["pad_id"]} if content.get("padding") else ())
    else:
        reindexed_settings(content, note)
    return ids


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
