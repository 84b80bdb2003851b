"""
The vocabulary: what travels between backbone, transformer, heads and criterion.

Every detector here emits a flat list of predictions. Each carries the name of its kind; one table says how
each kind is supervised. Letters in shapes: B images, Q queries, S memory tokens, L levels, C channels, K
classes, M matched pairs, T objects of the batch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Memory:
    """What the encoder leaves."""

    tokens: Tensor  # [B, S, C], levels one after the other, row by row
    padding_mask: Tensor  # [B, S], True = padding
    shapes: list[tuple[int, int]]  # (H, W) of each level, plain integers: no layer has to ask the device
    pos: Tensor | None = None  # [B, S, C] positional encoding
    valid_ratios: Tensor | None = None  # [B, L, 2] valid part of width and height; deformable attention
    sizes: Tensor | None = None  # [L, 2] width and height of each level, as `shapes`; deformable attention
    pixel_mask: Tensor | None = None  # [B, H, W] of the images, True = padding; deformable detectors


@dataclass
class Assignment:
    """Pairs (query, object), and the count that the losses of this prediction are divided by."""

    batch: Tensor  # [M]
    query: Tensor  # [M]
    target: Tensor  # [M], counts through the objects of the batch
    count: float  # of this process; averaged over processes, at least 1 in all
    # [M] bool, pairs that decide the class of their query; None: all do, no query has two
    deciding: Tensor | None = None


@dataclass
class QueryGroup:
    """Decoder queries born together; `name` is the kind of their predictions ('one2one': inference)."""

    name: str
    tgt: Tensor  # [B, Q, C] content
    query_pos: Tensor | None = None  # [B, Q, C]; None: the decoder derives it from the boxes
    reference_points: Tensor | None = (
        None  # [B, Q, 2 or 4] in [0, 1]; None: no reference, or derived in the decoder
    )
    sees: tuple[str, ...] = ()  # other groups that it may attend to
    block: int = 0  # > 0: only queries of the same block of this size see each other
    assignment: Assignment | None = None  # known in advance


@dataclass
class LayerOutput:
    """What one decoder layer leaves, over all groups."""

    hs: Tensor  # [B, Q, C]
    reference: Tensor | None = None  # [B, Q, 2 or 4], what the box head's output is added to, in logit space
    delta: Tensor | None = None  # [B, Q, 4] the box head's output, where the decoder has refined with it
    hs_o2m: Tensor | None = None  # [B, Q of the inference group, C] second reading of MS-DETR; training only


@dataclass
class Prediction:
    """Class logits and boxes read at one place."""

    logits: Tensor  # [B, Q, K]
    boxes: Tensor  # [B, Q, 4] cxcywh in [0, 1]
    kind: str = 'one2one'  # row of the supervision table
    layer: int | None = None  # None = last
    anchors: Tensor | None = None  # [B, Q, 4] encoder proposals before refinement
    masks: Tensor | None = None  # [B, Q, h, w] logits
    assignment: Assignment | None = None


@dataclass(frozen=True)
class AttentionBlock:
    """Queries that attend to the same keys."""

    queries: slice
    keys: list[slice]  # runs of queries, one after the other
    hidden: Tensor | None = None  # [queries, keys] True = may not attend; None: all may

    def pick(self, x: Tensor, dim: int = 1) -> Tensor:
        """The keys' part of x."""
        runs = [x.narrow(dim, run.start, run.stop - run.start) for run in self.keys]
        return runs[0] if len(runs) == 1 else torch.cat(runs, dim=dim)


def check_groups(
    groups: list[QueryGroup], decoder: object, needs: tuple[str, ...] = (), ignores: tuple[str, ...] = ()
) -> None:
    """Refuse query groups that a decoder cannot honour.

    Args:
        needs: fields that every group must bring.
        ignores: fields that the decoder would not read.

    Raises:
        ValueError: a group lacks or brings such a field.
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
    """Self-attention between query groups (H-DETR Sec. 3.2, DINO Sec. 3.3), one block a group that is not empty.

    A group sees itself (only the own block where `block` is set) and the groups named in `sees`; the inference
    group names none, so training queries cannot change its result. Each group attends apart, so that only a group
    with blocks needs a mask: the numbers are those of one masked attention over all, at less cost.
    """
    runs, start = {}, 0
    for group in groups:
        runs[group.name] = slice(start, start + group.tgt.shape[1])
        start += group.tgt.shape[1]
    return [
        AttentionBlock(
            runs[group.name],
            [runs[name] for name in (*group.sees, group.name)],
            other_blocks(group, sum(runs[name].stop - runs[name].start for name in group.sees)),
        )
        for group in groups
        if group.tgt.shape[1]
    ]


def other_blocks(group: QueryGroup, num_seen: int) -> Tensor | None:
    """[Q, num_seen + Q] True where a query would see another block of its group; None without blocks."""
    if not group.block:
        return None
    block = torch.arange(group.tgt.shape[1], device=group.tgt.device) // group.block
    return F.pad(block[:, None] != block, (num_seen, 0))


def learned_groups(
    num_queries: dict[str, int], query_embed: Tensor, batch_size: int, training: bool
) -> list[QueryGroup]:
    """Learned object queries as groups: content zero, position learned (DETR Sec. 3.2).

    query_embed: [sum of num_queries, C], rows in the order of `num_queries`. Outside training only the first
    group exists.
    """
    names = list(num_queries) if training else list(num_queries)[:1]
    embeds = query_embed.split(list(num_queries.values()))
    positions = {
        name: embed.expand(batch_size, -1, -1) for name, embed in zip(num_queries, embeds, strict=True)
    }
    return [QueryGroup(name, torch.zeros_like(positions[name]), positions[name]) for name in names]


def split_groups(every: QueryGroup, num_queries: dict[str, int]) -> list[QueryGroup]:
    """Queries that were made together as the groups that they belong to, in the order of `num_queries`."""
    start, groups = 0, []
    for name, size in num_queries.items():
        parts = (
            None if x is None else x[:, start : start + size]
            for x in (every.tgt, every.query_pos, every.reference_points)
        )
        groups.append(QueryGroup(name, *parts))
        start += size
    return groups


def split_predictions(logits: Tensor, boxes: Tensor, groups: list[QueryGroup]) -> list[Prediction]:
    """One prediction a group and layer; the last layer is `None`. logits: [L, B, Q, K], boxes: [L, B, Q, 4]."""
    sizes, last = [group.tgt.shape[1] for group in groups], len(logits) - 1
    parts = zip(groups, logits.split(sizes, dim=2), boxes.split(sizes, dim=2), strict=True)
    return [
        Prediction(*one_layer, group.name, layer if layer < last else None, assignment=group.assignment)
        for group, *both in parts
        for layer, one_layer in enumerate(zip(*both, strict=True))
    ]
