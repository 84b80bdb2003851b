"""
Co-DETR (arXiv:2211.12860): dense detectors on the encoder's output, and their positive samples as decoder queries.

Training only. Each head brings its own losses (Sec. 3.2) and a group of queries whose objects are known in advance
(Sec. 3.3).
"""

import torch
from torch import Tensor, nn

from models.deformable_transformer import pick
from models.heads import inverse_sigmoid
from models.structures import Assignment, Memory, QueryGroup
from util.box_ops import box_xyxy_to_cxcywh
from util.precision import full_precision, without_autocast

from .atss import ATSS
from .dense_heads import BACKGROUND, Images, Samples, permutation
from .faster_rcnn import FasterRCNN
from .positions import BoxPositions

HEADS = {'faster_rcnn': FasterRCNN, 'atss': ATSS}
FEWEST = 9  # queries of a head, even without positives


class CollaborativeHeads(nn.Module):
    """Auxiliary heads by name, in the order given.

    strides: of the encoder's maps. max_queries: the most positives of an image that become queries. with_features:
    their content also has the feature that the head saw. derived_positions: the decoder derives the position of a
    query from its box (DINO).
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
    ) -> None:
        super().__init__()
        self.max_queries, self.derived_positions = max_queries, derived_positions
        self.downsample = nn.Sequential(
            nn.Conv2d(hidden_dim, hidden_dim, 3, stride=2, padding=1), nn.GroupNorm(32, hidden_dim)
        )
        strides = [*strides, 2 * strides[-1]]
        self.heads = nn.ModuleDict({name: HEADS[name](hidden_dim, num_classes, strides) for name in names})
        width = hidden_dim if derived_positions else 2 * hidden_dim
        self.aux_pos_trans = nn.ModuleDict({name: BoxPositions(hidden_dim, width) for name in names})
        self.pos_feats_trans = None
        if with_features:
            self.pos_feats_trans = nn.ModuleDict({name: FeatureContent(hidden_dim) for name in names})
            if not derived_positions:
                self.head_pos_embed = nn.Embedding(len(HEADS), 1)  # a number a head, as in the official code
                nn.init.xavier_uniform_(self.head_pos_embed.weight)

    def forward(self, memory: Memory, targets: list[dict]) -> tuple[list[QueryGroup], dict[str, Tensor]]:
        """targets: dictionaries of `labels` and `boxes` cxcywh in [0, 1]. Returns a group a head, and the heads'
        unweighted losses.
        """
        samples, losses = {}, {}
        with without_autocast(memory.tokens):  # pixel coordinates and losses are never computed in 16 bit
            maps, images = self.maps(memory), Images.of(memory, targets)
            for name, head in self.heads.items():
                more, samples[name] = head(maps, images, self.pos_feats_trans is not None)
                losses |= more
            groups = [self.queries(name, places, images.sizes) for name, places in samples.items()]
        return groups, losses

    def maps(self, memory: Memory) -> list[Tensor]:
        """Encoder tokens as maps [B, C, H, W], and one of half the size beyond."""
        levels = full_precision(memory.tokens).split(
            [height * width for height, width in memory.shapes], dim=1
        )
        maps = [
            level.transpose(1, 2).unflatten(2, shape)
            for level, shape in zip(levels, memory.shapes, strict=True)
        ]
        return [*maps, self.downsample(maps[-1])]

    def queries(self, name: str, samples: Samples, sizes: Tensor) -> QueryGroup:
        """Positives of a head as a query group, filled up with negatives where an image has fewer than another; sizes:
        [B, 2] width and height of the images.
        """
        chosen = choose_samples(samples.target, self.max_queries)  # [B, M]
        boxes = pick(samples.boxes, chosen) / sizes.repeat(1, 2)[:, None]
        reference = box_xyxy_to_cxcywh(boxes)  # may lie outside the image
        encoded = self.aux_pos_trans[name](inverse_sigmoid(reference).sigmoid())  # [B, M, C or 2 C]
        query_pos, tgt = (None, encoded) if self.derived_positions else encoded.chunk(2, dim=-1)
        if self.pos_feats_trans is not None:
            tgt = tgt + self.pos_feats_trans[name](pick(samples.features, chosen))
            if query_pos is not None:
                query_pos = query_pos + self.head_pos_embed.weight[list(HEADS).index(name)]
        target = samples.target.gather(1, chosen).cpu()
        image, query = (target != BACKGROUND).nonzero().unbind(1)
        positives = Assignment(image, query, target[image, query], float(len(query)))
        return QueryGroup(self.heads[name].kind, tgt, query_pos, reference, assignment=positives)

    @torch.no_grad()
    def detect(self, memory: Memory, name: str) -> dict[str, list[dict[str, Tensor]]]:
        """What one head finds by itself: `candidates`, a dictionary an image of `scores` [N], `labels` [N] and `boxes`
        [N, 4] cxcywh in [0, 1], before suppression.
        """
        with without_autocast(memory.tokens):
            sizes = Images.of(memory, None).sizes
            found = self.heads[name].detect(self.maps(memory), sizes)
        for candidates, size in zip(found, sizes, strict=True):
            candidates['boxes'] = box_xyxy_to_cxcywh(candidates['boxes'] / size.repeat(2))
        return {'candidates': found}


class FeatureContent(nn.Module):
    """What a head saw at the place of a query, as content: [B, M, C] to the same."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.linear(features))


@torch.no_grad()
def choose_samples(target: Tensor, most: int) -> Tensor:
    """[B, M] places of the queries of each image: positives in their order (drawn at random if there are more than
    `most`), then random negatives.

    M is the largest number of positives, within FEWEST and `most`, and the number of places. target: [B, N] objects,
    BACKGROUND for negatives.
    """
    num_positives = (target != BACKGROUND).sum(1).tolist()
    wanted = min(max(FEWEST, min(most, max(num_positives))), target.shape[1])
    rows = []
    for found, count in zip(target, num_positives, strict=True):
        positives = (found != BACKGROUND).nonzero()[:, 0]
        if count > wanted:
            positives = positives[permutation(count, target)[:wanted]]
        elif count < wanted:
            negatives = (found == BACKGROUND).nonzero()[:, 0]
            drawn = negatives[permutation(len(negatives), target)[: wanted - count]]
            positives = torch.cat([positives, drawn])
        rows.append(positives)
    return torch.stack(rows)
