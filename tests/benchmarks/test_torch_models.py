"""The tables of torch models resume and count, and inputs are what they say."""

import copy
import itertools
import types
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("jaxprune.torch.environment")  # torchax
pytestmark = pytest.mark.parity

from benchmarks import (  # noqa: E402
    synthetic_inputs,
    torch_model_groups,
    torch_models,
    torch_shipped,
    torch_trained,
    torch_zoo,
    unit_damage,
)


def small_zoo(monkeypatch, broken=()):
    def make(name):
        if name in broken:
            raise ValueError("no such model\nand more")
        torch.manual_seed(0)
        layers = torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        return torch.nn.Sequential(*layers).eval(), torch.randn(16, 4)

    monkeypatch.setattr(torch_zoo, "make", make)


@pytest.mark.full
def test_a_table_resumes_and_says_where_models_stop(tmp_path, monkeypatch, capsys):
    small_zoo(monkeypatch, broken=["b"])
    out = tmp_path / "models.csv"
    torch_models.main(torch_models.Config(out, ("a", "b")))
    rows = torch_models.rows_of(out)
    assert [row["model"] for row in rows] == ["a", "b"]
    assert (rows[0]["matrices"], rows[0]["seen"], rows[0]["left"]) == (
        "2",
        "2",
        "0.517",
    )
    assert float(rows[0]["forward_error"]) < 1e-6
    assert rows[1]["stopped_at"] == "function: ValueError: no such model"
    small_zoo(monkeypatch, broken=["a", "b"])  # what is there is not run again
    torch_models.main(torch_models.Config(out, ("a", "b")))
    assert torch_models.rows_of(out) == rows
    assert "1 of 2 models to the end" in capsys.readouterr().out


def test_the_axes_of_layers_are_those_of_their_parameters():
    def axes(layer, is_output):
        names = {id(p): name for name, p in layer.named_parameters()}
        return {*torch_model_groups.axes_of_layer(layer, is_output, names)}

    linear, depthwise = torch.nn.Linear(3, 2), torch.nn.Conv2d(4, 4, 3, groups=4)
    assert axes(linear, True) == {("weight", 0), ("bias", 0)}
    assert axes(linear, False) == {("weight", 1)}
    assert axes(torch.nn.ConvTranspose2d(3, 2, 3), True) == {("weight", 1), ("bias", 0)}
    assert axes(torch.nn.Embedding(3, 2), True) == {("weight", 1)}
    assert axes(torch.nn.BatchNorm2d(3), False) == {("weight", 0), ("bias", 0)}
    assert axes(depthwise, False) == {("weight", 0)}


@pytest.mark.full
def test_groups_that_the_other_has_too_are_counted(monkeypatch):
    small_zoo(monkeypatch)
    neurons = {("0.weight", 0), ("0.bias", 0), ("2.weight", 1)}
    theirs = [frozenset(neurons)]
    monkeypatch.setattr(torch_model_groups, "torch_pruning_axes", lambda *_: theirs)
    counts = {"removable": 1, "same": 1, "other": ""}
    assert torch_model_groups.compare_groups(*torch_zoo.make("a")) == counts
    theirs[0] -= {("0.bias", 0)}
    counts = {"removable": 1, "same": 0, "other": "0.bias:0 0.weight:0 2.weight:1"}
    assert torch_model_groups.compare_groups(*torch_zoo.make("a")) == counts


def test_there_are_forty_models_and_twenty_of_each_library():
    assert len(torch_zoo.TRANSFORMERS) >= 20
    assert len(torch_zoo.TIMM) >= 20
    assert len(set(torch_zoo.names())) == len(torch_zoo.names())


def test_tones_have_the_pitch_that_they_say():
    frames, cents = synthetic_inputs.tones(20, seed=3)
    assert frames.mean(1).abs().max() < 1e-6
    for frame, pitch in zip(frames.numpy(), cents, strict=True):
        period = synthetic_inputs.RATE / (10 * 2 ** (pitch / 1200))  # samples
        # A signal repeats after its period: the autocorrelation there is near its most.
        lag = round(period)
        likeness = np.corrcoef(frame[:-lag], frame[lag:])[0, 1]
        assert likeness > 0.85


def test_a_model_that_knows_the_pitch_is_always_right_and_a_flat_one_is_not():
    frames, cents = synthetic_inputs.tones(50, seed=0)

    def knows(frames):
        bins = (cents - synthetic_inputs.FIRST_CENTS) / synthetic_inputs.CENTS_OF_BIN
        grid = np.arange(360)
        return torch.tensor(np.exp(-((grid - bins[:, None]) ** 2) / 8))

    def constant(frames):
        return torch.tensor(np.tile(np.exp(-np.arange(360.0)), (50, 1)))

    assert torch_shipped.pitch_accuracy(knows, frames, cents) == 1
    assert torch_shipped.pitch_accuracy(constant, frames, cents) < 0.1


def test_voices_are_those_of_their_speakers_and_reactions_of_their_tokens():
    first, second = (synthetic_inputs.voices(range(3), 2, seed) for seed in (0, 1))
    assert first.shape == (6, 160, 40)
    # The mean spectrum is the vocal tract's: another melody of the same speaker is
    # nearer than the speakers are to one another.
    means = [x.mean(1).log().unflatten(0, (3, 2)).mean(1) for x in (first, second)]
    assert torch.cdist(*means).argmin(1).tolist() == [0, 1, 2]

    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[BH4-]", "[Na+]", ">>", "Br", "Cl"]
    vocabulary = [*special, *"()CNOFSnosc=.12"]
    example, truth = synthetic_inputs.reactions(vocabulary, 20, seed=0)
    masked = truth >= 0
    assert (example["input_ids"][masked] == vocabulary.index("[MASK]")).all()
    assert 0.1 < masked.sum() / example["attention_mask"].sum() < 0.2

    def knows(**example):
        logits = torch.nn.functional.one_hot(truth.clamp(0), len(vocabulary))
        return types.SimpleNamespace(logits=logits)

    assert torch_shipped.token_accuracy(knows, example, truth) == 1


def small_shipped(monkeypatch):
    """A network that is right by construction: it says which half of x is larger."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)
    module = torch.nn.Sequential(*layers).eval()
    inputs = torch.randn(128, 8)
    answers = module(inputs).argmax(1)
    shipped = torch_shipped.Shipped(
        module,
        [inputs[:64]],
        lambda step: inputs,
        lambda module: float((module(inputs).argmax(1) == answers).float().mean()),
    )
    monkeypatch.setattr(torch_shipped, "make", lambda name: shipped)


@pytest.mark.full
def test_a_trained_model_is_pruned_shrunk_and_recovers(tmp_path, monkeypatch):
    small_shipped(monkeypatch)
    settings = {
        "sparsities": (0.5,),
        "units": (0.5,),
        "unit_allocations": ("all", "damage"),
        "methods": ("magnitude", "sparsegpt"),
        "allocated": ("magnitude",),
        "allocations": ("global",),
        "repeats": 1,
    }
    config = torch_trained.Config(tmp_path / "trained.csv", "small", **settings)
    torch_trained.main(config)
    rows = torch_models.rows_of(config.out)
    dense, *changed = rows
    assert dense["score"] == "1.0000"
    assert [(r["what"], r["by"], r["allocation"]) for r in changed] == [
        ("units", "magnitude", "all"),
        ("units", "magnitude", "damage"),
        ("units", "solver", "all"),
        ("units", "solver", "damage"),
        ("weights", "magnitude", "layer"),
        ("weights", "sparsegpt", "layer"),
        ("weights", "magnitude", "global"),
    ]
    for row in changed:
        assert row["stopped_at"] == ""
        assert int(row["weights_left"]) < int(dense["weights_left"])
        assert float(row["recovered"]) >= float(row["score"])
    torch_trained.main(config)  # what is there is not run again
    assert torch_models.rows_of(config.out) == rows
    table = torch_trained.table(rows, "score")
    assert table.splitlines()[2].startswith("| nothing | 1.0000 |")


def test_units_go_where_they_do_least_damage_of_all_ways_to_share_them_out():
    rng = np.random.default_rng(0)
    losses = {"a": (0, 8, 16, 24), "b": (0, 2, 4, 6), "c": (0, 5, 10)}
    damage = {
        name: dict(zip(lost, np.cumsum(rng.exponential(size=len(lost))), strict=True))
        for name, lost in losses.items()
    }

    def total(counts):
        return sum(damage[name][lost] for name, lost in counts.items())

    # All ways in which at least 20 of the units go.
    ways = (
        dict(zip(losses, counts, strict=True))
        for counts in itertools.product(*losses.values())
        if sum(counts) >= 20
    )
    counts = unit_damage.counts_by_damage(damage, 20)
    assert sum(counts.values()) >= 20
    assert total(counts) == pytest.approx(min(map(total, ways)))


def test_recovery_holds_the_zeros(monkeypatch):
    small_shipped(monkeypatch)
    shipped = torch_shipped.make("small")
    module = copy.deepcopy(shipped.module)
    weight = module[0].weight
    with torch.no_grad():
        weight[::2] = 0
    before = weight.detach().clone()
    config = torch_trained.Config(Path("unused"), steps=5)
    torch_trained.recover(module, shipped, config)
    assert (weight[::2] == 0).all()
    assert (weight[1::2] != before[1::2]).any()
