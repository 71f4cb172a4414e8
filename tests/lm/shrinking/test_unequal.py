"""What is said of layers that are cut unequally."""

import jax

from jaxprune.lm.models.loaded_model import open_model
from jaxprune.lm.shrinking import unequal, units
from tests.support import tiny_hf


def test_the_report_has_layers_that_stay_whole_and_parts_that_go_whole(tmp_path):
    tiny_hf.random_folder("llama", tmp_path / "model", layers=2)
    model = open_model(tmp_path / "model").read()
    _, _, groups = units.group_axes(model)
    roles = units.group_roles(groups, model.config)
    names = [name for name, role in roles.items() if role == "ffn"]
    sizes, counts = dict(zip(names, (0, 48), strict=True)), dict.fromkeys(names, 48)
    tokens = tiny_hf.tokens(4, 8)
    small, report = unequal._solve_chosen(
        model, sizes, counts, roles, [tokens], 0.0, tmp_path / "units"
    )
    assert [layer.mlp_width for layer in small.config.layer_sizes] == [0, 48]
    assert report["kept"] == dict(zip(names, ([], [*range(48)]), strict=True))
    assert [report["groups"][name]["after"] for name in names] == [0, 48]
    assert report["roles"] == dict.fromkeys(names, "ffn")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert report["before"]["parameters"] == parameters
