"""Made-up results of an experiment, and a parser of the pages written about them."""

import html.parser
import math
from typing import Any

import numpy as np

NAMES = (
    "magnitude",
    "averaged_weight",
    "averaged_magnitude",
    "obd",
    "preconditioned_magnitude",
    "taylor",
    "random",
    "threshold_average",
    "threshold_weight",
    "wanda",
)
BEST_FIRST = (
    "preconditioned_magnitude",
    "obd",
    "averaged_magnitude",
    "taylor",
    "averaged_weight",
    "threshold_average",
    "magnitude",
    "threshold_weight",
    "wanda",
    "random",
)


def synthetic(
    *,
    seeds: int = 3,
    criteria: int = 4,
    sparsities: tuple[float, ...] = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    allocations: tuple[str, ...] = ("global", "layer"),
    retrained: bool = True,
    layers: int = 4,
) -> dict[str, Any]:
    """Results in the shape of a real run: flat, then rising steeply; made up."""
    draw = np.random.default_rng(0)
    leaves = {"token_embedding/embedding": (65, 128)}
    for block in range(layers):
        for name, shape in (
            ("attention/qkv", (128, 384)),
            ("attention/out", (128, 128)),
            ("mlp/up", (128, 512)),
            ("mlp/down", (512, 128)),
        ):
            leaves[f"blocks/{block}/{name}/kernel"] = shape
    prunable = [name for name in leaves if name.startswith("blocks")]
    depth = np.linspace(-0.5, 0.5, len(prunable))

    def cell(criterion: str, allocation: str, sparsity: float, dense: float) -> dict:
        rank = BEST_FIRST.index(criterion)
        rise = (0.03 + 0.016 * rank) * (sparsity / (1 - sparsity)) ** 1.6 * 0.45
        rise *= 1 + 0.12 * draw.standard_normal() + 0.2 * (allocation == "layer")
        rise = 2.5 * math.tanh(rise / 2.5)
        held = rise**1.3 * 0.1 + 0.002 * draw.standard_normal() - 0.002
        tilt = (
            0.2 * sparsity * (1 - sparsity) * (allocation == "global") * (1 + rank / 3)
        )
        return {
            "criterion": criterion,
            "allocation": allocation,
            "sparsity": sparsity,
            "achieved": sparsity,
            "loss_pruned": dense + rise,
            "loss_retrained": dense - 0.042 + held if retrained else None,
            "sparsity_by_leaf": {
                name: float(np.clip(sparsity + tilt * at, 0, 1))
                for name, at in zip(prunable, draw.permutation(depth), strict=True)
            },
        }

    def weights(chosen: tuple[str, ...]) -> dict[str, Any]:
        steps = list(range(0, 2001, 50))
        walk = 0.004 * draw.standard_normal((24, len(steps))).cumsum(1)
        drift = 0.06 * draw.standard_normal((24, 1)) * np.linspace(0, 1, len(steps))
        values = 0.02 * draw.standard_normal((24, 1)) + walk + drift
        shares = np.sqrt(np.arange(1, len(steps) + 1))
        averages = values @ shares / shares.sum()
        limits = {"magnitude": np.abs(values[:, -1]), "averaged_weight": abs(averages)}
        other = np.abs(averages) + 0.02 * draw.random(24)
        ranks = {name: limits.get(name, other) for name in chosen}
        return {
            "steps": steps,
            "names": [f"blocks/0/mlp/up/kernel[3, {index}]" for index in range(24)],
            "values": values.tolist(),
            "averages": averages.tolist(),
            "kept": {n: (r > np.quantile(r, 0.6)).tolist() for n, r in ranks.items()},
            "sparsity": 0.6,
        }

    def run(seed: int) -> dict[str, Any]:
        dense = 1.908 + 0.008 * float(draw.standard_normal())
        noisy = [
            {
                "step": step,
                "loss": dense
                - 0.1
                + 2.3 * math.exp(-step / 300)
                + 0.05 * draw.random(),
                "validation_loss": dense + 2.3 * math.exp(-step / 300)
                if step % 200 == 0
                else None,
            }
            for step in range(0, 2001, 20)
        ]
        text = "\nKING:\nWhat <b>say'st</b> thou & thine?\n\nDUKE:\nMy lord, no more."
        return {
            "seed": seed,
            "dense": {"steps": 2000, "loss": dense},
            "control": {"steps": 2500, "loss": dense - 0.042} if retrained else None,
            "curve": noisy,
            "cells": [
                cell(criterion, allocation, sparsity, dense)
                for criterion in NAMES[:criteria]
                for allocation in allocations
                for sparsity in sparsities
            ],
            "samples": [
                {"label": label, "text": text * 4}
                for label in (
                    "dense",
                    "preconditioned_magnitude 60 %",
                    "preconditioned_magnitude 60 %, retrained",
                )
            ],
            "weights": weights(NAMES[:criteria]),
        }

    return {
        "format": 2,
        "name": "scaled_down_llm",
        "config": {
            "preset": "cpu",
            "text": None,
            "seeds": list(range(seeds)),
            "sparsities": list(sparsities),
            "learning_rate": 1e-3,
            "smoke": False,
        },
        "versions": {"python": "3.13.1", "jax": "0.12.0", "optax": "0.2.6"},
        "device": "2 x CPU (x86_64)",
        "finished": "2026-11-24T16:20:00+00:00",
        "model": {
            "parameters": 816_512,
            "prunable": 786_432,
            "leaves": {
                name: {
                    "shape": list(shape),
                    "size": math.prod(shape),
                    "prunable": name in prunable,
                }
                for name, shape in leaves.items()
            },
        },
        "seeds": [run(seed) for seed in range(seeds)],
        "phases": [
            {
                "name": name,
                "seed": seed,
                "seconds": seconds + seed,
                "tokens_per_second": rate,
                "peak_memory_bytes": 412_000_000 + 1000 * seed,
                "energy_kwh": None,
                "co2_kg": None,
            }
            for seed in range(seeds)
            for name, seconds, rate in (
                ("train", 61.2, 25_100.0),
                ("prune and measure", 12.7, None),
                ("retrain", 180.4, 24_800.0),
            )
        ],
        "costs": [
            {
                "sparsity": sparsity,
                "bytes_dense": 3_266_048,
                "bytes_packed": int(3_266_048 * (1 - sparsity)) + 98_304,
                "flops_dense": 1_630_000,
                "flops_kept": int(1_630_000 * (1 - sparsity)) + 60_000,
            }
            for sparsity in sparsities
        ],
    }


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, all text, and what was left open."""

    VOID = frozenset(("meta", "br", "path", "use", "rect", "line", "link", "img"))

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
