"""
The vocabulary of training: objects, rules that assign them, and predictions stacked over their decoder layers.

Letters in shapes: L decoder layers, B images, Q queries, K classes, N pairs of query and object, T objects of the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from numpy import ndarray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.structures import Assignment, Prediction
from util.box_ops import box_cxcywh_to_xyxy


@dataclass
class Targets:
    """The objects of a batch, one after the other and padded to the largest number of an image, T_max."""

    labels: Tensor  # [T]
    boxes: Tensor  # [T, 4]
    padded_labels: Tensor  # [B, T_max]
    padded_boxes: Tensor  # [B, T_max, 4]
    padded_corners: Tensor  # the same as xyxy
    sizes: list[int]  # objects of each image

    @classmethod
    def pack(cls, targets: list[dict]) -> 'Targets':
        """targets: dictionaries with `labels` [T_i] and `boxes` [T_i, 4]."""
        labels = [target['labels'] for target in targets]
        boxes = [target['boxes'] for target in targets]
        padded_boxes = pad_sequence(boxes, batch_first=True)
        return cls(
            labels=torch.cat(labels),
            boxes=torch.cat(boxes),
            padded_labels=pad_sequence(labels, batch_first=True),
            padded_boxes=padded_boxes,
            padded_corners=box_cxcywh_to_xyxy(padded_boxes),
            sizes=[len(label) for label in labels],
        )

    def as_one_class(self) -> 'Targets':
        """The same objects, all of class 0."""
        return replace(
            self, labels=torch.zeros_like(self.labels), padded_labels=torch.zeros_like(self.padded_labels)
        )


class Matcher(Protocol):
    """Which query answers for which object, in two halves: costs on the device, pairs on the host.

    `stacked` is a prediction whose tensors have the layers in front: logits [L, B, Q, K], boxes and anchors
    [L, B, Q, 4].
    """

    def cost(self, stacked: Prediction, targets: Targets) -> Tensor: ...

    def solve(self, cost: ndarray, sizes: list[int]) -> list[Assignment]: ...

    def count(self, sizes: list[int]) -> float:
        """`Assignment.count`, from the numbers of objects alone."""


@dataclass(frozen=True)
class Supervision:
    """How one kind of prediction is supervised: a row of the table."""

    matcher: Matcher | None  # None: the predictions bring their assignments
    coef: dict[str, float]  # {'ce': 2, 'bbox': 5, 'giou': 2}
    class_loss: Callable  # models.training.losses: FocalLoss, SoftmaxLoss
    class_agnostic: bool = False  # every object is class 0
    scale: float = 1.0  # every term is multiplied by it
    source: str = ''  # where such predictions are read, if not from queries of their own
    merge: str | None = None  # kind whose pairs are added, where this kind leaves a query free
    # Without a matcher: `Assignment.count` from the numbers of objects, if they say it.
    count: Callable[[list[int]], float] | None = None


def from_host(values: list, like: Tensor) -> Tensor:
    """Numbers of the host as a tensor beside `like`, without waiting for the device."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


@dataclass
class Stack:
    """Predictions of one kind stacked over their layers, the last decoder layer at the end, and their N pairs with
    objects, one layer after the other.
    """

    logits: Tensor  # [L, B, Q, K]
    boxes: Tensor  # [L, B, Q, 4]
    index: tuple[Tensor, Tensor, Tensor]  # layer, batch, query of each pair, [N] each
    labels: Tensor  # [N] class of the pair's object
    target_boxes: Tensor  # [N, 4]
    num_pairs: list[int]  # of each layer
    num_objects: list[int]  # of each image, as often as they are to be answered for
    count: float = 0.0  # of the assignments
    deciding: Tensor | None = None  # [N] 1 where a pair decides the class of its query, else 0; None: all do

    def per_layer(self, values: Tensor) -> Tensor:
        """Sums of values of pairs, [..., N] to [..., L]."""
        if len(set(self.num_pairs)) == 1:
            return values.unflatten(-1, (len(self.num_pairs), -1)).sum(-1)
        return torch.stack([part.sum(-1) for part in values.split(self.num_pairs, dim=-1)], dim=-1)
