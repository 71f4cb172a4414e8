"""Reads a config.json attribute by attribute and refuses, by name, what is left over.

A family reads the attributes that it knows. In the end all that were wrong are named in
one error, with those that nobody read and that could change what the model computes. An
attribute that nobody read and whose name speaks of nothing that a model computes, a
fine-tuner's own note say, is let through and listed. An absent attribute and null are
the same, except where null has a meaning of its own.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

# What does not change the forward pass: bookkeeping, tokens, training, generation.
_IGNORED = """
    model_type architectures auto_map _name_or_path transformers_version torch_dtype
    dtype tokenizer_class task_specific_params problem_type finetuning_task id2label
    label2id num_labels return_dict output_attentions output_hidden_states
    return_dict_in_generate output_scores torchscript use_bfloat16 tf_legacy_loss
    _attn_implementation attn_implementation _attn_implementation_autoset
    use_cache cache_implementation use_return_dict chunk_size_feed_forward is_decoder
    tie_encoder_decoder prefix bos_token_id eos_token_id pad_token_id sep_token_id
    unk_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
    bad_words_ids suppress_tokens begin_suppress_tokens do_sample early_stopping
    length_penalty max_length min_length max_new_tokens no_repeat_ngram_size
    encoder_no_repeat_ngram_size num_beams num_beam_groups diversity_penalty
    num_return_sequences repetition_penalty temperature top_k top_p typical_p
    remove_invalid_values exponential_decay_length_penalty initializer_range
    initializer_factor attention_dropout hidden_dropout resid_pdrop embd_pdrop
    attn_pdrop embedding_dropout pretraining_tp gradient_checkpointing unsloth_version
    unsloth_fixed classifier_dropout reorder_and_upcast_attn summary_type
    summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    _num_labels output_past n_special predict_special_tokens xla_device is_llama_config
    transformers.js_config max_sequence_length model_max_length seq_length _commit_hash
    _flash_attn_2_enabled use_flash_attn use_flash_attention
    _attn_implementation_internal tokenizer_padding_side tokenizer_model_max_length
    neftune_noise_alpha
    hidden_dropout_prob attention_probs_dropout_prob mlp_dropout embd_dropout
    init_std layerdrop dropout activation_dropout
"""
IGNORED = frozenset(_IGNORED.split())
# What is supported at one value only, in every family that does not read it.
ONLY: Mapping[str, Any] = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1,
    "use_sliding_window": False,
    "use_mrope": False,
}
# How words of a name begin that may speak of what a model computes, in transformers'
# families or in a model's own code, and how the names of switches and counts begin.
_STEMS = """
    act alibi alpha arch attention attn beta bias block cap channel chunk clip conv
    cross decay decod depth dilat dim emb encod eps expert ext factor feed ffn final
    freq fuse fusion gat gelu glu group head hidden inner inter kernel kv lambda latent
    layer ln logit logn long lora low mask mem mix mlp moe mod mrope mscale mtp mult mup
    mu nope norm ntk order parallel partial patch pool pos precision proj qk quant query
    rank ratio relu rescal resid rms rope rot rout sandwich scal shar shift sigm silu
    sink size skip slid soft sparse ssm stride swi tanh temp theta tie tower upcast vis
    vocab weight width window yarn
"""
_SPEAKS = re.compile(rf"(?<![a-z])({'|'.join(_STEMS.split())})")
_SWITCHES = re.compile(r"_*(use|num|n|no|has|is|with|enable|disable|apply|add|do)_")
_DROPOUT = re.compile(r"dropout|pdrop|layerdrop")  # none of it outside of training

# A size past this is no model's; numbers of layers have a bound of their own.
_MOST = 2**31 - 1


class Problem(NamedTuple):
    """What is wrong with an attribute, and whether config.json lacks it.

    Attributes:
      name: the attribute, "outer.inner" inside an object.
      text: the whole phrase.
      absent: whether the attribute must be there and is not.
    """

    name: str
    text: str
    absent: bool = False


class Attributes:
    """The attributes of one config.json, read one by one.

    Attributes:
      problems: one for each attribute read so far that was wrong.
      ignored: names that nobody read and that say nothing of what a model computes.
    """

    def __init__(self, config: Mapping[str, Any], *, prefix: str = ""):
        """Starts with nothing read; `prefix` is put before the names in `problems`."""
        self._config = config
        self._prefix = prefix
        self._read: set[str] = set()
        self.problems: list[Problem] = []
        self.ignored: list[str] = []

    def raw(self, name: str, default: Any = None) -> Any:
        """The value as it stands, null included; the default where it is absent."""
        self._read.add(name)
        return self._config.get(name, default)

    def size(self, name: str, default: int | None = None, *, most: int = _MOST) -> int:
        """A positive integer; without a default it must be there."""
        value = self.raw(name)
        value = default if value is None else value
        # In Python True is 1.
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.wrong(name, "a positive integer", value)
            return 1
        if value > most:
            self.wrong(name, f"at most {most}", value)
            return 1
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self.optional(name)
        return default if value is None else value

    def optional(self, name: str, default: float | None = None) -> float | None:
        """A positive number, or None where null is given."""
        value = self.raw(name, default)
        if value is None:
            return None
        if (number := _positive(value)) is None:
            self.wrong(name, "a positive number", value)
        return number

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.raw(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.wrong(name, "true or false", value)
        return bool(value)

    def choice(self, name: str, choices: Mapping[str, Any], default: str) -> Any:
        """What the value stands for in `known`."""
        value = self.raw(name)
        value = default if value is None else value
        if not isinstance(value, str) or value not in choices:
            self.wrong(name, f"one of {', '.join(choices)}", value)
            value = default
        return choices[value]

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of positive numbers."""
        value = self.raw(name)
        numbers = [_positive(x) for x in value] if isinstance(value, list) else [None]
        if None in numbers:
            self.wrong(name, "a list of positive numbers", value)
            return ()
        return tuple(x for x in numbers if x is not None)

    def within(self, name: str) -> "Attributes":
        """The attributes inside an object, none where it is absent."""
        value = self.raw(name)
        if value is not None and not isinstance(value, dict):
            self.wrong(name, "an object", value)
            value = None
        return Attributes(value or {}, prefix=f"{self._prefix}{name}.")

    def updated(self, newer: "Attributes") -> "Attributes":
        """The attributes of an object, of which those of another take the place."""
        prefix = newer._prefix if newer.present() else self._prefix
        return Attributes({**self._config, **newer._config}, prefix=prefix)

    def present(self) -> bool:
        """Whether there is any attribute at all."""
        return bool(self._config)

    def wrong(self, name: str, rule: str, value: Any) -> None:
        """Notes that an attribute is not what it must be."""
        full = self._prefix + name
        got = "nothing" if value is None else _shown(value)
        text = f"{full} must be {rule}, got {got}"
        problem = Problem(full, text, absent=value is None)
        if problem not in self.problems:  # an attribute may be read twice
            self.problems.append(problem)

    def rest(
        self, *, ignored: Collection[str] = (), only: Mapping[str, Any] | None = None
    ) -> None:
        """Notes attributes not read, unless ignored, null or at their only value."""
        for name, value in self._config.items():
            if name in self._read or name in ignored or value is None:
                continue
            if only is not None and name in only:
                if value != only[name]:
                    self.wrong(name, _shown(only[name]), value)
            elif self._prefix or _may_matter(name):
                full = self._prefix + name
                text = f"{full}={_shown(value)} is not known"
                self.problems.append(Problem(full, text))
            else:
                self.ignored.append(name)


def _may_matter(name: str) -> bool:
    """Whether the name of an unknown attribute may speak of what a model computes."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()  # camelCase too
    if _DROPOUT.search(words):
        return False
    return bool(_SPEAKS.search(words) or _SWITCHES.match(words))


def _positive(value: Any) -> float | None:
    """A finite number over 0, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of 400 digits, say
        return None
    return number if 0 < number < math.inf else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
