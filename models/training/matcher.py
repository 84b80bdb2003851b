"""
Matchers, which assign objects to queries. Training only.

A matcher computes the costs of all layers and images on the device (`cost`), and finds the pairs on the host
(`solve`). In between, the criterion copies the costs of all kinds of predictions at once, which is its
only synchronisation.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Protocol

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.structures import Assignment, Prediction
from util.box_ops import box_cxcywh_to_xyxy, box_iou, generalized_box_iou
from util.errors import UserError
from util.threads import in_parallel

LARGEST_COST = 1e6
WORTH_THREADS = 25_000  # number of costs in a matrix from which on threads save time


def from_host(values: list, like: Tensor) -> Tensor:
    """Copy numbers to a tensor on the device of `like`, without a synchronisation."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


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
    """The interface of matchers."""

    repeats: int  # divisors of losses count every object so often

    def cost(self, prediction: Prediction, targets: Targets) -> Tensor:
        """Return the costs [L, B, T_max, Q] of all layers; rows beyond an image's objects are meaningless."""

    def solve(self, cost: np.ndarray, sizes: list[int]) -> list[Assignment]:
        """Return the assignment of each layer, on the host. sizes: number of objects of each image."""


def match(matcher: Matcher, prediction: Prediction, targets: list[dict]) -> list[Assignment]:
    """Match one kind of prediction alone, and return the assignment of each layer, with indices on the host.

    targets: a dictionary of `labels` [T_i] and `boxes` [T_i, 4] per image.
    """
    packed = Targets.pack(targets)
    return matcher.solve(matcher.cost(prediction, packed).cpu().numpy(), packed.sizes)


def focal_cost(logits: Tensor, labels: Tensor, eps: float = 1e-8) -> Tensor:
    """Return the class cost of sigmoid heads: the focal loss as a positive minus that as a negative.

    Logits [L, B, Q, K] and labels [B, T] give [L, B, T, Q]. Alpha is 0.25 and gamma 2 as in the official
    code: `--focal_alpha` changes the loss only.
    """
    p = gather_classes(logits, labels).sigmoid()
    q = 1 - p
    negative, positive = p**2 * (q + eps).log(), q**2 * (p + eps).log()  # both with the sign reversed
    return torch.sub(0.75 * negative, positive, alpha=0.25)


def softmax_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the class cost of softmax heads, minus the probability.

    Logits [L, B, Q, K] and labels [B, T] give [L, B, T, Q].
    """
    return -gather_classes(logits.softmax(-1), labels)


def gather_classes(scores: Tensor, labels: Tensor) -> Tensor:
    """Gather the scores [L, B, Q, K] of the objects' labels [B, T], as [L, B, T, Q]."""
    num_layers, _, num_queries, _ = scores.shape
    columns = scores.gather(-1, labels[None, :, None].expand(num_layers, -1, num_queries, -1))
    return columns.transpose(-1, -2).contiguous()


def broadcast_pairs(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Reshape boxes [L, B, Q, 4] and targets [B, T, 4] to [L, B, 1, Q, 4] and [B, T, 1, 4], which broadcast.

    Each coordinate is contiguous in memory, so that elementwise operations run along the many queries.
    """
    planes = boxes.movedim(-1, 0).contiguous().movedim(0, -1)
    return planes[..., None, :, :], targets[..., None, :]


class HungarianMatcher:
    """A one-to-one matcher with the smallest total cost (DETR Sec. 3.1).

    Args:
        cost_class, cost_bbox, cost_giou: weights of the costs.
        class_cost: `focal_cost` or `softmax_cost`.
        repeats: number of queries for each object (hybrid matching). An image has min(Q, repeats * T_i)
            pairs.
        on: predicted boxes that are compared with the objects, `boxes` or `anchors` (proposals before
            refinement).

    Raises:
        UserError: all weights are 0.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_bbox: float = 1,
        cost_giou: float = 1,
        class_cost: Callable[[Tensor, Tensor], Tensor] = focal_cost,
        repeats: int = 1,
        on: str = 'boxes',
    ) -> None:
        if cost_class == 0 and cost_bbox == 0 and cost_giou == 0:
            raise UserError(
                'all matching costs are 0: give --set_cost_class, --set_cost_bbox or --set_cost_giou'
            )
        self.weights = cost_class, cost_bbox, cost_giou
        self.class_cost = class_cost
        self.repeats = repeats
        self.on = on

    def __str__(self) -> str:
        cost_class, cost_bbox, cost_giou = self.weights
        times = f', every object {self.repeats} times' if self.repeats > 1 else ''
        on = f', on {self.on}' if self.on != 'boxes' else ''
        return f'Hungarian{times}{on}: {cost_class:g} class + {cost_bbox:g} L1 + {cost_giou:g} GIoU'

    @torch.no_grad()
    def cost(self, prediction: Prediction, targets: Targets) -> Tensor:
        """Return the weighted matching costs, [L, B, T_max, Q]."""
        cost_class, cost_bbox, cost_giou = self.weights
        boxes = getattr(prediction, self.on).to(prediction.boxes.dtype)
        pairs = broadcast_pairs(boxes, targets.padded_boxes)
        coordinates = zip(*(x.unbind(-1) for x in pairs), strict=True)
        l1 = reduce(torch.add, ((x - target).abs() for x, target in coordinates))
        corners = broadcast_pairs(box_cxcywh_to_xyxy(boxes), targets.padded_corners)
        cost = torch.sub(cost_bbox * l1, generalized_box_iou(*corners), alpha=cost_giou)
        if not cost_class:
            return cost
        return cost.add_(self.class_cost(prediction.logits, targets.padded_labels), alpha=cost_class)

    def solve(self, cost: np.ndarray, sizes: list[int]) -> list[Assignment]:
        """Find the pairs of the smallest total cost; queries are in ascending order within an image.

        Threads solve layers and images side by side, unless all are small.
        """
        blocks = [layer[image, :num_objects] for layer in cost for image, num_objects in enumerate(sizes)]
        largest = self.repeats * max(block.size for block in blocks)
        solved = list((in_parallel if largest >= WORTH_THREADS else map)(self.pairs, blocks))
        layers = range(0, len(solved), len(sizes))
        return [join_images(solved[start : start + len(sizes)], sizes) for start in layers]

    def pairs(self, cost: np.ndarray) -> np.ndarray:
        """Return queries and objects of an image, [2, N]. cost: [T, Q]."""
        block = np.tile(cost, (self.repeats, 1))
        target, query = linear_sum_assignment(finite(block, worst=LARGEST_COST))
        order = query.argsort()
        return np.stack([query[order], target[order] % max(len(cost), 1)])


class OneToManyMatcher:
    """A one-to-many matcher by IoU and class score (MS-DETR, arXiv:2401.03989, Sec. 3, with details of the
    official code).

    A query is positive for its best object if its score there is at least `threshold`, or if it is the best
    query of any object. At most a quarter of all queries stay positive, drawn at random. An object with n
    positives then gets the min(n, k) queries of its largest scores. A query can get several objects; the one
    of the largest score sets its class.

    `cost` returns these scores, of which larger ones are better.
    """

    repeats = 1
    iou_weight, score_weight, positive_fraction = 0.7, 0.3, 0.25

    def __init__(self, k: int = 6, threshold: float = 0.4) -> None:
        self.k = k
        self.threshold = threshold

    def __str__(self) -> str:
        return (
            f'up to {self.k} queries an object: {self.iou_weight:g} IoU + {self.score_weight:g} score, '
            f'from {self.threshold:g}'
        )

    @torch.no_grad()
    def cost(self, prediction: Prediction, targets: Targets) -> Tensor:
        """Return the scores, [L, B, T_max, Q]."""
        iou, _ = box_iou(*broadcast_pairs(box_cxcywh_to_xyxy(prediction.boxes), targets.padded_corners))
        probability = gather_classes(prediction.logits, targets.padded_labels).sigmoid()
        return self.iou_weight * iou + self.score_weight * probability

    def solve(self, cost: np.ndarray, sizes: list[int]) -> list[Assignment]:
        """Choose pairs by their scores; those of an image are in the order of ascending scores.

        Random numbers come from torch's CPU generator: two permutations per image, whether they are needed or
        not, the last layer first.
        """
        last, solved = len(cost) - 1, {}
        for layer in (last, *range(last)):
            blocks = (scores[:size] for scores, size in zip(cost[layer], sizes, strict=True))
            solved[layer] = join_images([self.pairs(finite(block, worst=0.0)) for block in blocks], sizes)
        return [solved[layer] for layer in range(len(cost))]

    def pairs(self, scores: np.ndarray) -> np.ndarray:
        """Return query, object, and whether the pair sets the query's class, [3, N]. scores: [T, Q]."""
        num_objects, num_queries = scores.shape
        positive = np.zeros(num_queries, dtype=bool)
        if num_objects:
            positive = scores.max(0) >= self.threshold
            positive[scores.argmax(1)] = True
        candidates = positive.nonzero()[0]
        order = torch.randperm(len(candidates)).numpy()
        torch.randperm(num_queries - len(candidates))  # the official code draws unused negatives too
        positives = candidates[order[: int(self.positive_fraction * num_queries)]]
        if not num_objects:
            return np.zeros((3, 0), dtype=np.int64)
        num_pairs = np.bincount(scores.argmax(0)[positives], minlength=num_objects)  # for each object
        values, queries = torch.from_numpy(scores).topk(min(self.k, num_queries), dim=1)
        target, rank = (np.arange(values.shape[1]) < num_pairs[:, None]).nonzero()
        ascending = values.numpy()[target, rank].argsort(kind='stable')
        target, query = target[ascending], queries.numpy()[target, rank][ascending]
        best_pair = np.zeros(num_queries, dtype=np.int64)
        best_pair[query] = np.arange(len(query))  # the last pair of a query, that of its largest score, stays
        return np.stack([query, target, best_pair[query] == np.arange(len(query))])


def join_images(pairs: list[np.ndarray], sizes: list[int]) -> Assignment:
    """Join the pairs of the images of a layer.

    Args:
        pairs: [2, N_i] query and object, or [3, N_i] with whether the pair sets the query's class.
        sizes: number of objects of each image.
    """
    image = np.repeat(np.arange(len(sizes)), [part.shape[1] for part in pairs])
    query, target, *is_class_target = np.concatenate(pairs, axis=1)
    offsets = np.cumsum([0, *sizes[:-1]])
    rows = torch.from_numpy(np.stack([image, query, target + offsets[image]]))
    return Assignment(*rows, *(torch.from_numpy(flags).bool() for flags in is_class_target))


def merge_pairs(pairs: Assignment, others: Assignment) -> Assignment:
    """Add to `pairs` those of `others` whose query has no pair yet."""
    taken = set(zip(pairs.batch.tolist(), pairs.query.tolist(), strict=True))
    queries = zip(others.batch.tolist(), others.query.tolist(), strict=True)
    free = torch.tensor([i for i, query in enumerate(queries) if query not in taken], dtype=torch.int64)
    class_targets, others_class_targets = (
        torch.ones_like(x.query, dtype=torch.bool) if x.is_class_target is None else x.is_class_target
        for x in (pairs, others)
    )
    rows = [torch.cat([getattr(pairs, x), getattr(others, x)[free]]) for x in ('batch', 'query', 'target')]
    return Assignment(*rows, torch.cat([class_targets, others_class_targets[free]]))


def finite(block: np.ndarray, worst: float) -> np.ndarray:
    """Replace infinite numbers and NaN by a value that no pair should have.

    Invalid predictions get pairs too. Their loss is not finite, and the run skips the step
    (`util.nan_guard`).
    """
    if np.isfinite(block).all():
        return block
    return np.where(np.isfinite(block), block, np.asarray(worst, dtype=block.dtype))
