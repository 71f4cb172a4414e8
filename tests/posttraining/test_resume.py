"""A job that was killed is resumed from its directory, to the same bits and rows.

    python test_resume.py DIRECTORY

prunes the model of these tests and kills itself on the way.
"""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import jaxprune as jp
from tests.support import small_models
from tests.support.small_models import chain, correlated, draw, run_chain
from tests.support.small_models import quick_compilation as quick_compilation
from tests.support.trajectories import same_bits

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (7, 7)  # of every weight: one program solves for all
LEAVES = {"a": (), "b": (), "w": (), "up": (2,), "down": (2,), "out": ()}
WEIGHTS = ["a", "b", "w", "up/0", "down/0", "up/1", "down/1", "out"]


PARAMETERS = {
    name: draw(i, *stacked, *SHAPE) / 2
    for i, (name, stacked) in enumerate(LEAVES.items())
}


def run(p, x):
    """Two weights of one input, a weight used twice, stacked layers."""
    x = jnp.tanh(x @ p["a"]) + jnp.sin(x @ p["b"])
    x = jnp.tanh(jnp.tanh(3 * x @ p["w"]) @ p["w"])

    def layer(x, own):
        return x + jnp.sin(x @ own["up"]) @ own["down"], None

    x, _ = jax.lax.scan(layer, x, {k: p[k] for k in ("up", "down")})
    return x @ p["out"]


BATCHES = [correlated(i, 16, 7) for i in range(2)]


def name_of(weight):
    """Which weight of the model it is, dense; None for another model's."""
    for name in WEIGHTS:
        leaf, *index = name.split("/")
        own = PARAMETERS[leaf][tuple(map(int, index))]
        if own.tobytes() == weight.tobytes():
            return name
    return None


@dataclasses.dataclass(frozen=True)
class Stopping(jp.passes.wanda):
    """Wanda that fails, or kills its process, when it has pruned `left` weights.

    Attributes:
      left: see above.
      met: the names of the weights since the start.
      die: whether to kill.
      inputs: "dense" prunes a layer after all of it was seen.
    """

    left: ClassVar[int] = 10**6
    met: ClassVar[list] = []
    die: ClassVar[bool] = False

    def solve(self, matrix):
        kind = jax.ShapeDtypeStruct((), np.float32)
        # When it runs, not when it is traced.
        zero = io_callback(self.meet, kind, matrix.weight)
        weight = matrix.weight + zero[None, None]
        return super().solve(matrix._replace(weight=weight))

    @staticmethod
    def meet(weight):
        if len(Stopping.met) == Stopping.left:
            if Stopping.die:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("stopped on purpose")
        Stopping.met.append(name_of(np.asarray(weight)))
        return np.zeros((), np.float32)


STOPPED = pytest.raises(RuntimeError, match="stopped on purpose")


def prune(directory=None, left=10**6, params=None, fn=run, batches=BATCHES, **options):
    Stopping.left = left
    Stopping.met.clear()
    return small_models.prune(
        fn,
        jax.tree.map(jnp.asarray, PARAMETERS if params is None else params),
        batches,
        **{"method": Stopping()} | options,
        directory=directory,
    )


def settled(report):
    """A report without what a second start may change: times and compilations."""
    rows = [{k: v for k, v in r.items() if k != "seconds"} for r in report["weights"]]
    rest = {k: v for k, v in report.items() if k not in ("seconds", "programs")}
    return rest | {"weights": rows}


@pytest.fixture(scope="module")
def whole():
    """What an undisturbed job gives."""
    return prune()


DENSE = {"method": Stopping(inputs="dense")}


@pytest.fixture(scope="module")
def whole_layers():
    """What it gives where a layer is seen before it is pruned."""
    return prune(**DENSE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a job that is done, and what it gave; not to be written to."""
    directory = tmp_path_factory.mktemp("jobs") / "deep" / "directory"
    return directory, prune(directory)


@pytest.fixture
def directory(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished[0], tmp_path / "copy")


def check(result, whole):
    assert same_bits(result.params, whole.params)
    assert settled(result.report) == settled(whole.report)


@pytest.mark.full
def test_the_directory_makes_no_difference_to_the_result(whole, finished):
    assert [row["name"] for row in whole.report["weights"]] == WEIGHTS
    check(finished[1], whole)


@pytest.mark.full
def test_a_job_that_is_interrupted_again_and_again_gives_the_same(whole, tmp_path):
    # At the second weight of an input, at a weight used twice, in a stack.
    done = 0
    for weight in ("b", "w", "down/0"):
        left = WEIGHTS.index(weight)
        with STOPPED:
            prune(tmp_path, left - done)
        # What was done is not done again; the weights of an input are one segment.
        assert Stopping.met == WEIGHTS[done:left]
        done = left - (weight == "b")
    check(prune(tmp_path), whole)
    assert Stopping.met == WEIGHTS[done:]


@pytest.mark.full
@pytest.mark.parametrize("weight", ["down/0", "up/1", "out"])
def test_a_layer_seen_before_it_is_pruned_is_resumed_too(
    weight, tmp_path, whole_layers
):
    with STOPPED:
        prune(tmp_path, WEIGHTS.index(weight), **DENSE)
    check(prune(tmp_path, **DENSE), whole_layers)
    assert Stopping.met == WEIGHTS[WEIGHTS.index(weight) :]


def test_a_job_that_is_done_is_read_back_wherever_its_batches_lie(whole, directory):
    batches = [jnp.asarray(x) for x in BATCHES]
    check(prune(directory, batches=batches), whole)
    assert not Stopping.met


@pytest.mark.full  # imports jax in a process of its own
def test_a_killed_process_is_resumed(whole, tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as here, for the same bits
    }
    command = [sys.executable, __file__, str(tmp_path)]
    ended = subprocess.run(command, env=environment, timeout=300, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("segment_*.json"))) >= 3
    check(prune(tmp_path), whole)
    assert len(Stopping.met) <= len(WEIGHTS) - 3


def test_damaged_segments_are_done_again(whole, directory):
    files = sorted(p for p in directory.iterdir() if p.name.startswith("segment"))
    for i, path in enumerate(files):
        content = path.read_bytes()
        if i % 4 == 1:
            path.write_bytes(content[: len(content) // 2])
        elif i % 8 == 2:
            path.unlink()
    check(prune(directory), whole)
    assert 0 < len(Stopping.met) < len(WEIGHTS)


@pytest.mark.full
def test_half_precision_is_resumed_too(tmp_path):
    given = {
        "params": chain([7, 7, 7], dtype=jnp.bfloat16),
        "batches": [jnp.asarray(x.astype(jnp.bfloat16)) for x in BATCHES],
        "fn": run_chain,
    }
    with STOPPED:
        prune(tmp_path, 1, **given)
    check(prune(tmp_path, **given), prune(**given))


# Another job's directory.


def other_run(p, x):
    return run(p, -x * 2)


def changed(name):
    other = np.array(PARAMETERS[name])
    other.flat[0] += 1e-3
    return PARAMETERS | {name: other}


OTHERS = {
    "sparsity": {"sparsity": 0.6},
    "method": {"method": "wanda"},
    "pattern": {"pattern": jp.patterns.Unstructured()},
    "a weight": {"params": changed("up")},
    "the batches": {"batches": [BATCHES[0], BATCHES[1] + 1e-3]},
    "fewer batches": {"batches": BATCHES[:1]},
    "which weights": {"prunable": jp.tree.excluding("out")},
    "positions": {"positions": lambda x: np.arange(16) > 3},
    "the function": {"fn": other_run},
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_directory_of_another_job_is_refused_and_left_alone(what, directory):
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    with pytest.raises(ValueError, match="another directory"):
        prune(directory, **OTHERS[what])
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before


def test_other_positions_are_another_job(tmp_path):
    def later(start):
        return lambda x: np.arange(16) >= start

    given = {"params": chain([7, 7, 7]), "fn": run_chain}
    prune(tmp_path, positions=later(3), **given)
    with pytest.raises(ValueError, match="another directory"):
        prune(tmp_path, positions=later(8), **given)


def main(directory):
    Stopping.die = True
    prune(directory, left=WEIGHTS.index("down/0"))


if __name__ == "__main__":
    main(sys.argv[1])


@pytest.mark.full
def test_a_tied_weight_of_dense_inputs_is_resumed_to_the_same_bits(tmp_path):
    def fn(p, x):
        for _ in range(3):
            x = x + jnp.tanh(x @ p["a"]) @ p["b"]
        return x

    params = {"a": draw(0, 7, 7) / 2, "b": draw(1, 7, 7) / 2}
    batches = [correlated(i, 32, 7) for i in range(2)]
    method = jp.passes.sparsegpt(inputs="dense")

    def prune():
        return jp.prune_trained(
            fn, params, batches, method=method, sparsity=0.5, directory=tmp_path
        ).params

    expected = prune()
    done = sorted(tmp_path.glob("segment*"))
    assert len({path.name[:13] for path in done}) > 4
    for path in done:
        if path.name >= "segment_00004":
            path.unlink()
    assert same_bits(prune(), expected)
