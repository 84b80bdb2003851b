"""
Data structures that backbone, transformer, heads and criterion exchange.

A detector in training returns one `Prediction` for each kind of query, of all decoder layers together. One
table (`models.training.supervision`) says how each kind is supervised. Letters in shapes: B images, Q
queries, S memory tokens, L decoder layers (of `Memory`: levels), C channels, K classes, M matched pairs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.precision import full_precision


@dataclass
class Memory:
    """The output of the encoder, and what describes its tokens."""

    tokens: Tensor  # [B, S, C], levels one after the other, row by row
    padding_mask: Tensor  # [B, S], True = padding
    shapes: list[tuple[int, int]]  # (H, W) of each level, plain integers: no layer has to synchronise
    pos: Tensor | None = None  # [B, S, C] positional encoding
    # The others exist for deformable attention only.
    valid_ratios: Tensor | None = None  # [B, L, 2] share of width and height that is not padding
    sizes: Tensor | None = None  # [L, 2] width and height of each level, the same numbers as `shapes`
    pixel_mask: Tensor | None = None  # [B, H, W] padding mask of the images, True = padding

    def maps(self) -> list[Tensor]:
        """Return the tokens as maps [B, C, H, W], finest first, in float32 at least."""
        sizes = [height * width for height, width in self.shapes]
        levels = zip(full_precision(self.tokens).split(sizes, dim=1), self.shapes, strict=True)
        return [level.transpose(1, 2).unflatten(2, shape) for level, shape in levels]


@dataclass
class Assignment:
    """Pairs of queries and objects."""

    batch: Tensor  # [M] index of the image
    query: Tensor  # [M] index of the query in its image
    target: Tensor  # [M] index of the object in the whole batch
    # [M] bool: the pair sets the class of its query, which has one such pair; None: all pairs do.
    is_class_target: Tensor | None = None

    @property
    def count(self) -> int:
        """The number of pairs, M."""
        return len(self.query)


@dataclass
class QueryGroup:
    """Decoder queries of one origin. `name` is the kind of their predictions, 'one2one' for inference."""

    name: str
    tgt: Tensor  # [B, Q, C] content
    query_pos: Tensor | None = None  # [B, Q, C]; None: the decoder computes it from the boxes
    reference_points: Tensor | None = None  # [B, Q, 2 or 4] in [0, 1]; None: the decoder has none or its own
    sees: tuple[str, ...] = ()  # other groups that it may attend to
    block: int = 0  # > 0: split the group into blocks of this size that may not attend to each other
    assignment: Assignment | None = None  # objects of the queries, if known in advance


@dataclass
class LayerOutput:
    """The output of one decoder layer for the queries of all groups."""

    hs: Tensor  # [B, Q, C]
    reference: Tensor | None = None  # [B, Q, 2 or 4] in logit space; the box head's output is added to it
    delta: Tensor | None = None  # [B, Q, 4] output of the box head, if the decoder has computed it already
    hs_o2m: Tensor | None = None  # [B, Q of the inference group, C] of MS-DETR's branch; training only


@dataclass
class Prediction:
    """Class logits and boxes of one kind of query, of L decoder layers (the last one last)."""

    logits: Tensor  # [L, B, Q, K]
    boxes: Tensor  # [L, B, Q, 4] cxcywh in [0, 1]
    anchors: Tensor | None = None  # [L, B, Q, 4] encoder proposals before refinement
    masks: Tensor | None = None  # [B, Q, h, w] logits of the last layer
    assignment: Assignment | None = None  # of every layer, if known in advance


class TrainingBranch(nn.Module):
    """A part that only training adds to a detector: queries, losses, or both.

    A detector calls `queries` before the decoder and `losses` behind it.
    """

    def queries(self, memory: Memory, targets: list[dict]) -> tuple[list[QueryGroup], dict[str, Tensor]]:
        """Return query groups for the decoder, and unweighted losses by name.

        targets: for each image `labels`, `boxes` cxcywh in [0, 1], and `masks` if the data have them.
        """
        return [], {}

    def losses(
        self, detector: nn.Module, memory: Memory, predictions: dict[str, Prediction], targets: list[dict]
    ) -> dict[str, Tensor]:
        """Return unweighted losses (by name) of the predictions; they may train modules of `detector`."""
        return {}


@dataclass(frozen=True)
class AttentionBlock:
    """Queries that attend to the same keys, in self-attention."""

    queries: slice
    keys: list[slice]  # queries that are the keys, as several ranges
    hidden: Tensor | None = None  # [queries, keys] True = may not attend; None: all may

    def pick(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return the keys' part of x, whose axis `dim` runs over all queries."""
        runs = [x.narrow(dim, run.start, run.stop - run.start) for run in self.keys]
        return runs[0] if len(runs) == 1 else torch.cat(runs, dim=dim)


def join_groups(groups: list[QueryGroup], decoder: object, *fields: str) -> list[Tensor]:
    """Concatenate `tgt` and other fields of all groups, each as [B, Q, n].

    fields: `query_pos`, `reference_points` or both, which the decoder reads.

    Raises:
        ValueError: a group lacks one of these fields, or has one that the decoder does not read.
    """
    name = type(decoder).__name__
    for group in groups:
        for field in ('query_pos', 'reference_points'):
            missing = getattr(group, field) is None
            if missing and field in fields:
                raise ValueError(f'{name} needs {field} of every query group, and {group.name} has none')
            if not missing and field not in fields:
                raise ValueError(f'{name} does not read {field}, which the query group {group.name} brings')
    return [torch.cat([getattr(group, field) for group in groups], dim=1) for field in ('tgt', *fields)]


def attention_blocks(groups: list[QueryGroup]) -> list[AttentionBlock]:
    """Return which queries attend to which, one block for each group that is not empty.

    Source: H-DETR, Sec. 3.2; DINO, Sec. 3.3. A query attends to the groups named in `sees` and to its own
    group, or in a group with blocks to its own block. The inference group names none, so training queries
    cannot change its result. Each group attends separately: the numbers are those of one masked attention
    over all queries, but only groups with blocks need a mask.
    """
    runs, start, blocks = {}, 0, []
    for group in groups:
        runs[group.name] = slice(start, start + group.tgt.shape[1])
        start += group.tgt.shape[1]
    for group in groups:
        keys, hidden = [runs[name] for name in (*group.sees, group.name)], None
        if group.block:
            block = torch.arange(group.tgt.shape[1], device=group.tgt.device) // group.block
            num_others = sum(run.stop - run.start for run in keys[:-1])
            hidden = F.pad(block[:, None] != block, (num_others, 0))  # [Q, num_others + Q]
        if group.tgt.shape[1]:
            blocks.append(AttentionBlock(runs[group.name], keys, hidden))
    return blocks


def split_groups(queries: QueryGroup, num_queries: dict[str, int]) -> list[QueryGroup]:
    """Split queries into groups of the given sizes, in the order of `num_queries`."""
    sizes = list(num_queries.values())
    parts = [
        [None] * len(sizes) if x is None else x.split(sizes, dim=1)
        for x in (queries.tgt, queries.query_pos, queries.reference_points)
    ]
    return [QueryGroup(name, *fields) for name, *fields in zip(num_queries, *parts, strict=True)]
