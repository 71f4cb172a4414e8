"""The table of torch models resumes, counts, and its tones have the pitch they say."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("jaxprune.torch.environment")  # torchax
pytestmark = pytest.mark.parity

from benchmarks import torch_crepe, torch_models, torch_zoo  # noqa: E402


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


def test_there_are_forty_models_and_twenty_of_each_library():
    assert len(torch_zoo.TRANSFORMERS) >= 20
    assert len(torch_zoo.TIMM) >= 20
    assert len(set(torch_zoo.names())) == len(torch_zoo.names())


def test_tones_have_the_pitch_that_they_say():
    frames, cents = torch_crepe.tones(20, seed=3)
    assert frames.mean(1).abs().max() < 1e-6
    for frame, pitch in zip(frames.numpy(), cents, strict=True):
        period = torch_crepe.RATE / (10 * 2 ** (pitch / 1200))  # samples
        # A signal repeats after its period: the autocorrelation there is near its most.
        lag = round(period)
        likeness = np.corrcoef(frame[:-lag], frame[lag:])[0, 1]
        assert likeness > 0.85


def test_a_model_that_knows_the_pitch_is_always_right_and_a_flat_one_is_not():
    frames, cents = torch_crepe.tones(50, seed=0)

    def knows(frames):
        bins = (cents - torch_crepe.FIRST_CENTS) / torch_crepe.CENTS_OF_BIN
        grid = np.arange(360)
        return torch.tensor(np.exp(-((grid - bins[:, None]) ** 2) / 8))

    def constant(frames):
        return torch.tensor(np.tile(np.exp(-np.arange(360.0)), (50, 1)))

    assert torch_crepe.accuracy(knows, frames, cents) == 1
    assert torch_crepe.accuracy(constant, frames, cents) < 0.1
