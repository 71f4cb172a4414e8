import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.lm.checkpoints import prune_magnitude, rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from tests.support.hf_directories import BFLOAT16, build, contents, llama, normal

OUT_IN = jp.Axes(inputs=(-1,), outputs=(-2,))
PATTERNS = [jp.patterns.Unstructured(), jp.patterns.PerOutput(), jp.patterns.NM(2, 4)]


def prune(folder, tensors, config=None, shards=1, **settings):
    """Prunes a directory of these tensors; what is read back, and the report."""
    source = open_directory(build(folder / "m", tensors, shards, config))
    report = prune_magnitude.prune_directory(source, folder / "out", **settings)
    pruned = open_directory(folder / "out")
    return {name: pruned.read(name) for name in tensors}, report


def expected(weight, sparsity, pattern, axes=OUT_IN):
    """The same by `jp.prune`, an independent program."""
    params = {"w": jnp.asarray(weight)}
    scores = {"w": jnp.asarray(np.abs(weight.astype(np.float32)))}
    share = None if pattern.sparsity else sparsity
    return np.asarray(jp.prune(params, scores, share, pattern=pattern, axes=axes)["w"])


@pytest.mark.parametrize("pattern", [*PATTERNS, jp.patterns.Block(8, 4)], ids=str)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama", np.float32),
        pytest.param("gpt2", BFLOAT16, marks=pytest.mark.full),
        pytest.param("llama", np.float16, marks=pytest.mark.full),
        pytest.param("llama", BFLOAT16, marks=pytest.mark.full),
        pytest.param("gpt2", np.float32, marks=pytest.mark.full),
        pytest.param("gpt2", np.float16, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_the_weights_kept_are_those_that_prune_keeps(tmp_path, pattern, dtype, kind):
    weight = normal(0, 24, 40, dtype=dtype)
    sparsity = 0.5 if pattern.sparsity else 0.3
    new, report = prune(
        tmp_path,
        {"h.0.mlp.weight": weight},
        {"model_type": kind},
        sparsity=sparsity,
        pattern=pattern,
    )
    axes = OUT_IN if kind == "llama" else jp.Axes()
    wanted = expected(weight, sparsity, pattern, axes)
    np.testing.assert_array_equal(new["h.0.mlp.weight"], wanted)
    zeros = round(sparsity * weight.size)
    assert report.tensors == {"h.0.mlp.weight": (zeros, weight.size)}
    assert report.achieved == zeros / weight.size


@pytest.mark.parametrize("shape", [(10, 9), (2, 7, 12)], ids=str)
def test_blocks_at_the_edge_count_as_one_and_each_expert_loses_as_many(tmp_path, shape):
    weight, block = normal(3, *shape), jp.patterns.Block(4, 4)
    new, _ = prune(tmp_path, {"w.weight": weight}, sparsity=0.5, pattern=block)
    for matrix, pruned in zip(
        weight.reshape(-1, *shape[-2:]),
        new["w.weight"].reshape(-1, *shape[-2:]),
        strict=True,
    ):
        np.testing.assert_array_equal(pruned, expected(matrix, 0.5, block))


def test_a_rule_that_excludes_what_is_not_there_is_refused(tmp_path):
    rule = jp.tree.excluding("layers/9/*")
    with pytest.raises(ValueError, match=r"excluding\('layers/9/\*'\) must match"):
        prune(tmp_path, {"up.weight": normal(0, 8, 8)}, sparsity=0.5, prunable=rule)
    assert not (tmp_path / "out").exists()


def oracle(weight, removed):
    """The lowest magnitudes removed one by one; of those tied, the last first."""
    order = sorted(range(weight.size), key=lambda i: (abs(weight.flat[i]), -i))
    kept = weight.copy().reshape(-1)
    kept[order[:removed]] = 0
    return kept.reshape(weight.shape)


dtypes = st.sampled_from([np.dtype("f4"), np.dtype("f2"), np.dtype("f8"), BFLOAT16])


def zeroed(weight, removed, pattern):
    """What is left of an [out, in] matrix."""
    number = np.uint32(weight.size - removed)
    with jax.enable_x64(weight.itemsize == 8):
        kept = prune_magnitude._keep_mask(weight, number, pattern, input_first=False)
    return np.where(kept, weight, weight.dtype.type(0))


@pytest.mark.full
@given(
    st.lists(st.integers(-3, 3), min_size=48, max_size=48), st.floats(0, 0.99), dtypes
)
def test_counts_are_exact_and_ties_keep_the_first(values, share, dtype):
    weight = np.array(values, dtype).reshape(6, 8)
    removed = round(share * weight.size)
    cut = zeroed(weight, removed, jp.patterns.Unstructured())
    np.testing.assert_array_equal(cut, oracle(weight, removed))


def test_float64_weights_that_are_one_float32_are_told_apart(tmp_path):
    weight = (1 + np.arange(48)[::-1] * 2.0**-50).reshape(6, 8)
    new, _ = prune(tmp_path, {"w.weight": weight}, sparsity=0.5)
    np.testing.assert_array_equal(new["w.weight"], oracle(weight, 24))


@pytest.mark.full
@given(
    st.sampled_from([(1, 9), (4, 1), (6, 7)]), st.integers(0, 99), st.floats(0, 0.99)
)
def test_each_output_loses_the_same_count_and_ties_keep_the_first(shape, seed, share):
    weight = np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)
    removed = round(share * weight.size)
    per, rest = divmod(removed, len(weight))
    wanted = [oracle(row, per + (i < rest)) for i, row in enumerate(weight)]
    cut = zeroed(weight, removed, jp.patterns.PerOutput())
    np.testing.assert_array_equal(cut, np.stack(wanted))


@pytest.mark.full
def test_every_pattern_keeps_the_first_of_tied_weights(tmp_path):
    for i, pattern in enumerate(PATTERNS):
        share = None if pattern.sparsity else 0.5
        (tmp_path / str(i)).mkdir()
        weights = {"w.weight": np.full((4, 8), -2, np.float32)}
        new, _ = prune(tmp_path / str(i), weights, sparsity=share, pattern=pattern)
        wanted = expected(weights["w.weight"], 0.5, pattern)
        np.testing.assert_array_equal(new["w.weight"], wanted)
        assert (new["w.weight"] == 0).sum() == 16


@pytest.mark.parametrize(
    ("config", "name", "shape"),
    [
        ({"model_type": "qwen3_vl_moe"}, "mlp.experts.gate_up_proj", (2, 8, 12)),
        ({"decoder": {"model_type": "gpt2"}}, "decoder.h.0.mlp.c_fc.weight", (8, 12)),
    ],
)
def test_two_of_four_lie_along_the_inputs_where_these_come_first(
    tmp_path, config, name, shape
):
    new, _ = prune(tmp_path, {name: normal(0, *shape)}, config, pattern="2:4")
    fours = new[name].reshape(*shape[:-2], 2, 4, 12)
    assert ((fours == 0).sum(-2) == 2).all()


@pytest.mark.full
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_stacked_experts_are_pruned_one_by_one(tmp_path, pattern):
    stack = normal(0, 3, 8, 16) * np.array([1, 10, 100], np.float32)[:, None, None]
    name = "model.layers.0.mlp.experts.down_proj"
    share = None if pattern.sparsity else 0.25
    new, _ = prune(tmp_path, {name: stack}, sparsity=share, pattern=pattern)
    wanted = [expected(each, share, pattern) for each in stack]
    np.testing.assert_array_equal(new[name], np.stack(wanted))


def test_embeddings_norms_heads_and_convolutions_are_left_alone(tmp_path):
    tensors = llama() | {
        "conv1d.weight": normal(0, 16, 1, 4),
        "patch.weight": normal(0, 4, 3, 2, 2),
        "h.0.attn.bias": np.ones((4, 4), "f4"),
        "ids.weight": np.ones((4, 4), np.int64),
    }
    new, report = prune(tmp_path, tensors, sparsity=0.5)
    for name, value in tensors.items():
        if "_proj" in name:
            assert (new[name] == 0).sum() == value.size // 2
            assert name in report.tensors
        else:
            np.testing.assert_array_equal(new[name], value)
            assert name in report.skipped


def test_shares_and_exclusions_are_given_by_name(tmp_path):
    tensors = llama()
    _, report = prune(
        tmp_path,
        tensors,
        sparsity={"*/mlp/*": 0.75, "*": 0.25},
        prunable=jp.tree.excluding("model/layers/0/*"),
    )
    shares = {name: zeros / size for name, (zeros, size) in report.tensors.items()}
    prefix = "model.layers.1"
    assert shares == {
        f"{prefix}.self_attn.q_proj.weight": 0.25,
        f"{prefix}.mlp.up_proj.weight": 0.75,
        f"{prefix}.mlp.down_proj.weight": 0.75,
    }


def test_the_result_tells_how_it_was_made(tmp_path):
    told = {"command": "jaxprune prune m out"}
    _, report = prune(tmp_path, llama(), pattern=jp.patterns.NM(2, 4), provenance=told)
    record = rewrite.read_provenance(report.path, verify=True)
    assert record["method"] == "magnitude"
    assert record["pattern"] == "NM(n=2, m=4)"
    assert record["sparsity"] == record["achieved"] == report.achieved == 0.5
    assert record["command"] == told["command"]
    assert {k: (v["zeros"], v["size"]) for k, v in record["tensors"].items()} == (
        report.tensors
    )


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({}, ValueError, "leaves it free; give sparsity=0.5"),
        ({"sparsity": 1.0}, ValueError, r"must be in \[0, 1\)"),
        ({"sparsity": {"nothing/*": 0.5}}, ValueError, "'nothing/\\*' match none"),
        (
            {"sparsity": 0.6, "pattern": jp.patterns.NM(2, 4)},
            ValueError,
            "removes exactly 0.5 of each weight",
        ),
        (
            {"pattern": jp.patterns.NM(2, 3)},
            ValueError,
            "divisible by 3, got 16 at 'model.layers.0.self_attn.q_proj.weight'",
        ),
        (
            {"sparsity": 0.5, "pattern": jp.patterns.Channel()},
            TypeError,
            r"Unstructured, PerOutput, NM or Block, got Channel\(",
        ),
        (
            {"sparsity": 0.5, "prunable": lambda name, leaf: False},
            ValueError,
            "must have a tensor that may be pruned",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path, settings, error, match
):
    with pytest.raises(error, match=match):
        prune(tmp_path, llama(), **settings)
    assert os.listdir(tmp_path) == ["m"]


def test_a_model_type_that_is_none_stops_nobody(tmp_path):
    for i, config in enumerate(({"model_type": []}, {"text_config": ["gpt2"]})):
        found, _ = prune(tmp_path / str(i), llama(), config, sparsity=0.5)
        assert (found["model.layers.0.mlp.up_proj.weight"] == 0).mean() == 0.5


def test_weights_of_one_byte_are_refused_by_name_and_may_be_left_out(tmp_path):
    tensors = {"a.weight": normal(1, 8, 8), "b.weight": normal(2, 8, 8)}
    tensors["b.weight"] = tensors["b.weight"].astype(ml_dtypes.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"'b.weight' are float8_e4m3fn; save the mod"):
        prune(tmp_path / "1", tensors, sparsity=0.5)
    rule = jp.tree.excluding("b/weight")
    found, _ = prune(tmp_path / "2", tensors, sparsity=0.5, prunable=rule)
    assert [(found[n] == 0).sum() for n in ("a.weight", "b.weight")] == [32, 0]


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    tensors = llama()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj.weight' holds"):
        prune(tmp_path, tensors, sparsity=0.5)
    assert os.listdir(tmp_path) == ["m"]


def test_empty_and_unaligned_tensors_pass(tmp_path):
    tensors = {
        "a.weight": np.zeros((0, 4), "f4"),
        "b.weight": np.ones((0, 4, 4), "f4"),
        "c.weight": normal(0, 4, 4),
    }
    _, report = prune(tmp_path, tensors, sparsity=0.5)
    assert report.tensors["c.weight"] == (8, 16)


def run(code, **variables):
    """A Python program of its own; its output."""
    lines = [f"{name} = {value!r}" for name, value in variables.items()]
    program = "\n".join([*lines, textwrap.dedent(code)])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path):
    source = open_directory(build(tmp_path / "m", llama(4), 4))
    prune_magnitude.prune_directory(source, tmp_path / "whole", sparsity=0.5)
    code = """
        import os, signal
        from jaxprune.lm.checkpoints import checkpoint_dir, prune_magnitude

        def kill(name, done, total):
            if done > 0.6 * total:
                os.kill(os.getpid(), signal.SIGKILL)

        source = checkpoint_dir.open_directory(folder + "/m")
        out = folder + "/out"
        prune_magnitude.prune_directory(source, out, sparsity=0.5, progress=kill)
    """
    status, _ = run(code, folder=str(tmp_path))
    assert status == -9
    assert not (tmp_path / "out").exists()
    seen = []
    prune_magnitude.prune_directory(
        source, tmp_path / "out", sparsity=0.5, progress=lambda *a: seen.append(a[0])
    )
    assert next(iter(source.metadata)) == seen[0]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["m", "out", "whole"]


@pytest.mark.full
def test_after_the_first_tensor_memory_holds_a_few_and_not_the_model(tmp_path):
    tensors = {f"layers.{i}.weight": normal(i, 1024, 1024) for i in range(32)}
    build(tmp_path / "m", tensors, 2)
    build(tmp_path / "one", {"layers.0.weight": tensors["layers.0.weight"]}, 1)
    code = """
        import pathlib
        from jaxprune.lm.checkpoints import checkpoint_dir, prune_magnitude
        from jaxprune.masking import patterns

        def peak():
            status = pathlib.Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024

        def forget_the_peak():
            pathlib.Path("/proc/self/clear_refs").write_text("5")

        def prune(name):
            source = checkpoint_dir.open_directory(folder + "/" + name)
            pattern, out = patterns.PerOutput(), folder + "/" + name + "_out"
            prune_magnitude.prune_directory(
                source, out, sparsity=0.5, pattern=pattern
            )

        before = peak()
        prune("one")  # JAX starts and compiles: some 90 MB, whatever the model
        first = peak() - before
        forget_the_peak()  # which may hide what is needed later
        before = peak()
        prune("m")
        print(first, peak() - before)
    """
    status, output = run(code, folder=str(tmp_path))
    assert status == 0, output
    # 128 MiB in all, 4 MiB a tensor; VmHWM counts mapped pages too.
    first, rest = map(int, output.split())
    assert first < 144 * 2**20
    assert rest < 48 * 2**20
