"""Contrastive denoising (DINO, arXiv:2203.03605, Sec. 3.3): the decoder also reconstructs noised objects."""

import torch
from torch import Tensor, nn

from models.heads import LogitBoxes
from models.position_encoding import sine_embedding
from models.structures import Assignment, Memory, QueryGroup, TrainingBranch
from util.box_ops import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from util.precision import without_autocast


class LinearNorm(nn.Module):
    """A linear layer and a norm, from features [..., C] to the content or the position of queries."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, width)
        self.norm = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class BoxPositions(LinearNorm):
    """A sine embedding of boxes, a linear layer and a norm (Deformable DETR, appendix A.4, for proposals)."""

    def __init__(self, hidden_dim: int, width: int) -> None:
        super().__init__(2 * hidden_dim, width)
        self.num_feats = hidden_dim // 2

    def forward(self, boxes: Tensor) -> Tensor:
        """Encode boxes [B, Q, 4] cxcywh in [0, 1] as [B, Q, width]."""
        return super().forward(sine_embedding(boxes, self.num_feats).to(boxes.dtype))


class Denoising(TrainingBranch):
    """Queries at noised objects, in groups that do not see each other.

    A group has a positive and a negative copy of every object. The negative copy is moved farther, and its
    target is the background.

    Args:
        box_code: that of the decoder.
        num_queries: the number of groups is num_queries / (largest number of objects of an image).
        label_noise: half of this share of the labels is replaced by random ones.
        box_noise: largest displacement of a positive's corner, as a multiple of half the side of its box.
        positions: give queries positions, for decoders that do not compute them from the boxes.
    """

    def __init__(
        self,
        num_classes: int,
        hidden_dim: int,
        box_code: LogitBoxes,
        num_queries: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        positions: bool = False,
    ) -> None:
        super().__init__()
        self.num_queries, self.box_code = num_queries, box_code
        self.label_noise, self.box_noise = label_noise, box_noise
        self.label_embedding = nn.Embedding(num_classes, hidden_dim)
        self.positions = BoxPositions(hidden_dim, hidden_dim) if positions else None

    def queries(self, memory: Memory, targets: list[dict]) -> tuple[list[QueryGroup], dict[str, Tensor]]:
        """Return one query group, which is empty without objects."""
        sizes = [len(target['labels']) for target in targets]
        most, total, num_groups = max(sizes), sum(sizes), self.num_groups(sizes)
        labels, codes = self.noised(
            torch.cat([target['labels'] for target in targets]),
            torch.cat([target['boxes'] for target in targets]),
            num_groups,
        )
        # Copy c of an object is query c * most + its number in its image. `noised` has all objects of a copy
        # one after the other.
        number = torch.tensor([index for size in sizes for index in range(size)], dtype=torch.int64)
        image = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        query = torch.arange(2 * num_groups)[:, None] * most + number  # [copies, objects]
        index = torch.stack([image.repeat(2 * num_groups), query.flatten()])
        index = index.to(labels.device, non_blocking=True).unbind()
        shape = len(sizes), 2 * num_groups * most
        embedded = self.label_embedding(labels)
        tgt = embedded.new_zeros(*shape, embedded.shape[-1]).index_put(index, embedded)
        reference = self.box_code.decode(codes.new_zeros(*shape, 4).index_put(index, codes))
        with without_autocast(reference):
            query_pos = None if self.positions is None else self.positions(reference)
        positives = Assignment(
            image.repeat(num_groups), query[::2].flatten(), torch.arange(total).repeat(num_groups)
        )
        group = QueryGroup(
            'dn', tgt, query_pos, reference, sees=('one2one',), block=2 * most, assignment=positives
        )
        return [group], {}

    def num_groups(self, sizes: list[int]) -> int:
        """Return the number of groups. sizes: number of objects of each image."""
        return max(1, self.num_queries // max(*sizes, 1))

    def count(self, sizes: list[int]) -> int:
        """Return the number of positives, the divisor of losses. sizes: number of objects of each image."""
        return self.num_groups(sizes) * sum(sizes)

    @torch.no_grad()
    def noised(self, labels: Tensor, boxes: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
        """Return labels [N] and encoded boxes [N, 4] of all copies: all objects, then all objects again.

        Random numbers come from the generator of the objects' device, in this order: labels to replace, new
        labels, signs and sizes of displacements.
        """
        copies = 2 * num_groups
        labels, boxes = labels.repeat(copies), boxes.repeat(copies, 1)
        replaced = (torch.rand_like(labels, dtype=boxes.dtype) < 0.5 * self.label_noise).nonzero()[:, 0]
        new_labels = torch.randint_like(replaced, 0, self.label_embedding.num_embeddings)
        labels = labels.index_put((replaced,), new_labels)
        sign = 2 * torch.randint_like(boxes, 0, 2) - 1
        share = torch.rand_like(boxes)
        negative = torch.arange(len(boxes), device=boxes.device) // max(len(boxes) // copies, 1) % 2
        share = share + negative[:, None]
        half = boxes[:, 2:].repeat(1, 2) / 2
        corners = box_cxcywh_to_xyxy(boxes) + sign * share * half * self.box_noise
        return labels, self.box_code.encode(box_xyxy_to_cxcywh(corners.clamp(0, 1)))
