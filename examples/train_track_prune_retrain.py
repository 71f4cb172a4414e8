"""Train a small network of Flax NNX on digits, prune 90 % of its weights, retrain."""

import jax
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jaxprune as jp

images, labels = load_digits(return_X_y=True)  # (1797, 64), (1797,)
images, TRAIN = images.astype("float32") / 16, 1400  # the others are for the test


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.second = nnx.Linear(128, 128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)  # its name says: not pruned

    def __call__(self, x):
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))))


def loss(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def step(model, optimizer, x, y):
    optimizer.update(model, nnx.grad(loss)(model, x, y))


def train(model, tx, steps):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for key in jax.random.split(jax.random.key(1), steps):
        rows = jax.random.choice(key, TRAIN, (64,))
        step(model, optimizer, images[rows], labels[rows])
    return optimizer


def report(stage, model):
    x, y = images[TRAIN:], labels[TRAIN:]
    right = (model(x).argmax(-1) == y).mean()
    print(f"{stage:10s} loss {loss(model, x, y):.2f}, {right:.1%} right")


model = Net(nnx.Rngs(0))
optimizer = train(model, optax.chain(jp.track_gradients(), optax.adamw(3e-3)), 500)
report("dense", model)

params = nnx.state(model, nnx.Param)
scores = jp.scores.preconditioned_magnitude(params, optimizer)
masks = jp.masks.make(scores, sparsity=0.9, allocation="global")
nnx.update(model, jp.masks.apply(params, masks))
report("pruned", model)

train(model, jp.keep_masks(optax.adamw(1e-3), masks), 300)
report("retrained", model)
print(jp.sparsity(nnx.state(model, nnx.Param), masks))
