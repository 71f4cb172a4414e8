"""What torchax cannot do, or does otherwise than torch, is refused by name.

Torch itself is the judge of what is let through.
"""

import jax
import numpy as np
import pytest

import jaxprune as jp

torch = pytest.importorskip("torch")
pytest.importorskip("jaxprune.torch.environment")  # torchax
nn = torch.nn
pytestmark = pytest.mark.parity

VIEW = "a view that is written to must not share memory"


class Around(nn.Module):
    """A part between two layers, whose function is given."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.part = Part(function)

    def forward(self, x):
        return self.part(self.first(x))


class Part(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def through_a_view(x):
    x.view(-1).mul_(2)
    return x


def through_a_piece(x):
    first, _ = x.chunk(2, -1)
    first.add_(1)
    return x


def through_a_selection(x):
    x.select(0, 0).zero_()
    return x


def through_a_transposition(x):
    x.transpose(0, 1)[0].add_(5)
    return x


def read_by_a_view(x):
    turned = x.transpose(0, 1)
    x.mul_(2)
    return turned


def through_a_view_of_a_view(x):
    x.transpose(0, 1).unsqueeze(0).mul_(2)
    return x


def by_another_view_of_all(x):
    first, second = x.view(-1), x.view(4, -1)
    first.mul_(2)
    return second


def through_what_torchax_flattens_itself(x):
    x.flatten().mul_(2)
    return x


def by_an_operator(x):
    x.view(-1).mul_(2)
    return x + 1


def through_an_index(x):
    x[:, 0] = 0
    x[:, 1:3] += 1
    return x


def into_a_piece_that_is_read(x):
    first, second = x.chunk(2, -1)
    first.mul_(2)
    return first + second


def into_a_view_that_replaces(x):
    x = x.view(-1)
    x.mul_(2)
    return x


def by_its_own_name(x):
    x += 1
    return x * x


@pytest.mark.parametrize(
    "function",
    [
        through_an_index,
        into_a_piece_that_is_read,
        into_a_view_that_replaces,
        by_its_own_name,
    ],
)
def test_writes_in_place_that_nobody_misses_are_those_of_torch(function):
    module, x = Around(function), torch.randn(3, 4)
    fn, params = jp.torch.function(module, x)
    with torch.no_grad():
        expected = module(x).numpy()
    result = jax.jit(fn)(params, jp.torch.as_arrays(x))
    np.testing.assert_allclose(result, expected, atol=1e-6)


def into(x, view):
    view.mul_(2)
    return x


@torch.library.custom_op("jaxprune_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (through_a_view, f"{VIEW}.* aten::mul_.* in 'part' writes to one"),
        (through_a_piece, f"{VIEW}.* aten::add_.* in 'part'"),
        (through_a_selection, f"{VIEW}.* aten::zero_ in 'part'"),
        (through_a_transposition, f"{VIEW}.* aten::add_.* in 'part'"),
        (read_by_a_view, f"{VIEW}.* aten::mul_.* in 'part'"),
        (through_a_view_of_a_view, f"{VIEW}.* aten::mul_.* in 'part'"),
        (by_another_view_of_all, f"{VIEW}.* aten::mul_.* in 'part'"),
        (through_what_torchax_flattens_itself, f"{VIEW}.* aten::mul_.* in 'part'"),
        (by_an_operator, f"{VIEW}.* aten::mul_.* in 'part'"),
        (lambda x: into(x, x[0].view(-1)), f"{VIEW}.* aten::mul_.* in 'part'"),
        (lambda x: into(x, x[:, 0].chunk(2)[0]), f"{VIEW}.* aten::mul_.* in 'part'"),
        (
            lambda x: into(x, x.as_strided((2, 2), (4, 1))),
            f"{VIEW}.* aten::mul_.* in 'part'",
        ),
        (
            lambda x: torch.add(x, 1, out=torch.empty(3, 4)),
            "must not have results written to out=, but add in 'part' has",
        ),
        (
            lambda x: x + torch.rand_like(x),
            "the same for the same inputs, but aten::rand.* in 'part' draws random",
        ),
        (
            lambda x: nn.functional.dropout(x, 0.5),
            "the same for the same inputs, but aten::bernoulli_.* in 'part'",
        ),
        (
            lambda x: torch.from_numpy(x.numpy()),
            "must not depend on values, but its Python code in 'part' reads one",
        ),
        (
            twice,
            "one that torchax has, but jaxprune_tests::twice in 'part' is not",
        ),
        (
            lambda x: torch.sparse.mm(x.to_sparse(), x.T),
            "one that torchax has, but aten::_to_sparse.* in 'part' is not",
        ),
        (
            lambda x: x[x > 0],
            "must not depend on values, but __getitem__ in 'part' reads one",
        ),
        (
            lambda x: x if x.max() > 0 else -x,
            "must not depend on values, but aten::_local_scalar_dense in 'part'",
        ),
    ],
)
def test_what_would_differ_is_refused_with_operation_and_part(function, sentence):
    module = Around(function)
    with pytest.raises(TypeError, match=sentence):
        jp.torch.function(module, torch.randn(3, 4))
    assert not module.part._forward_hooks
    # The next module is traced as if nothing had happened.
    fn, params = jp.torch.function(nn.Linear(4, 2), torch.ones(3, 4))
    assert fn(params, jp.torch.as_arrays(torch.ones(3, 4))).shape == (3, 2)
