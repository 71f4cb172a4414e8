"""A small mixture of experts that was trained, as a Hugging Face directory.

The shape is that of Qwen 3 MoE, a token is a character. The loss has the usual term
that balances the experts, E times the sum over experts e of f_e P_e: f_e is the share
of the tokens' choices that e gets, P_e the router's mean probability of it.

Reference:
  Fedus et al., "Switch Transformers", 2021, arXiv 2101.03961, equation 4.
"""

import dataclasses
import json
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from jaxtyping import Array, Float, Int

import jaxprune as jp
from experiments.datasets import Vocabulary
from jaxprune.arrays.console_progress import Progress
from jaxprune.files import atomic, safetensors_file
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.experts import Experts
from jaxprune.lm.models.decoder.model import Decoder, loss_per_token
from jaxprune.lm.recovery import retrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureShape:
    """Sizes of a mixture, and of the dense model of as many weights.

    Attributes:
      layers: number of layers.
      width: width of the residual stream, a multiple of 8: four heads.
      experts: number of experts of a layer.
      experts_per_token: number of them that a token is sent to.
      neurons: neurons of an expert.
      context: the longest sequence, in characters.
    """

    layers: int = 2
    width: int = 96
    experts: int = 16
    experts_per_token: int = 2
    neurons: int = 48
    context: int = 64

    def config_json(self, vocabulary_size: int, *, dense: bool) -> dict[str, Any]:
        """What config.json says of the mixture, or of the dense model."""
        neurons = self.experts * self.neurons  # of the dense model: as many in all
        config = {
            "model_type": "qwen3" if dense else "qwen3_moe",
            "architectures": ["Qwen3ForCausalLM" if dense else "Qwen3MoeForCausalLM"],
            "vocab_size": vocabulary_size,
            "hidden_size": self.width,
            "intermediate_size": neurons,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": self.width // 4,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
        }
        mixture = {
            "num_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "moe_intermediate_size": self.neurons,
            "norm_topk_prob": True,
        }
        return config if dense else config | mixture


class _BalancedExperts(nnx.Module):
    """Experts that report how unevenly the router uses them."""

    def __init__(self, experts: Experts, report: Callable[[Array], None]) -> None:
        self.experts, self.report = experts, report

    def __call__(self, x: Float[Array, "batch time width"]) -> Array:
        rows = x.reshape(-1, x.shape[-1])  # (tokens, width)
        _, chosen = self.experts.route(rows)  # (tokens, top_k)
        logits = self.experts.router(rows).astype(jnp.float32)  # (tokens, experts)
        self.report(imbalance(jax.nn.softmax(logits), chosen))
        return self.experts(x)


def imbalance(
    probabilities: Float[Array, "tokens experts"], chosen: Int[Array, "tokens top_k"]
) -> Float[Array, ""]:
    """How unevenly a router uses its experts; 1 where it uses all alike.

    Args:
      probabilities: softmax of the router's logits.
      chosen: numbers of the experts that each token is sent to.

    Returns:
      The number of experts times the sum of f_e P_e.

    Example:
      >>> even = jnp.full((4, 2), 0.5)
      >>> float(imbalance(even, jnp.array([[0], [1], [0], [1]])))
      1.0
    """
    experts = probabilities.shape[1]
    # The share has no gradient: the router learns through the probabilities alone.
    share = jnp.bincount(chosen.ravel(), length=experts) / chosen.size  # (experts,)
    return experts * jnp.sum(share * probabilities.mean(0))


def balanced_loss(weight: float) -> retrain.Loss:
    """The cross entropy of the text, plus a weight times the layers' mean imbalance."""

    def loss(model: Decoder, _: Any, tokens: jax.Array) -> jax.Array:
        terms: list[Array] = []
        for layer in model.layers:  # of a model that lives for this trace alone
            layer.mlp = _BalancedExperts(layer.mlp, terms.append)  # type: ignore[arg-type, assignment]
        nats = loss_per_token(model, tokens[:, :-1], tokens[:, 1:]).mean()
        return nats + weight * jnp.stack(terms).mean()

    return retrain.Loss(f"text, {weight!r} imbalance", loss)


def train_directory(
    place: Path,
    config_json: dict[str, Any],
    vocabulary: Vocabulary,
    sequences: Int[np.ndarray, "sequences length"],
    settings: retrain.Settings,
    loss: retrain.Loss | None,
) -> None:
    """Trains a model of a shape, or what is left of it, and writes its directory.

    Args:
      place: directory of the model; nothing is done where there is one.
      config_json: content of its config.json.
      vocabulary: characters of the text.
      sequences: tokens to train on, int32.
      settings: steps, learning rate, batch, and the seed, which draws the weights too.
      loss: loss that is made small; that of the text if None.
    """
    if place.exists():
        return
    model = Decoder(hf.decoder_config(config_json), rngs=nnx.Rngs(settings.seed))
    with Progress(settings.steps, f"training {place.name}", leave=False) as progress:

        def tick(steps: int, nats: float) -> None:
            progress.note(f"loss {nats:.3f}")
            progress.update(steps)

        trained, _ = retrain.retrain(
            model,
            parameter_names(model),
            sequences,
            settings,
            loss=loss,
            masked=set(),  # nothing is held at zero
            directory=place.with_name(f".{place.name}.work"),
            progress=tick,
        )
    write_directory(place, trained, config_json, vocabulary)


def parameter_names(model: Decoder) -> Set[str]:
    """The names of all parameters of a model."""
    return set(jp.tree.names(nnx.state(model, nnx.Param)))


def write_directory(
    place: Path, model: Decoder, config_json: dict[str, Any], vocabulary: Vocabulary
) -> None:
    """Writes config.json, model.safetensors and tokenizer.json: all or nothing.

    Args:
      place: directory to write, which must not exist.
      model: model with its parameters.
      config_json: content of its config.json.
      vocabulary: characters of the text; the tokenizer knows these alone.
    """
    tensors = dict(hf.tensors(model, config_json))
    entries = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    # BPE without merges: a token is a character.
    numbers = {character: i for i, character in enumerate(vocabulary.characters)}
    characters = tokenizers.Tokenizer(tokenizers.models.BPE(numbers, merges=[]))
    characters.decoder = tokenizers.decoders.Fuse()
    with atomic.staged(place.resolve()) as partial:
        safetensors_file.write(
            partial / "model.safetensors",
            entries,
            tensors.__getitem__,
            {"format": "pt"},
        )
        characters.save(str(partial / "tokenizer.json"))
        (partial / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")
