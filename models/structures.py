"""
Data structures that backbone, transformer, heads and criterion exchange.

A detector in training returns one `Prediction` for each kind of query, of all decoder layers together. One
table (`models.training.supervision`) says how each kind is supervised. Letters in shapes: B images, Q
queries, S memory tokens, L decoder layers (of `Memory`: levels), C channels, K classes, M matched pairs, T
objects of the batch.
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
    # [M] bool: the pair sets the class of its query. A query with several pairs has one that does; None: all
    # pairs do.
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
    query_pos: Tensor | None = None  # [B, Q, C]; None: the decoder derives it from the boxes
    # [B, Q, 2 or 4] in [0, 1]; None: the decoder uses none, or computes them itself
    reference_points: Tensor | None = None
    sees: tuple[str, ...] = ()  # other groups that it may attend to
    block: int = 0  # > 0: split the group into blocks of this size that may not attend to each other
    assignment: Assignment | None = None  # objects of the queries, if they are known in advance


@dataclass
class LayerOutput:
    """The output of one decoder layer for the queries of all groups."""

    hs: Tensor  # [B, Q, C]
    reference: Tensor | None = None  # [B, Q, 2 or 4] in logit space; the box head's output is added to it
    delta: Tensor | None = None  # [B, Q, 4] output of the box head, if the decoder has computed it already
    hs_o2m: Tensor | None = (
        None  # [B, Q of the inference group, C] one-to-many branch of MS-DETR; training only
    )


@dataclass
class Prediction:
    """Class logits and boxes of one kind of query, of L decoder layers (the last one last)."""

    logits: Tensor  # [L, B, Q, K]
    boxes: Tensor  # [L, B, Q, 4] cxcywh in [0, 1]
    anchors: Tensor | None = None  # [L, B, Q, 4] encoder proposals before refinement
    masks: Tensor | None = None  # [B, Q, h, w] logits of the last layer
    assignment: Assignment | None = None  # of every layer, if the objects of the queries are known in advance


class TrainingBranch(nn.Module):
    """A part that only training adds to a detector: queries, losses, or both.

    A detector calls `queries` before the decoder and `losses` behind it.
    """

    def queries(self, memory: Memory, targets: list[dict]) -> tuple[list[QueryGroup], dict[str, Tensor]]:
        """Return query groups for the decoder, and the unweighted losses (by name) that were computed on the
        way.

        targets: a dictionary of `labels` and `boxes` cxcywh in [0, 1] per image, and of `masks` if the data
        have them.
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


def check_groups(
    groups: list[QueryGroup], decoder: object, needs: tuple[str, ...] = (), ignores: tuple[str, ...] = ()
) -> None:
    """Refuse query groups that a decoder cannot use.

    Args:
        needs: fields that no group may leave out.
        ignores: fields that no group may set, because the decoder would not read them.

    Raises:
        ValueError: a group breaks one of these rules.
    """
    name = type(decoder).__name__
    for group in groups:
        for field in needs:
            if getattr(group, field) is None:
                raise ValueError(f'{name} needs {field} of every query group, and {group.name} has none')
        for field in ignores:
            if getattr(group, field) is not None:
                raise ValueError(f'{name} does not read {field}, which the query group {group.name} brings')


def attention_blocks(groups: list[QueryGroup]) -> list[AttentionBlock]:
    """Say which queries attend to which (H-DETR Sec. 3.2, DINO Sec. 3.3): one block per group that is not
    empty.

    A group sees the groups named in `sees` and itself, or only the query's own block if it has blocks. The
    inference group names none, so that training queries cannot change its result. Each group attends
    separately: the numbers are those of one masked attention over all queries, but only groups with blocks
    need a mask.
    """
    runs, start, blocks = {}, 0, []
    for group in groups:
        runs[group.name] = slice(start, start + group.tgt.shape[1])
        start += group.tgt.shape[1]
    for group in groups:
        keys, hidden = [runs[name] for name in (*group.sees, group.name)], None
        if group.block:
            own = torch.arange(group.tgt.shape[1], device=group.tgt.device) // group.block
            seen = sum(run.stop - run.start for run in keys[:-1])
            hidden = F.pad(own[:, None] != own, (seen, 0))  # [Q, seen + Q]
        if group.tgt.shape[1]:
            blocks.append(AttentionBlock(runs[group.name], keys, hidden))
    return blocks


def split_groups(every: QueryGroup, num_queries: dict[str, int]) -> list[QueryGroup]:
    """Split queries into groups of the given sizes, in the order of `num_queries`."""
    sizes = list(num_queries.values())
    parts = [
        [None] * len(sizes) if x is None else x.split(sizes, dim=1)
        for x in (every.tgt, every.query_pos, every.reference_points)
    ]
    return [QueryGroup(name, *fields) for name, *fields in zip(num_queries, *parts, strict=True)]
