"""
What reads classes and boxes from decoder states, and the arithmetic of reference points.

Heads keep the precision of their parameters under autocast: bfloat16 has steps of 1/32 around the logits that focal
losses begin with, which makes ties of best scores, and of several pixels in boxes. Heads are small.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.precision import without_autocast


class MLP(nn.Module):
    """Linear layers with ReLU between them; parameter names are the official `layers.N`."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        dims = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class ExactLinear(nn.Linear):
    """A linear layer in the precision of its parameters, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return super().forward(x.to(self.weight.dtype))

    def first(self, x: Tensor) -> Tensor:
        """The first output alone, [..., n] to [...]."""
        with without_autocast(x):
            return F.linear(x.to(self.weight.dtype), self.weight[:1], self.bias[:1])[..., 0]


class ExactMLP(MLP):
    """The same of `MLP`."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return super().forward(x.to(self.layers[0].weight.dtype))


def class_head(hidden_dim: int, num_outputs: int, prior: float | None = None) -> ExactLinear:
    """Class logits. `prior`: the probability that a focal-loss head starts with (RetinaNet Sec. 4.1)."""
    head = ExactLinear(hidden_dim, num_outputs)
    if prior is not None:
        nn.init.constant_(head.bias, -math.log((1 - prior) / prior))
    return head


def box_head(hidden_dim: int, start_at_reference: bool = False) -> ExactMLP:
    """Box numbers in logit space; `start_at_reference` zeroes the last layer, so that boxes begin as the
    reference.
    """
    head = ExactMLP(hidden_dim, hidden_dim, 4, num_layers=3)
    if start_at_reference:
        nn.init.zeros_(head.layers[-1].weight)
        nn.init.zeros_(head.layers[-1].bias)
    return head


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of x clamped to [0, 1]; numerator and denominator are at least `eps`."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def add_reference(delta: Tensor, reference: Tensor | None) -> Tensor:
    """Boxes from the box head's output and the reference that it refines, both in logit space.

    delta: [..., 4]. reference: [..., 4], [..., 2] (centre only) or None. Returns [..., 4] cxcywh in [0, 1].
    """
    if reference is None:
        return delta.sigmoid()
    if reference.shape[-1] == 2:
        reference = F.pad(reference, (0, 2))
    return (delta + reference).sigmoid()
