"""
Co-DETR (arXiv:2211.12860): dense detectors on the encoder's output, and their positive samples as decoder
queries.

Training only. Each head adds its own losses (Sec. 3.2) and a group of queries whose objects are known in
advance (Sec. 3.3).
"""

import torch
from torch import Tensor, nn

from models.deformable_transformer import gather_rows
from models.heads import inverse_sigmoid
from models.structures import Assignment, Memory, QueryGroup, TrainingBranch
from util.box_ops import box_xyxy_to_cxcywh
from util.precision import without_autocast

from .atss import ATSS
from .denoising import BoxPositions, LinearNorm
from .dense_heads import BACKGROUND, Images, Samples, shuffled
from .faster_rcnn import FasterRCNN

HEADS = {'faster_rcnn': FasterRCNN, 'atss': ATSS}
MIN_QUERIES = 9  # smallest number of queries of a head, even without positives


class CollaborativeHeads(TrainingBranch):
    """Auxiliary heads, and queries made from their positives.

    Args:
        names: keys of `HEADS`.
        strides: strides of the encoder's maps in pixels.
        max_queries: largest number of positives of an image that become queries.
        with_features: add the feature that the head saw to the content of a query.
        derived_positions: the decoder computes the position of a query from its box (DINO).
        rcnn_head, rcnn_masks: kind of the RoI head of `FasterRCNN`, and whether it has a mask branch.
    """

    def __init__(
        self,
        names: list[str],
        num_classes: int,
        hidden_dim: int,
        strides: list[int],
        max_queries: int = 300,
        with_features: bool = True,
        derived_positions: bool = False,
        rcnn_head: str = '2fc',
        rcnn_masks: bool = False,
    ) -> None:
        super().__init__()
        self.max_queries, self.derived_positions = max_queries, derived_positions
        self.downsample = nn.Sequential(
            nn.Conv2d(hidden_dim, hidden_dim, 3, stride=2, padding=1), nn.GroupNorm(32, hidden_dim)
        )
        sizes = hidden_dim, num_classes, [*strides, 2 * strides[-1]]
        options = {'faster_rcnn': {'head': rcnn_head, 'masks': rcnn_masks}}
        self.heads = nn.ModuleDict({name: HEADS[name](*sizes, **options.get(name, {})) for name in names})
        width = hidden_dim if derived_positions else 2 * hidden_dim
        self.aux_pos_trans = nn.ModuleDict({name: BoxPositions(hidden_dim, width) for name in names})
        self.pos_feats_trans = None
        if with_features:
            self.pos_feats_trans = nn.ModuleDict({name: LinearNorm(hidden_dim, hidden_dim) for name in names})
            if not derived_positions:
                self.head_pos_embed = nn.Embedding(len(HEADS), 1)  # one number per head (official code)
                nn.init.xavier_uniform_(self.head_pos_embed.weight)

    def queries(self, memory: Memory, targets: list[dict]) -> tuple[list[QueryGroup], dict[str, Tensor]]:
        """Return a query group for each head, and the heads' unweighted losses."""
        samples, losses = {}, {}
        with without_autocast(memory.tokens):  # pixel coordinates and losses need more than 16 bits
            maps, images = self.maps(memory), Images.of(memory, targets)
            for name, head in self.heads.items():
                head_losses, samples[name] = head(maps, images)
                losses |= head_losses
            groups = [self.query_group(name, boxes, images.sizes) for name, boxes in samples.items()]
        return groups, losses

    def maps(self, memory: Memory) -> list[Tensor]:
        """Turn encoder tokens into maps [B, C, H, W], and add one of half the size of the last."""
        maps = memory.maps()
        return [*maps, self.downsample(maps[-1])]

    def query_group(self, name: str, samples: Samples, sizes: Tensor) -> QueryGroup:
        """Turn the positives of a head into a query group. Images with fewer positives get negatives too.

        sizes: [B, 2] width and height of the images.
        """
        index = choose_samples(samples.target, self.max_queries)  # [B, M]
        boxes = gather_rows(samples.boxes, index) / sizes.repeat(1, 2)[:, None]
        reference = box_xyxy_to_cxcywh(boxes)  # may lie outside the image
        encoded = self.aux_pos_trans[name](inverse_sigmoid(reference).sigmoid())  # [B, M, C or 2 C]
        query_pos, tgt = (None, encoded) if self.derived_positions else encoded.chunk(2, dim=-1)
        if self.pos_feats_trans is not None:
            tgt = tgt + self.pos_feats_trans[name](gather_rows(samples.features(), index))
            if query_pos is not None:
                query_pos = query_pos + self.head_pos_embed.weight[list(HEADS).index(name)]
        target = samples.target.gather(1, index).cpu()
        image, query = (target != BACKGROUND).nonzero().unbind(1)
        positives = Assignment(image, query, target[image, query])
        return QueryGroup(self.heads[name].kind, tgt, query_pos, reference, assignment=positives)

    @torch.no_grad()
    def detect(self, memory: Memory, name: str) -> dict[str, list[dict[str, Tensor]]]:
        """Detect with one head alone, before NMS.

        Returns:
            `candidates`: a dictionary per image of `scores` [N], `labels` [N] and `boxes` [N, 4] cxcywh in
            [0, 1].
        """
        with without_autocast(memory.tokens):
            sizes = Images.of(memory, None).sizes
            candidates = self.heads[name].detect(self.maps(memory), sizes)
        for image, size in zip(candidates, sizes, strict=True):
            image['boxes'] = box_xyxy_to_cxcywh(image['boxes'] / size.repeat(2))
        return {'candidates': candidates}


@torch.no_grad()
def choose_samples(target: Tensor, most: int) -> Tensor:
    """Choose the samples of each image that become queries, and return their indices [B, M].

    Positives come first, in their order; if there are more than M, M of them are drawn at random. Random
    negatives fill up the rest. M is the largest number of positives, but at least MIN_QUERIES, and at most
    `most` and N.

    target: [B, N] objects, BACKGROUND for negatives.
    """
    num_positives = (target != BACKGROUND).sum(1).tolist()
    num_queries = min(max(MIN_QUERIES, min(most, max(num_positives))), target.shape[1])
    positives_first = (target == BACKGROUND).byte().argsort(dim=1, stable=True)
    rows = []
    for order, count in zip(positives_first, num_positives, strict=True):
        row, negatives = order[:count], order[count:]
        if count > num_queries:
            row = shuffled(row, num_queries)
        elif count < num_queries:
            row = torch.cat([row, shuffled(negatives, num_queries - count)])
        rows.append(row)
    return torch.stack(rows)
