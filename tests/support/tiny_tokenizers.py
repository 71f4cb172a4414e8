"""Small tokenizers of each model, trained on a made-up language."""

import json

import numpy as np

KINDS = ("byte-level", "byte-fallback", "unigram", "wordpiece")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def words(count, seed=0):
    """Words of syllables, some much more frequent than others."""
    rng = np.random.default_rng(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ei")]
    lexicon = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(300)]
    chances = 1 / np.arange(1, 301)
    return [str(w) for w in rng.choice(lexicon, count, p=chances / chances.sum())]


def text(count=2000, seed=0):
    """Lines of the language, with capitals, digits, umlauts and another script."""
    lines = [
        " ".join(words(10, seed * 1000 + i)).capitalize() + f", {i} größer 日本."
        for i in range(count // 10)
    ]
    return "\n".join(lines)


def trained(kind, size=400):
    """A tokenizer of about this size."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    options = {"vocab_size": size, "special_tokens": SPECIAL, "show_progress": False}
    lines = text().splitlines()
    if kind == "byte-level":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    elif kind == "byte-fallback":
        made = Tokenizer(
            models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
        made.normalizer = normalizers.Replace(" ", "▁")
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        options["special_tokens"] = [*SPECIAL, *bytes_]
        trainer = trainers.BpeTrainer(**{**options, "vocab_size": size + 256})
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    else:
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**options)
    made.train_from_iterator(lines, trainer)
    made.add_special_tokens([AddedToken("<end_of_turn>", special=True)])
    first = made.token_to_id("<s>")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", first)]
    )
    if kind == "byte-fallback":  # plain tokens there, as in Llama's and Gemma's files
        content = json.loads(made.to_str())
        content["added_tokens"] = [
            token
            for token in content["added_tokens"]
            if not token["content"].startswith("<0x")
        ]
        made = Tokenizer.from_str(json.dumps(content))
    return made


def model_folder(folder, kind, name="llama", rows=None, **changes):
    """A directory of a random model with such a tokenizer."""
    from tests.support import tiny_hf

    made = trained(kind)
    count = max(made.get_vocab().values()) + 1
    rows = -(-count // 64) * 64 if rows is None else rows
    ids = {n: made.token_to_id(f"<{t}>") for n, t in (("bos", "s"), ("pad", "pad"))}
    named = {f"{n}_token_id": i for n, i in ids.items()}
    named["eos_token_id"] = made.token_to_id("</s>")
    tiny_hf.random_folder(name, folder, vocab_size=rows, **named, **changes)
    made.save(str(folder / "tokenizer.json"))
    ends = [named["eos_token_id"], made.token_to_id("<end_of_turn>")]
    (folder / "generation_config.json").write_text(
        json.dumps({**named, "eos_token_id": ends, "temperature": 0.7})
    )
    decoder = made.get_added_tokens_decoder()
    settings = {
        "bos_token": "<s>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(i): {"content": token.content, "special": token.special}
            for i, token in decoder.items()
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "vocab.json").write_text(json.dumps(made.get_vocab()))
    return made
