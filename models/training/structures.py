"""
Data structures of training: objects, matchers, and predictions stacked over their decoder layers.

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
    """The objects of a batch, concatenated, and padded to the largest number of an image, T_max."""

    labels: Tensor  # [T]
    boxes: Tensor  # [T, 4]
    padded_labels: Tensor  # [B, T_max]
    padded_boxes: Tensor  # [B, T_max, 4]
    padded_corners: Tensor  # [B, T_max, 4], padded_boxes as xyxy
    sizes: list[int]  # number of objects of each image

    @classmethod
    def pack(cls, targets: list[dict]) -> 'Targets':
        """Pack targets, a dictionary of `labels` [T_i] and `boxes` [T_i, 4] per image."""
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
        """Return the same objects, all of class 0."""
        return replace(
            self, labels=torch.zeros_like(self.labels), padded_labels=torch.zeros_like(self.padded_labels)
        )


class Matcher(Protocol):
    """The interface of matchers, which compute costs on the device and pairs on the host.

    `stacked` is a prediction with the layers as first axis: logits [L, B, Q, K], boxes and anchors [L, B, Q, 4].
    """

    def cost(self, stacked: Prediction, targets: Targets) -> Tensor: ...

    def solve(self, cost: ndarray, sizes: list[int]) -> list[Assignment]: ...

    def count(self, sizes: list[int]) -> float:
        """Return `Assignment.count`. sizes: number of objects of each image."""


@dataclass(frozen=True)
class Supervision:
    """The supervision of one kind of prediction: a row of the table."""

    matcher: Matcher | None  # None: the predictions have their assignments already
    coef: dict[str, float]  # coefficient of each loss term, such as {'ce': 2, 'bbox': 5, 'giou': 2}
    class_loss: Callable  # a class loss of models.training.losses
    class_agnostic: bool = False  # treat every object as class 0
    scale: float = 1.0  # factor of every term
    source: str = ''  # origin of the predictions in words, unless they have learned queries of their own
    merge: str | None = None  # kind whose pairs are added for queries that have no pair of this kind
    # `Assignment.count` as a function of the numbers of objects, without a matcher; None: only the model knows it.
    count: Callable[[list[int]], float] | None = None


def from_host(values: list, like: Tensor) -> Tensor:
    """Copy numbers to a tensor on the device of `like`, without a synchronisation."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


@dataclass
class Stack:
    """The predictions of one kind, stacked over their layers with the last decoder layer at the end, and their N pairs.

    Pairs of queries and objects are concatenated layer by layer.
    """

    logits: Tensor  # [L, B, Q, K]
    boxes: Tensor  # [L, B, Q, 4]
    index: tuple[Tensor, Tensor, Tensor]  # layer, batch, query of each pair, [N] each
    labels: Tensor  # [N] class of the pair's object
    target_boxes: Tensor  # [N, 4]
    num_pairs: list[int]  # number of pairs of each layer
    num_objects: list[int]  # number of objects of each image, times the matcher's repeats
    count: float = 0.0  # `Assignment.count`
    decides_class: Tensor | None = None  # [N] 1 if the pair decides its query's class, else 0; None: all do
    target: Tensor | None = None  # [N] index of the pair's object in the whole batch
    masks: Tensor | None = None  # [B, Q, h, w] logits of the last layer

    def last_pairs(self) -> slice:
        """Return the range of the last layer's pairs."""
        total = sum(self.num_pairs)
        return slice(total - self.num_pairs[-1], total)

    def per_layer(self, values: Tensor) -> Tensor:
        """Sum values of pairs over each layer, [..., N] to [..., L]."""
        if len(set(self.num_pairs)) == 1:
            return values.unflatten(-1, (len(self.num_pairs), -1)).sum(-1)
        return torch.stack([part.sum(-1) for part in values.split(self.num_pairs, dim=-1)], dim=-1)
