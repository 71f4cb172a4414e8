"""A Phi-3-vision and pictures with questions, as the stages of a run see them."""

import base64
import dataclasses
import fnmatch
import functools
import io
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

import jaxprune as jp
from experiments.harness.optimizer import frozen, optimizer
from experiments.harness.task import Looks, Mean
from experiments.phi3_vision import preprocess
from experiments.phi3_vision.model import unused
from experiments.phi3_vision.question_answers import Asked
from experiments.phi3_vision.vision_model import Tokenizer, VisionModel, prunable
from jaxprune.arrays import processes
from jaxprune.arrays.low_bit import Storage
from jaxprune.lm.models.decoder.model import cross_entropy
from jaxprune.typing import Params, Prunable

SHOWN = 8
"""Pictures of a sample."""
QUESTIONS = 20
"""Results tell the questions apart where there are at most so many."""
_SHOWN_SIZE = 256  # pixels


@dataclasses.dataclass(frozen=True, eq=False)
class PictureTask:
    """Answers to questions about pictures; a `task.Task`.

    Attributes:
      model: the model's functions.
      tokenizer: tokenizer of the questions.
      train: examples to train on.
      held_out: examples to measure on.
      frozen: globs of the leaves that are not trained.
      rank: rank of LoRA's change of each matrix; None trains in full.
      storage: how averages are held.
      write: (leaves by name, place, provenance) writes a directory with these leaves;
        None where the run's checkpoints are enough.
    """

    model: VisionModel
    tokenizer: Tokenizer
    train: Sequence[Asked]
    held_out: Sequence[Asked]
    frozen: tuple[str, ...] = ()
    rank: int | None = None
    storage: Storage = "float32"
    write: Callable[[Mapping[str, jax.Array], Path, Mapping[str, Any]], None] | None = (
        None
    )
    looks: ClassVar[Looks] = Looks()
    begins_trained: ClassVar[bool] = False

    @functools.cached_property
    def allocations(self) -> Mapping[str, tuple[jp.allocation.Name, Prunable]]:
        """One global ranking: of all, of the decoder, of the tower."""
        eligible = prunable(self.model.config)

        def within(part: str) -> Prunable:
            def rule(name: str, leaf: Any) -> bool:
                return (
                    name.startswith(part)
                    and self.trained(name)
                    and eligible(name, leaf)
                )

            return rule

        return {
            "all": ("global", within("")),
            "decoder": ("global", within("decoder/")),
            "tower": ("global", within("tower/")),
        }

    @functools.cached_property
    def _sizes(self) -> tuple[int, int]:
        """Tokens and views of the longest example."""
        lengths, views = [], []
        for example in (*self.train, *self.held_out):
            config = self.model.config
            rows, columns = preprocess.crops_of(
                *example.size, size=config.tower.image, crops=config.crops
            )
            places = preprocess.token_layout(rows, columns, config.side, 0)
            text = self._text(example).split("<|image_1|>")
            # A text between pictures begins with BOS where the tokenizer has one.
            bos = self.tokenizer.bos is not None
            words = sum(len(self.tokenizer.encode(part)) + bos for part in text)
            lengths.append(len(places) + words)
            views.append(1 + rows * columns)
        return max(lengths) - 1, max(views)  # the last token is a target alone

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self._sizes[0]

    def _answer(self, example: Asked) -> int:
        """Tokens of the answer where it stands; alone it may be split otherwise."""
        asks = preprocess.chat(example.question, 1) + "<|end|>"
        text, question = (
            t.split("<|image_1|>")[-1] for t in (self._text(example), asks)
        )
        return len(self.tokenizer.encode(text)) - len(self.tokenizer.encode(question))

    def _text(self, example: Asked) -> str:
        return preprocess.chat(example.question, 1) + example.answer + "<|end|>"

    @property
    def shapes(self) -> Params:
        """The parameters' shapes and types."""
        return self.model.shapes

    def init(self, seed: int) -> Params:
        """The parameters before the first step."""
        return self.model.init(seed)

    def trained(self, name: str) -> bool:
        """Whether a leaf is trained."""
        return not any(fnmatch.fnmatchcase(name, glob) for glob in self.frozen)

    def optimizer(
        self, learning_rate: optax.ScalarOrSchedule, *, track: Collection[str]
    ) -> optax.GradientTransformation:
        """AdamW of the leaves that are trained; the others have no moments."""
        return optimizer(
            learning_rate,
            track=track,
            trained=self.trained,
            rank=self.rank,
            targets=self.allocations["all"][1],
            storage=self.storage,
        )

    def token_losses(self, params: Params, inputs: Any, targets: Any) -> jax.Array:
        """Nats of each target; those below 0 are none and cost nothing."""
        states = self.model.states(params, inputs)
        decoder = self.model.bind(params).decoder
        losses = cross_entropy(decoder, states, jnp.maximum(targets, 0))
        return jnp.where(targets >= 0, losses, 0)

    def loss(self, params: Params, inputs: Any, targets: Any, key: Any) -> jax.Array:
        """Mean nats of the answers' tokens, their end included."""
        params = frozen(params, self.trained)
        losses = self.token_losses(params, inputs, targets)  # (batch, time)
        return losses.sum() / (targets >= 0).sum()

    def batches(
        self, batch_size: int, seed: int
    ) -> Callable[[int], tuple[Any, np.ndarray]]:
        """Examples drawn at random, a pure function of the step."""
        if not self.train:
            raise ValueError("a picture task needs examples to train on, got none")

        def batch(step: int) -> tuple[Any, np.ndarray]:
            philox = np.random.Philox(key=np.array([seed, step], np.uint64))
            chosen = philox.random_raw(batch_size) % np.uint64(len(self.train))
            inputs, targets, _ = self.packed([self.train[int(i)] for i in chosen])
            return inputs, targets

        return batch

    def validation(
        self, batch_size: int, limit: int | None
    ) -> list[tuple[Any, np.ndarray, np.ndarray]]:
        """All held-out examples, their answers without the end counted.

        `limit` counts tokens, so it takes the first limit / length examples.
        """
        most = None if limit is None else max(1, limit // self.length)
        chosen = self.held_out[:most]
        batches = []
        for start in range(0, len(chosen), batch_size):
            part = list(chosen[start : start + batch_size])
            # The last batch is filled with its first example at weight 0: one shape,
            # one program.
            missing = batch_size - len(part)
            inputs, targets, weights = self.packed(part + part[:1] * missing)
            weights[len(part) :] = 0
            batches.append((inputs, targets, weights))
        return batches

    def packed(
        self, examples: Sequence[Asked]
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Examples as one batch: inputs, targets and weights.

        Inputs are tokens and sources (batch, length) and pixels (batch, views, size,
        size, 3); targets (batch, length) are -1 where none is; weights are 1 at the
        answer.
        """
        time, views = self._sizes
        size = self.model.config.tower.image
        count = len(examples)
        # (examples, time), filled up with token 0, no source, and no target.
        tokens, sources, targets = (
            np.full((count, time), fill, np.int32) for fill in (0, -1, -1)
        )
        weights = np.zeros((count, time), np.float32)
        pixels = np.zeros((count, views, size, size, 3), np.float32)
        for i, example in enumerate(examples):
            prompt = self._prompt(example)
            answer = self._answer(example)
            stop = len(prompt.tokens) - 1
            tokens[i, :stop], sources[i, :stop] = (
                prompt.tokens[:-1],
                prompt.sources[:-1],
            )
            targets[i, stop - answer - 1 : stop] = prompt.tokens[-answer - 1 :]
            # One less than the targets: <|end|> is trained on, and no part of being
            # right.
            weights[i, stop - answer - 1 : stop - 1] = 1
            pixels[i, : len(prompt.pixels)] = prompt.pixels
        return (
            {"tokens": tokens, "sources": sources, "pixels": pixels},
            targets,
            weights,
        )

    def _prompt(self, example: Asked) -> preprocess.Prompt:
        return preprocess.prompt(
            self._text(example),
            [example.image],
            self.tokenizer.encode,
            self.model.config,
            bos=self.tokenizer.bos,
        )

    @functools.cached_property
    def _guesses(self) -> Callable[..., jax.Array]:
        @jax.jit
        def guesses(params: Params, inputs: Any) -> jax.Array:
            states = self.model.states(params, inputs)
            logits = self.model.bind(params).decoder.logits(states)
            return jnp.argmax(logits, -1)

        return guesses

    def right(self, params: Params, examples: Sequence[Asked]) -> np.ndarray:
        """Whether each answer, read greedily, is right: booleans."""
        correct = []
        for start in range(0, len(examples), 64):
            part = list(examples[start : start + 64])
            filled = part + part[:1] * (64 - len(part))
            inputs, targets, weights = self.packed(filled)
            guessed = processes.fetch(self._guesses(params, inputs))
            matches = (guessed == targets) | (weights == 0)
            correct.append(matches.all(1)[: len(part)])
        return np.concatenate(correct)

    def measured(self, params: Params, loss: float, mean: Mean) -> dict[str, Any]:
        """The share of held-out questions answered right, of all and of each."""
        right = self.right(params, self.held_out)
        asked_questions = np.array([example.question for example in self.held_out])
        questions = np.unique(asked_questions)
        if len(questions) > QUESTIONS:
            # Of a data set with a question for each picture no share by question means
            # anything.
            questions = questions[:0]
        by_question = {
            str(question): float(right[asked_questions == question].mean())
            for question in questions
        }
        return {"accuracy": float(right.mean()), "by_question": by_question}

    def save(self, params: Params, out: Path, provenance: Mapping[str, Any]) -> None:
        """Writes a directory like the one the model came from, if it came from one."""
        if self.write is None:
            return
        # LoRA changed these leaves only; the others keep their bytes in the directory.
        low_rank = self.allocations["all"][1] if self.rank is not None else None
        changed = {
            name: leaf
            for name, leaf in jp.tree.named_leaves(params).items()
            if self.trained(name) and (low_rank is None or low_rank(name, leaf))
        }
        self.write(changed, out, provenance)

    def text_only(self) -> dict[str, float]:
        """The best that can be done without pictures: each question's usual answer."""
        counts: dict[str, Counter[str]] = {}  # question to how often each answer
        for example in self.train:
            counts.setdefault(example.question, Counter())[example.answer] += 1
        answers = {
            q: answers_to_question.most_common(1)[0][0]
            for q, answers_to_question in counts.items()
        }
        right = [answers.get(a.question) == a.answer for a in self.held_out]
        return {"accuracy": float(np.mean(right))}

    def shown(self, params: Params, label: str, length: int) -> dict[str, Any]:
        """Some held-out pictures, what is asked, and what the model answers."""
        examples = list(self.held_out[:SHOWN])
        inputs, _, weights = self.packed(examples)
        guessed = processes.fetch(self._guesses(params, inputs))
        lines, pictures = [], []
        for i, example in enumerate(examples):
            answer = self.tokenizer.decode(guessed[i][weights[i] > 0].tolist()).strip()
            wrong = "" if answer == example.answer else f" ({example.answer})"
            lines.append(f"{example.question} {answer}{wrong}")
            pictures.append({"png": _png(example.image), "text": lines[-1]})
        return {"label": label, "text": "\n".join(lines), "pictures": pictures}


def _png(image: Image.Image) -> str:
    """A picture, small, as base64 of a PNG."""
    stream = io.BytesIO()
    image = image.convert("RGB")
    # Pictures lie in results.json and in the page, which loads nothing.
    image.thumbnail((_SHOWN_SIZE, _SHOWN_SIZE))
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def without_gradient(task: PictureTask) -> list[str]:
    """The leaves that no answer depends on, by name; they are never ranked."""
    globs = unused(task.model.config)
    names = jp.tree.names(task.shapes)
    return [name for name in names if any(fnmatch.fnmatchcase(name, g) for g in globs)]
