"""
Class and box heads, and how the output of a box head and a reference make a box.

Heads keep the precision of their parameters under autocast, at little cost. In bfloat16 the first logits of
focal losses have steps of 1/32, which makes best scores equal, and boxes have steps of several pixels.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.precision import without_autocast

from .structures import LayerOutput, Prediction, QueryGroup


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
        """Compute the first output only, [..., n] to [...]."""
        with without_autocast(x):
            return F.linear(x.to(self.weight.dtype), self.weight[:1], self.bias[:1])[..., 0]


class ExactMLP(MLP):
    """Linear layers with ReLU between them, in the precision of their parameters, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return super().forward(x.to(self.layers[0].weight.dtype))


def build_class_head(hidden_dim: int, num_outputs: int, prior: float | None = None) -> ExactLinear:
    """Build a class head. prior: probability that a head with focal loss starts with (RetinaNet Sec. 4.1)."""
    head = ExactLinear(hidden_dim, num_outputs)
    if prior is not None:
        nn.init.constant_(head.bias, -math.log((1 - prior) / prior))
    return head


def build_box_head(hidden_dim: int, start_at_reference: bool = False) -> ExactMLP:
    """Build a box head, whose output is in logit space.

    start_at_reference: zero the last layer, so that boxes start at their reference.
    """
    head = ExactMLP(hidden_dim, hidden_dim, 4, num_layers=3)
    if start_at_reference:
        nn.init.zeros_(head.layers[-1].weight)
        nn.init.zeros_(head.layers[-1].bias)
    return head


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return the logit of x clamped to [0, 1]; numerator and denominator are at least `eps`."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


@dataclass(frozen=True)
class LogitBoxes:
    """A box code: a box is the sigmoid of the logit of a reference plus the output of a box head.

    A decoder has one as `box_code`; another code, such as sizes relative to the reference, has the same
    members. References are boxes cxcywh or centres in [0, 1].

    eps: smallest argument of the logarithms.
    """

    eps: float = 1e-5
    no_box: ClassVar[float] = math.inf  # code of a reference without a box

    def encode(self, reference: Tensor) -> Tensor:
        """Encode references [..., 2 or 4]; the shape stays."""
        return inverse_sigmoid(reference, self.eps)

    def decode(self, delta: Tensor, code: Tensor | None = None) -> Tensor:
        """Return the boxes [..., 4] of a box head's output, delta [..., 4].

        code: encoded references that the head refines, boxes [..., 4] or centres [..., 2]; None: there are no
            references, and delta may also have the shape of centres.
        """
        if code is None:
            return delta.sigmoid()
        if code.shape[-1] == 2:
            code = F.pad(code, (0, 2))
        return (delta + code).sigmoid()


def read_layers(
    layers: list[LayerOutput],
    groups: list[QueryGroup],
    box_code: LogitBoxes,
    class_head: nn.Module,
    box_head: nn.Module,
    class_head_o2m: nn.Module | None = None,
    first: int = 0,
    aux_loss: bool = True,
) -> dict[str, Prediction]:
    """Compute class logits and boxes of all layers, as one prediction for each group.

    MS-DETR's one-to-many branch adds the kind 'o2m': the queries of the inference group, with its references.

    Args:
        box_code: that of the decoder.
        class_head, box_head: heads that all layers share, or a list of one for each layer of the decoder.
        class_head_o2m: class head of the one-to-many branch (variant a), whose boxes are those of the
            inference group.
        first: index in the decoder of the first of the layers.
        aux_loss: return all layers, not only the last. All heads are always applied, so that each has a
            gradient.
    """
    returned = slice(None) if aux_loss else slice(-1, None)
    states, deltas = [layer.hs for layer in layers], [layer.delta for layer in layers]
    logits = apply_head(class_head, states, first)[returned]
    if any(delta is None for delta in deltas):
        deltas = apply_head(box_head, states, first)
    boxes = [box_code.decode(delta, layer.reference) for delta, layer in zip(deltas, layers, strict=True)]
    boxes = torch.stack(boxes)[returned]
    sizes = [group.tgt.shape[1] for group in groups]
    parts = zip(groups, logits.split(sizes, dim=2), boxes.split(sizes, dim=2), strict=True)
    predictions = {group.name: Prediction(*part, assignment=group.assignment) for group, *part in parts}
    if layers[-1].hs_o2m is not None:
        states, boxes = [layer.hs_o2m for layer in layers], boxes[:, :, : sizes[0]]
        if class_head_o2m is None:
            references = [layer.reference[:, : sizes[0]] for layer in layers]
            deltas = apply_head(box_head, states, first)
            boxes = torch.stack([*map(box_code.decode, deltas, references)])[returned]
        logits = apply_head(class_head_o2m or class_head, states, first)[returned]
        predictions['o2m'] = Prediction(logits, boxes)
    return predictions


def apply_head(head: nn.Module, states: list[Tensor], first: int = 0) -> Tensor:
    """Apply a head, or a list of one for each layer, to the states of some layers; return [L, ...].

    first: index in the decoder of the first state. If all layers share one head, it is called once.
    """
    heads = head[first : first + len(states)] if isinstance(head, nn.ModuleList) else [head]
    if all(each is heads[0] for each in heads):
        return heads[0](torch.stack(states))
    return torch.stack([each(state) for each, state in zip(heads, states, strict=True)])
