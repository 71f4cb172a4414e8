"""A smaller module gives what the whole one gives with the removed units zeroed."""

import copy
import types

import numpy as np
import pytest

import jaxprune as jp

torch = pytest.importorskip("torch")
pytest.importorskip("jaxprune.torch.environment")  # torchax
comparison = pytest.importorskip("jaxprune.torch.comparison")
nn = torch.nn
pytestmark = pytest.mark.parity


def convolutional():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4),
    )  # fmt: skip
    module(torch.randn(16, 3, 8, 8))  # statistics of the batch norms
    return module


class Attention(nn.Module):
    """A pre-norm attention whose class holds its heads and its width."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.num_heads, self.attn_dim = heads, width
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def bias(self):
        return None

    def forward(self, x):
        batch, time, _ = x.shape
        q, k, v = (
            part.reshape(batch, time, self.num_heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm(x)).split(self.attn_dim, -1)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, self.bias())
        return x + self.proj(y.transpose(1, 2).reshape(batch, time, self.attn_dim))


def zeroed_outputs(module, report, groups, x):
    """The outputs with the removed units' weights zero, position by position."""
    whole = copy.deepcopy(module).eval()
    tensors = dict(whole.named_parameters()) | dict(whole.named_buffers())
    for name, kept in report["kept"].items():
        (group,) = (group for group in groups if group.name == name)
        for member in group.members:
            tensor = tensors[member.leaf].data
            # One unit after the other along the axis, in every layout of these tests.
            units = np.arange(tensor.shape[member.axis])
            if "qkv" in member.leaf:
                units = np.tile(np.repeat(np.arange(group.units), 4), 3)
            elif "proj" in member.leaf:
                units = np.repeat(np.arange(group.units), 4)
            gone = torch.tensor(~np.isin(units, kept))
            tensor.index_fill_(member.axis, gone.nonzero().flatten(), 0)
    with torch.no_grad():
        return whole(x).numpy()


@pytest.mark.parametrize("make", [convolutional, Attention])
def test_the_smaller_module_gives_what_the_zeroed_one_gives(make):
    module = make()
    x = torch.randn(2, 3, 8, 8) if make is convolutional else torch.randn(2, 5, 16)
    before = copy.deepcopy(module.state_dict())
    small, report = jp.torch.shrink(module, x, jp.scores.magnitude, 0.5)
    fn, params = jp.torch.function(module, x)
    groups = jp.axis_groups(fn, params, jp.torch.as_arrays(x))
    expected = zeroed_outputs(module, report, groups, x)
    with torch.no_grad():
        np.testing.assert_allclose(small.eval()(x).numpy(), expected, atol=1e-5)
    assert report["error"] < 1e-5
    assert report["after"]["parameters"] < 0.7 * report["before"]["parameters"]
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_attributes_are_those_of_the_smaller_layers():
    small, report = jp.torch.shrink(
        convolutional(), torch.randn(2, 3, 8, 8), jp.scores.magnitude, 0.5
    )
    first, depthwise, last = small[0], small[3], small[6]
    assert (first.in_channels, first.out_channels, first.groups) == (3, 4, 1)
    assert (depthwise.in_channels, depthwise.out_channels) == (4, 4)
    assert depthwise.groups == 4
    assert small[1].num_features == 4
    assert (last.in_channels, small[10].in_features) == (4, 3)
    assert small[10].out_features == 4
    assert "out_features" not in report["attributes"]["10"]
    attention, _ = jp.torch.shrink(
        Attention(), torch.randn(2, 5, 16), jp.scores.magnitude, 0.5
    )
    assert (attention.num_heads, attention.attn_dim) == (2, 8)
    assert attention.norm.normalized_shape == (16,)


class BiasedAttention(Attention):
    """Its biases come from relative positions, reshaped to what an attribute says."""

    def __init__(self):
        super().__init__()
        self.bias_shape = (5, 5, self.num_heads)
        self.positions = nn.Linear(2, self.num_heads)
        self.register_buffer("distances", torch.randn(25, 2))

    def bias(self):
        biases = self.positions(self.distances).view(self.bias_shape)
        return biases.permute(2, 0, 1)  # (heads, query position, key position)


def test_a_shape_that_ends_with_the_heads_is_set():
    small, report = jp.torch.shrink(
        BiasedAttention(), torch.randn(2, 5, 16), jp.scores.magnitude, 0.5
    )
    assert small.bias_shape == (5, 5, 2)
    assert report["attributes"][""]["bias_shape"] == [5, 5, 2]


def test_half_precision_is_compared_at_its_own_accuracy():
    x = torch.randn(2, 5, 16, dtype=torch.bfloat16)
    small, report = jp.torch.shrink(
        Attention().to(torch.bfloat16), x, jp.scores.magnitude, 0.5
    )
    assert small.qkv.weight.dtype is torch.bfloat16
    assert report["error"] < 0.05


class Amplifying(nn.Module):
    """Its outputs show the rounding of its layers, as those of a deep model do."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 256), nn.Linear(256, 4)

    def forward(self, x):
        return (3000 * self.down(self.up(x).relu())).sin()


def test_rounding_that_64_bits_do_not_have_is_no_difference():
    torch.manual_seed(0)
    module, example = Amplifying(), torch.randn(64, 8)
    _, report = jp.torch.shrink(module, example, jp.scores.magnitude, 0.5)
    assert report["error"] > comparison.TOLERANCE


def test_a_smaller_module_trains_on():
    small, _ = jp.torch.shrink(
        convolutional(), torch.randn(2, 3, 8, 8), jp.scores.magnitude, 0.5
    )
    small.train()(torch.randn(8, 3, 8, 8)).square().mean().backward()
    assert small[1].running_mean.shape == (4,)
    assert all(p.grad.shape == p.shape for p in small.parameters())


def test_a_fresh_module_becomes_as_small_from_state_dictionary_and_report(tmp_path):
    x = torch.randn(2, 5, 16)
    small, report = jp.torch.shrink(Attention(), x, jp.scores.magnitude, 0.75)
    torch.save(small.state_dict(), tmp_path / "small.pt")
    fresh = Attention()
    jp.torch.resize(fresh, torch.load(tmp_path / "small.pt"), report["attributes"])
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), small.eval()(x))


def test_a_fresh_module_shares_no_memory_with_the_smaller_one():
    small, report = jp.torch.shrink(
        Attention(), torch.randn(2, 5, 16), jp.scores.magnitude, 0.75
    )
    fresh = Attention()
    jp.torch.resize(fresh, small.state_dict(), report["attributes"])
    with torch.no_grad():
        for tensor in fresh.parameters():
            tensor.zero_()
    assert small.qkv.weight.any()


class ScaledByItsSize(nn.Module):
    """Gives less where it has fewer neurons, and no attribute says so."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        hidden = self.up(x).relu()
        return x + 0.05 * self.down(hidden * 4 / hidden.shape[-1] ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_hides_no_other_function(dtype):
    torch.manual_seed(0)
    module, x = ScaledByItsSize().to(dtype), torch.randn(4, 8, dtype=dtype)
    with pytest.raises(ValueError, match="its outputs differ by"):
        jp.torch.shrink(module, x, jp.scores.magnitude, 0.5)


class Projected(nn.Module):
    """An LSTM whose states are narrower than its cells."""

    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(4, 8, proj_size=6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.cells(x)[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_an_lstm_with_a_projection_becomes_smaller():
    x = torch.randn(3, 5, 4)
    small = jp.torch.shrink(Projected(), x, jp.scores.magnitude, 0.5).module
    assert (small.cells.hidden_size, small.cells.proj_size) == (4, 3)
    assert small(x).shape == (3, 5, 2)


class Halved(nn.Module):
    """A parametrization: the weight is half of what is stored."""

    def forward(self, weight):
        return weight / 2


def test_a_convolution_whose_weight_is_computed_becomes_smaller():
    module = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 2, 3))
    nn.utils.parametrize.register_parametrization(module[0], "weight", Halved())
    x = torch.randn(3, 4, 9)
    small = jp.torch.shrink(module, x, jp.scores.magnitude, 0.5).module
    assert small[0].weight.shape == (4, 4, 3)


@pytest.mark.full
def test_the_solver_makes_up_for_what_is_gone():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    mixing = torch.randn(8, 8)
    batches = [torch.randn(128, 8) @ mixing for _ in range(2)]  # correlated inputs
    with torch.no_grad():
        reference = module(batches[0])

        def error(small):
            return float((small(batches[0]) - reference).square().mean())

        by_scores, _ = jp.torch.shrink(module, batches[0], jp.scores.magnitude, 0.5)
        by_solver, report = jp.torch.shrink(
            module, batches[0], "sparsegpt", 0.5, batches=batches
        )
        assert error(by_solver) < 0.5 * error(by_scores)
    assert by_solver[2].in_features == 16
    assert [row["name"] for row in report["weights"]] == ["2.weight"]


class Recurrent(nn.Module):
    """Two recurrent layers and a projection of the last state."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


@pytest.mark.full
def test_the_states_of_an_lstm_go_by_the_solver_too():
    torch.manual_seed(0)
    module = Recurrent()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)  # states that matter
    x = torch.randn(64, 4, 5) @ torch.randn(5, 5)
    with torch.no_grad():
        reference = module(x)

        def error(small):
            return float((small(x) - reference).square().mean())

        by_scores, _ = jp.torch.shrink(module, x, jp.scores.magnitude, 0.75)
        by_solver, report = jp.torch.shrink(module, x, "sparsegpt", 0.75, batches=[x])
        assert error(by_solver) < 0.8 * error(by_scores)
    assert by_solver.lstm.hidden_size == by_solver.out.in_features == 6
    names = {row["name"] for row in report["weights"]}
    assert names >= {"out.weight", "lstm.weight_hh_l0", "lstm.weight_ih_l1"}


def test_units_go_by_scores_like_those_of_wanda():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(32, 4)
    fn, params = jp.torch.function(module, x)
    inputs = jp.calibrate(fn, params, [jp.torch.as_arrays(x)])
    name = "2.weight"  # (out, in): the layer that reads the units
    scores = {name: abs(params[name]) * inputs[name].mean_square ** 0.5}
    _, report = jp.torch.shrink(module, x, scores, 0.5)
    with torch.no_grad():
        norms = module[:2](x).norm(dim=0)  # (units,)
        expected = (module[2].weight.abs() * norms).sum(0).topk(4).indices
    assert report["kept"] == {"0.bias:0": sorted(expected.tolist())}


def test_masks_of_whole_units_say_which_go():
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    _, params = jp.torch.function(module, torch.ones(2, 4))
    # What reads the units needs no mask.
    masks = {n: np.ones(params[n].shape, bool) for n in ("0.weight", "0.bias")}
    masks["0.weight"][[1, 4]], masks["0.bias"][[1, 4]] = False, False
    small, report = jp.torch.shrink(module, torch.ones(2, 4), masks)
    assert report["kept"] == {"0.bias:0": [0, 2, 3, 5]}
    assert torch.equal(small[0].weight, module[0].weight[[0, 2, 3, 5]])


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 8, bias=False)
            self.again = nn.Linear(4, 8, bias=False)
            self.again.weight = self.up.weight
            self.down = nn.Linear(8, 2)

        def forward(self, x):
            return self.down(self.up(x).relu() * self.again(x))

    small, _ = jp.torch.shrink(Tied(), torch.ones(2, 4), jp.scores.magnitude, 0.5)
    assert small.again.weight is small.up.weight
    assert small.again.out_features == small.up.out_features == 4


class FixedWidth(nn.Module):
    """A class that writes its width into its code."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.first(x).reshape(-1, 8).relu())


def test_a_class_that_cannot_be_smaller_is_named_with_the_groups_to_leave_out():
    module = nn.ModuleDict({"good": nn.Linear(4, 4), "bad": FixedWidth()})
    forward = nn.Sequential(module["good"], nn.ReLU(), module["bad"])
    with pytest.raises(ValueError, match=r"but '2.last' cannot have them") as caught:
        jp.torch.shrink(forward, torch.ones(4, 4), jp.scores.magnitude, 0.5)
    assert "keep all units of '*.first.bias:0'" in str(caught.value)
    small, _ = jp.torch.shrink(
        forward,
        torch.ones(4, 4),
        jp.scores.magnitude,
        keep={"*.first.bias:0": 1.0, "0.bias:0": 0.5},
    )
    assert small[0].out_features == 2


@pytest.mark.full
def test_the_multi_head_attention_of_torch_is_refused_by_name():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    with pytest.raises(ValueError, match="but 'self_attn' cannot have them"):
        jp.torch.shrink(layer, torch.randn(2, 5, 16), jp.scores.magnitude, 0.5)


@pytest.mark.full
@pytest.mark.parametrize("name", ["BertModel", "GPT2Model", "T5Model"])
def test_models_of_transformers_become_smaller(name):
    transformers = pytest.importorskip("transformers")
    configs = {
        "BertModel": dict(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=24, max_position_embeddings=16,
        ),
        "GPT2Model": dict(n_embd=16, n_layer=2, n_head=4, n_positions=16),
        "T5Model": dict(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4),
    }  # fmt: skip
    model_type = getattr(transformers, name)
    config = model_type.config_class(vocab_size=40, **configs[name])
    tokens = torch.randint(0, 40, (2, 7))
    example = {"input_ids": tokens, "use_cache": False}
    if name == "T5Model":
        example["decoder_input_ids"] = tokens
    if name == "BertModel":
        del example["use_cache"]
    small, report = jp.torch.shrink(
        model_type(config), example, jp.scores.magnitude, 0.5
    )
    assert report["error"] < 1e-5
    assert report["after"]["parameters"] < 0.8 * report["before"]["parameters"]
    assert len(report["groups"]) >= 4
    fresh = model_type(config)
    jp.torch.resize(fresh, small.state_dict(), report["attributes"])


class ConfiguredAttention(Attention):
    """As some classes of transformers, which read heads from what layers share."""

    def __init__(self, config):
        super().__init__(heads=config.num_heads)
        del self.num_heads
        self.config = config

    @property
    def num_heads(self):
        return self.config.num_heads

    @num_heads.setter
    def num_heads(self, heads):
        pass

    @num_heads.deleter
    def num_heads(self):
        pass


def test_heads_are_set_in_a_shared_configuration_only_where_it_is_read():
    config = types.SimpleNamespace(num_heads=4)
    layers = nn.Sequential(ConfiguredAttention(config), ConfiguredAttention(config))
    x = torch.randn(2, 5, 16)
    small, report = jp.torch.shrink(layers, x, jp.scores.magnitude, 0.5)
    assert small[0].config is small[1].config
    assert (small[0].config.num_heads, config.num_heads) == (2, 4)
    fresh = nn.Sequential(ConfiguredAttention(config), ConfiguredAttention(config))
    jp.torch.resize(fresh, small.state_dict(), report["attributes"])
    assert config.num_heads == 2

    unread = Attention()
    unread.config = types.SimpleNamespace(num_heads=4)
    small, report = jp.torch.shrink(unread, x, jp.scores.magnitude, 0.5)
    assert small.config.num_heads == 4
    assert report["attributes"][""] == {"num_heads": 2, "attn_dim": 8}
