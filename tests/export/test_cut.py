"""A cut graph computes the same numbers with fewer weights."""

import pytest
import torch
from torch import nn

from matryoshka.export.graph import Deployed, record
from matryoshka.models import BACKBONES, ModelSpec, build

SIZE = 8


class Residual(nn.Module):
    """Strided and depthwise convolutions, batch norms and a residual sum; D = 12."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.inside = nn.Conv2d(12, 20, 1)
        self.outside = nn.Conv2d(20, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)

    def forward(self, x):
        x = torch.relu_(self.norm(self.stem(x)))
        x = x + nn.functional.gelu(self.outside(self.inside(x)))
        return self.pool(self.depthwise(x))

    def pool(self, x):
        return nn.functional.adaptive_max_pool2d(x, 1)[:, :, 0, 0].clone()


class Pooled(Residual):
    def pool(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)


class Largest(Residual):
    def pool(self, x):
        return nn.functional.max_pool2d(x, 2).amax((2, 3))


class Tokens(nn.Module):
    """Tokens with resampled positions, a layer norm, the mean, and a projection; D = 12."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.positions = nn.Parameter(torch.randn(1, 16, 3, 3))
        self.norm = nn.LayerNorm(16)
        self.project = nn.Linear(16, 12)

    def forward(self, x):
        positions = nn.functional.interpolate(self.positions, size=(2, 2), mode="bilinear")
        tokens = (self.patches(x) + positions).flatten(2).transpose(1, 2)  # [B, 4, 16]
        tokens = tokens + torch.zeros(len(x), 1, 16)  # len() is a number to torch.export
        return self.project(self.norm(tokens)).mean(1)


# Numbers that the first 4 of 12 features need, without the classifiers.
NEEDED = {
    # stem and its norm, inside, 4 rows of outside and of depthwise
    Pooled: 12 * 27 + 4 * 12 + 20 * 13 + 4 * 21 + 4 * 10,
    Largest: 12 * 27 + 4 * 12 + 20 * 13 + 4 * 21 + 4 * 10,
    # no rule for an adaptive maximum: everything, except the counter of the batch norm
    Residual: 12 * 27 + 4 * 12 + 20 * 13 + 12 * 21 + 12 * 10,
    # positions of the used size, 4 rows of the projection
    Tokens: 16 * 49 + 16 * 4 + 2 * 16 + 4 * 17,
}


@pytest.fixture
def family(monkeypatch):
    """Build a model with one of the trunks above."""

    def make(trunk, dims=(2, 4, 12), efficient=False):
        monkeypatch.setitem(BACKBONES, "small", lambda weights=None: (trunk(), 12))
        torch.manual_seed(1)
        model = build(ModelSpec("small", 5, dims, efficient))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -1, 1)
                nn.init.uniform_(module.running_var, 0.5, 2)
        model.preprocessing = type(model.preprocessing)(size=SIZE)
        return model.eval()

    return make


def numbers(module):
    return sum(value.numel() for value in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("trunk", NEEDED, ids=lambda trunk: trunk.__name__)
def test_a_cut_graph_computes_the_same_with_what_it_needs(family, trunk):
    model = family(trunk)
    images = torch.randn(5, 3, SIZE, SIZE)
    with torch.no_grad():
        features, logits = model.features(images), model(images)
        cut = record(Deployed(model, 4)).module
        embedding, few = cut(images)
        torch.testing.assert_close(embedding, features[:, :4])
        torch.testing.assert_close(few, logits[:2])
        # recording leaves the model as it was
        torch.testing.assert_close(model(images), logits)
    assert numbers(cut) == NEEDED[trunk] + 5 * 3 + 5 * 5


@pytest.mark.parametrize("dim", [3, 12])  # 3 is not a prefix of the model
def test_a_shared_classifier_is_cut_at_any_length(family, dim):
    model = family(Pooled, efficient=True)
    images = torch.randn(3, 3, SIZE, SIZE)
    cut = record(Deployed(model, dim)).module
    with torch.no_grad():
        features = model.features(images)
        embedding, logits = cut(images)
        torch.testing.assert_close(embedding, features[:, :dim])
        head = model.head.heads[0]
        expected = features[:, :dim] @ head.weight[:, :dim].T + head.bias
        torch.testing.assert_close(logits[-1], expected)
    trunk = 12 * 27 + 4 * 12 + 20 * 13 + dim * 21 + dim * 10
    assert numbers(cut) == trunk + 5 * dim + 5


def test_without_truncation_features_have_their_width(family):
    model = family(Tokens, dims=(2, 4))  # the classifiers use 4 of 12 features
    images = torch.randn(2, 3, SIZE, SIZE)
    cut = record(Deployed(model)).module
    with torch.no_grad():
        embedding, logits = cut(images)
        torch.testing.assert_close(embedding, model.features(images))
        torch.testing.assert_close(logits, model(images))
