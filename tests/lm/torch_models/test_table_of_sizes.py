"""The table of sizes beside transformers: a smaller entry, a smaller layer.

Modules are made without memory, so each class can have its usual sizes.
"""

import fnmatch

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
shrink_sizes = pytest.importorskip("jaxprune.lm.torch_models.shrink_sizes")
pytestmark = [pytest.mark.parity, pytest.mark.full]


def shapes_of(family, **entries):
    """Parameter name to shape, and the configuration."""
    config = transformers.AutoConfig.for_model(family, **entries)
    with torch.device("meta"):
        module = transformers.AutoModel.from_config(config)
    return {n: tuple(p.shape) for n, p in module.named_parameters()}, config


@pytest.mark.parametrize("family", sorted(shrink_sizes.SIZES))
def test_an_entry_of_the_table_decides_the_layers_that_its_row_names(family):
    before, config = shapes_of(family)
    for size in shrink_sizes.SIZES[family]:
        count = getattr(config, size.entry)
        after, _ = shapes_of(family, **{size.entry: count // 2})
        named = {n for n in before for g in size.globs if fnmatch.fnmatchcase(n, g)}
        assert named
        for name in named:
            # One axis has as many positions a unit as before.
            axes = [i for i, n in enumerate(after[name]) if n != before[name][i]]
            (axis,) = axes
            assert before[name][axis] % count == 0
            assert after[name][axis] * count == before[name][axis] * (count // 2)
