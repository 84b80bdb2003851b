"""
What reads classes and boxes from decoder states, and the arithmetic of reference points.

Heads keep the precision of their parameters under autocast: bfloat16 has steps of 1/32 around the logits that focal
losses begin with, which makes ties of best scores, and of several pixels in boxes. Heads are small.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.precision import without_autocast

from .structures import LayerOutput, Prediction, QueryGroup, split_predictions


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
    """Linear layers with ReLU between them, in the precision of their parameters, under autocast too."""

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


def read_layers(
    layers: list[LayerOutput],
    groups: list[QueryGroup],
    class_heads: Sequence[nn.Module],
    box_heads: Sequence[nn.Module],
    second_class_heads: Sequence[nn.Module] | None = None,
    aux_loss: bool = True,
) -> list[Prediction]:
    """Read class logits and boxes of every layer and group, and of the second reading of MS-DETR if there is one.

    Args:
        class_heads, box_heads: one for each layer; all layers may share one.
        second_class_heads: class heads of second readings alone, whose boxes are then those of the first (variant a).
        aux_loss: False: return the last layer only. All heads take part all the same, so that each has a gradient.
    """
    shown = slice(None) if aux_loss else slice(-1, None)
    hs = [layer.hs for layer in layers]
    logits = apply_heads(class_heads, hs)  # [L, B, Q, K]
    deltas = [layer.delta for layer in layers]
    if any(delta is None for delta in deltas):
        deltas = apply_heads(box_heads, hs).unbind()
    boxes = torch.stack([add_reference(d, x.reference) for d, x in zip(deltas, layers, strict=True)])
    predictions = split_predictions(logits[shown], boxes[shown], groups)
    if layers[-1].hs_o2m is None:
        return predictions
    # The inference group once more, with the same references.
    hs = [layer.hs_o2m for layer in layers]
    second = QueryGroup('o2m', hs[-1])
    num_queries = second.tgt.shape[1]
    if second_class_heads is None:
        deltas = apply_heads(box_heads, hs).unbind()
        references = [layer.reference[:, :num_queries] for layer in layers]
        boxes = torch.stack([add_reference(*both) for both in zip(deltas, references, strict=True)])
    logits = apply_heads(second_class_heads or class_heads, hs)
    return predictions + split_predictions(logits[shown], boxes[shown, :, :num_queries], [second])


def apply_heads(heads: Sequence[nn.Module], states: list[Tensor]) -> Tensor:
    """Apply one head to each of L states, in one call where all of them are the same head; returns [L, ...]."""
    if all(head is heads[0] for head in heads):
        return heads[0](torch.stack(states))
    return torch.stack([head(state) for head, state in zip(heads, states, strict=True)])
