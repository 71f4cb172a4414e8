"""A CNN and a ViT in torch, on digits: pruned, made smaller, trained on in torch."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import jaxprune as jp

torch.manual_seed(0)
images, labels = map(torch.tensor, load_digits(return_X_y=True))
images, TRAIN = images.float().reshape(-1, 1, 8, 8) / 16, 1400  # others: the test
batches = list(images[:512].split(128))


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.patches = 4, nn.Conv2d(1, 32, 2, stride=2)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.places, self.head = nn.Parameter(torch.randn(16, 32)), nn.Linear(32, 10)

    def forward(self, x):  # (batch, 1, 8, 8)
        x = self.patches(x).flatten(2).mT + self.places  # (batch, patches, 32)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (batch, heads, patches, 8)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(x)).mean(1))


def train(model, steps):
    optimizer = torch.optim.AdamW(model.train().parameters(), 2e-3)
    for rows in torch.randint(TRAIN, (steps, 64)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()


def report(stage, model):
    right = (model.eval()(images[TRAIN:]).argmax(1) == labels[TRAIN:]).float().mean()
    weights = sum(int((p != 0).sum()) for p in model.parameters())
    print(f"{stage:24} {weights:6} weights, {right:.1%} right")


conv = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3)]
cnn = nn.Sequential(*conv, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
for name, model in {"CNN": cnn, "ViT": ViT()}.items():
    train(model, 1000)
    report(name, model)
    fn, params = jp.torch.function(model, batches[0])
    arrays = map(jp.torch.as_arrays, batches)
    half = jp.torch.shrink(model, batches[0], "sparsegpt", keep=0.5, batches=batches)
    jp.torch.load(model, jp.prune_trained(fn, params, arrays, "alps", sparsity=0.8)[0])
    for stage, less in {"80 % weights out": model, "half the units": half[0]}.items():
        report(stage, less)
        with jp.torch.hold(less, {name: p != 0 for name, p in less.named_parameters()}):
            train(less, 100)
        report("  100 steps later", less)
