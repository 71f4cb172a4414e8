"""The same recovery for every smaller model, in plain torch: distillation.

The loss is the KL divergence between the next-token distributions of the dense model
and of the smaller model. It is minimised on the sequences that the units were chosen
by, one sequence a step, with Adam and a learning rate that falls to zero. All
parameters but the embeddings and the head are trained. Weights that are exactly zero
stay zero, and so do the units that a method only zeroed.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

ROWS = 128  # positions whose logits are held at once


def recover(
    model: nn.Module, dense: Path, ids: Tensor, steps: int, learning_rate: float
) -> None:
    """Trains a model after a dense one, in place.

    Args:
      model: a transformers model; a zero of its matrices is taken for pruned.
      dense: the directory of the dense model.
      ids: token ids (sequences, length); step after step the next one, and over again.
      steps: number of steps.
      learning_rate: learning rate of the first step.
    """
    teacher = transformers.AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.float32
    ).eval()
    trained = [*_trained(model)]
    # Zero is pruned: its gradient is masked, and Adam's moments of it stay zero.
    masks = [weight != 0 for weight in trained]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        with torch.enable_grad():
            _differentiate(model, teacher, ids[step % len(ids)])
        for weight, mask in zip(trained, masks, strict=True):
            weight.grad.mul_(mask)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """What is trained; the rest needs no gradient from here on."""
    model.requires_grad_(False)
    for name, parameter in model.base_model.named_parameters():
        if "embed_tokens" not in name:
            yield parameter.requires_grad_(True)


def _differentiate(model: nn.Module, teacher: nn.Module, ids: Tensor) -> None:
    """Adds the gradient of the mean divergence of a sequence (length,)."""
    with torch.no_grad():
        teacher_states = teacher.base_model(
            ids[None], use_cache=False
        ).last_hidden_state[0]
    states = model.base_model(ids[None], use_cache=False).last_hidden_state[0]
    # Of the logits of all positions there is never more than a part.
    leaf = states.detach().requires_grad_(True)  # (length, width)
    for start in range(0, len(ids), ROWS):
        part = slice(start, start + ROWS)
        with torch.no_grad():
            teacher_log_probs = teacher.get_output_embeddings()(
                teacher_states[part]
            ).log_softmax(-1)
        log_probs = model.get_output_embeddings()(leaf[part]).log_softmax(-1)
        divergence = nn.functional.kl_div(
            log_probs, teacher_log_probs, reduction="sum", log_target=True
        )
        (divergence / len(ids)).backward()
    states.backward(leaf.grad)
