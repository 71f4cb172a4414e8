"""`jaxprune shrink`: a smaller model, as a directory that every loader reads."""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import tyro
from flax import nnx

import jaxprune as jp
from jaxprune.arrays.console_progress import Progress
from jaxprune.cli import models, parse, provenance
from jaxprune.cli.console import Console
from jaxprune.cli.eval import described, measure, named, needed_tokenizer, number
from jaxprune.evaluation import layer_search, perplexity, texts
from jaxprune.formats import rewrite
from jaxprune.formats.checkpoint_dir import open_directory
from jaxprune.graph.axis_dims import find
from jaxprune.models import hf

_DOWN, _OUT = "mlp/down/kernel", "attention/out/kernel"
_STAGES = ("dense", "shrunk")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink(models.ModelOptions):
    """Removes whole layers, heads and neurons; what is left is a smaller model.

    All layers lose as many heads and neurons, since that is what config.json can say,
    and each chooses its own. Without --calibration the weights alone decide.

    Attributes:
      model: the directory of the model: config.json, *.safetensors, tokenizer.json.
      out: the directory to write, of the same form, with jaxprune.json.
      ffn: the share of the neurons of each MLP to remove.
      heads: the share of the heads to remove: of key heads, each with all query heads
        that share it; where all share one key head, of query heads.
      query_heads: the share of the query heads of each key head to remove.
      layers: how many layers to leave; which go is searched by the loss on
        --calibration.
      drop_layers: the numbers of the layers to remove, instead.
      budget: instead of --ffn and --heads: the share of the parameters that may be
        left; one share for neurons and heads is found.
      calibration: texts that show what the model is for: .txt, .md, .jsonl with a
        "text" in each line, or .npy of int32 token ids. Units are then ranked by their
        weights times the sizes of their inputs. The last tenth of each text is not
        calibrated on; it measures the model before and after.
      sequences: how many are calibrated on.
      length: tokens of a sequence, BOS included.
      seed: which sequences are drawn.
      batch: sequences that the model sees at once.
      limit: windows of each text that the model is measured on.
      overwrite: replace an earlier result.
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    ffn: float = 0.0
    heads: float = 0.0
    query_heads: float = 0.0
    layers: int | None = None
    drop_layers: tuple[int, ...] = ()
    budget: float | None = None
    calibration: tuple[Path, ...] = ()
    sequences: int = 32
    length: int = 256
    seed: int = 0
    batch: int = 4
    limit: int = 16
    overwrite: bool = False

    def run(self, console: Console, arguments: list[str]) -> dict[str, Any]:
        """Shrinks the model; the record."""
        _check(self)
        lazy = models.find(self.model, self)
        models.say_ignored(lazy, console)
        _check_fits(self, lazy)
        tokens, seen = _texts(self, lazy)
        model = lazy.read()
        before = _size(model.params)
        dense = measure(model, seen, self.batch)
        kept, search = _kept_layers(self, model, tokens, console)
        model = _without(model, kept)
        record: dict[str, Any] = {
            "method": "shrink by " + ("wanda" if self.calibration else "magnitude"),
            "pattern": "whole layers, heads and neurons",
            "sparsity": _asked(self),
            "layers": {"kept": kept, **search},
        }
        params = model.params
        if self.budget is not None or max(self.ffn, self.heads, self.query_heads) > 0:
            found = _narrower(self, model, tokens)
            params = found.params
            record["units"] = found.report
        after = _size(params)
        if seen:
            model = _resized(model, params)
            record["perplexity"] = _compared(
                seen, dense, measure(model, seen, self.batch)
            )
            for name, of in record["perplexity"].items():
                shown = [number(of[stage]["perplexity"]) for stage in _STAGES]
                console.say(f"perplexity on {name}: {shown[0]} became {shown[1]}")
        record |= {"achieved": 1 - after / before, **provenance.making(arguments)}
        hf.write_smaller(
            self.model,
            self.out,
            params,
            model.names,
            kept=kept,
            ignore_config=self.ignore_config,
            provenance=record,
            overwrite=self.overwrite,
        )
        console.say(
            f"'{self.out}': {after:,} of {before:,} parameters, {len(kept)} layers"
        )
        return {**record, "out": str(self.out)}


def _check(job: Shrink) -> None:
    """Refuses what can be refused without opening the model."""
    shares = {"ffn": job.ffn, "heads": job.heads, "query-heads": job.query_heads}
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"--{name} must be a share in [0, 1), got {share}")
    narrower = max(shares.values()) > 0
    if job.budget is not None and not 0 < job.budget < 1:
        raise ValueError(f"--budget must be a share in (0, 1), got {job.budget}")
    if job.budget is not None and narrower:
        raise ValueError(
            "--budget finds the shares of neurons and heads itself; leave out --ffn, "
            "--heads and --query-heads, or the budget"
        )
    if job.layers is not None and job.drop_layers:
        raise ValueError("--layers and --drop-layers exclude each other; give one")
    if not (narrower or job.budget or job.layers or job.drop_layers):
        raise ValueError(
            "something must be removed; give --ffn, --heads, --query-heads, --layers, "
            "--drop-layers or --budget"
        )
    if job.layers is not None and not job.calibration:
        raise ValueError(
            "--layers needs --calibration FILE..., by which the layers are chosen; "
            "--drop-layers names them without"
        )
    parse.check_at_least_one(
        sequences=job.sequences,
        batch=job.batch,
        layers=job.layers,
        limit=job.limit,
    )
    if job.length < 8:
        raise ValueError(f"--length must be at least 8 tokens, got {job.length}")
    texts.check_files(job.calibration)
    rewrite.check_place(job.out, job.model, overwrite=job.overwrite)


def _check_fits(job: Shrink, model: models.Model) -> None:
    """Refuses what this model cannot lose, before its parameters are read."""
    config = model.config
    if job.layers is not None and job.layers > config.layers:
        raise ValueError(
            f"--layers must be at most the {config.layers} that there are, got "
            f"{job.layers}"
        )
    wrong = [i for i in job.drop_layers if not 0 <= i < config.layers]
    if wrong or len({*job.drop_layers}) == config.layers:
        raise ValueError(
            f"--drop-layers must be numbers from 0 to {config.layers - 1}, not all, "
            f"got {', '.join(map(str, job.drop_layers))}"
        )
    if job.query_heads and config.kv_heads in (1, config.heads):
        raise ValueError(
            "--query-heads needs several key heads with several query heads each, got "
            f"{config.heads} query and {config.kv_heads} key heads; give --heads"
        )
    kind = open_directory(job.model).config["model_type"]
    if kind == "gpt2" and (job.heads or job.query_heads or job.budget):
        raise ValueError(
            "the config.json of a gpt2 model cannot say fewer heads; give --ffn, "
            "--layers or --drop-layers"
        )
    if job.calibration and job.length > config.context:
        raise ValueError(
            f"--length must be at most the model's context {config.context}, got "
            f"{job.length}"
        )


def _asked(job: Shrink) -> dict[str, Any]:
    """What was asked for; JSON-able."""
    names = ("ffn", "heads", "query_heads", "layers", "drop_layers", "budget")
    return {name: value for name in names if (value := getattr(job, name))}


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _texts(
    job: Shrink, model: models.Model
) -> tuple[np.ndarray | None, dict[str, perplexity.Windows]]:
    """Sequences to calibrate on, None without texts; by name, what is held out."""
    if not job.calibration:
        return None, {}
    config = model.config
    tokenizer = needed_tokenizer(job.model, job.calibration)
    begins = models.beginning(tokenizer, job, config.vocab_size)
    whole = [texts.read(path, tokenizer, config.vocab_size) for path in job.calibration]
    parts = [texts.without_end(text, job.limit * job.length) for text in whole]
    drawn = texts.draw(
        [begin for begin, _ in parts],
        sequences=job.sequences,
        length=job.length,
        bos=begins.token,
        seed=job.seed,
    )
    seen = {
        name: perplexity.windows(
            end,
            context=job.length,
            bos=begins.token,
            limit=job.limit,
            longest=config.context,
        )
        for name, (_, end) in zip(named(job.calibration), parts, strict=True)
        if end is not None
    }
    return drawn.tokens, seen


def _resized(model: models.Model, params: Any) -> models.Model:
    """The model that the smaller parameters are of."""
    config = hf.resized(model.config, params)
    graphdef, _ = nnx.split(hf.abstract(config), nnx.Param)
    return model._replace(graphdef=graphdef, params=params, config=config)


def _compared(
    seen: dict[str, perplexity.Windows], *stages: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """How each text is evaluated, and what was measured at each stage."""
    found = {name: described(own) for name, own in seen.items()}
    for stage, measured in zip(_STAGES, stages, strict=True):
        for name, result in measured.items():
            found[name][stage] = result
    return found


def _kept_layers(
    job: Shrink, model: models.Model, tokens: np.ndarray | None, console: Console
) -> tuple[list[int], dict[str, Any]]:
    """The layers that stay, and how they were found."""
    whole = model.config.layers
    if job.layers is None or tokens is None:
        return [i for i in range(whole) if i not in job.drop_layers], {}
    runs = 1 + sum(range(job.layers + 1, whole + 1))
    with Progress(runs, "searching layers", unit="run", leave=False) as progress:
        found = layer_search.keep(
            model.graphdef,
            model.params,
            tokens,
            job.layers,
            batch=job.batch,
            tick=progress.update,
        )
    console.note(
        f"without layers {', '.join(map(str, found.dropped)) or 'none'}: "
        f"{found.nats[0]:.4f} nats a token became {found.nats[-1]:.4f}"
    )
    return found.kept, {"dropped": found.dropped, "nats": found.nats}


def _without(model: models.Model, kept: list[int]) -> models.Model:
    """The model with some of its layers."""
    config, params = hf.keep_layers(model.config, model.params, kept)
    graphdef, _ = nnx.split(hf.abstract(config), nnx.Param)
    return model._replace(graphdef=graphdef, params=params, config=config)


def _narrower(
    job: Shrink, model: models.Model, tokens: np.ndarray | None
) -> jp.ShrinkResult:
    """The model with fewer heads and neurons."""
    fn = functools.partial(_logits, model.graphdef)
    some = min(8, model.config.context)
    batch = jax.ShapeDtypeStruct((1, some), np.int32)
    roles = _roles(jp.axis_groups(fn, model.params, batch), model)
    if tokens is None:
        scores = jp.scores.magnitude(model.params)
    else:
        scores = _by_inputs(job, model, tokens)
    if job.budget is not None:
        own = [name for name, role in roles.items() if role in ("ffn", "heads")]
        return jp.shrink(fn, model.params, batch, scores, budget=job.budget, groups=own)
    shares = {"ffn": job.ffn, "heads": job.heads, "query heads": job.query_heads}
    asked = {name: shares[role] for name, role in roles.items()}
    return jp.shrink(fn, model.params, batch, scores, asked)


def _logits(graphdef: Any, params: Any, ids: Any) -> Any:
    return nnx.merge(graphdef, params)(ids)


def _states(graphdef: Any, params: Any, ids: Any) -> Any:
    model = nnx.merge(graphdef, params)
    return model.states(model.embed(ids))[0]


def _roles(groups: jp.AxisGroups, model: models.Model) -> dict[str, str]:
    """Name of a group to what it is: "ffn", "heads", "query heads"."""
    names = {group.dim: group.name for group in groups}
    dims = {leaf.name: leaf.parts[0] for leaf in groups.trace.leaves}
    config, roles = model.config, {}
    for layer in range(config.layers):
        roles[names[find(dims[f"layers/{layer}/{_DOWN}"][0])]] = "ffn"
        # Key heads x query heads of each x features; those of one are left out.
        whole = find(dims[f"layers/{layer}/{_OUT}"][0])
        parts = whole.parts or [whole]
        if config.heads > 1:
            roles[names[find(parts[0])]] = "heads"
        if 1 < config.kv_heads < config.heads:
            roles[names[find(parts[1])]] = "query heads"
    return roles


def _by_inputs(job: Shrink, model: models.Model, tokens: np.ndarray) -> Any:
    """Scores of the rows that neurons and heads go out by: |w| times their input."""
    batches = [tokens[i : i + job.batch] for i in range(0, len(tokens), job.batch)]
    found = jp.calibrate(
        functools.partial(_states, model.graphdef),
        model.params,
        batches,
        prunable=lambda name, leaf: name.endswith((_DOWN, _OUT)),
    )
    scores = [
        jp.scores.wanda(leaf, found[name].mean_square.reshape(-1))
        if name in found
        else optax.MaskedNode()
        for name, leaf in jp.tree.named_leaves(model.params).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(model.params), scores)
