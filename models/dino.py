"""
The decoder and proposals of DINO (arXiv:2203.03605), where they differ from Deformable DETR's.

The position of a query is computed from its box in every layer, heads read normed states, and proposals are chosen by
their best class. Contrastive denoising is part of training (`models.training.denoising`).
"""

import torch
from torch import Tensor, nn

from .deformable_transformer import DeformableDecoder, DeformableTransformer, gather_rows
from .heads import MLP
from .position_encoding import sine_embedding
from .structures import LayerOutput, Memory, Prediction, QueryGroup, check_groups


class DinoDecoder(DeformableDecoder):
    """A decoder that refines boxes with the raw state of a layer; heads read it after a norm shared by all layers."""

    eps = 1e-3

    def __init__(self, layer: nn.Module, num_layers: int, look_forward_twice: bool = True) -> None:
        super().__init__(layer, num_layers, look_forward_twice)
        d_model = layer.norm1.normalized_shape[0]
        self.ref_point_head = MLP(2 * d_model, d_model, d_model, num_layers=2)
        self.norm = nn.LayerNorm(d_model)

    def check(self, groups: list[QueryGroup]) -> None:
        check_groups(groups, self, needs=('reference_points',), ignores=('query_pos',))

    def query_pos(self, groups: list[QueryGroup], scaled: Tensor) -> Tensor:
        """Compute positions [B, Q, C] from the boxes in units of the first level, embedded as y, x, width, height."""
        x, y, width, height = scaled[:, :, 0].split(1, dim=-1)
        boxes = torch.cat([y, x, width, height], dim=-1)  # an index list would be copied to the device
        num_feats = self.norm.normalized_shape[0] // 2
        return self.ref_point_head(sine_embedding(boxes, num_feats).to(boxes.dtype))

    def refinement(self, box_head: nn.Module, tgt: Tensor, last: bool) -> Tensor | None:
        """Refine in all layers but the last, because no layer would use its boxes."""
        return None if last else box_head(tgt)

    def output(
        self, tgt: Tensor, reference: Tensor, delta: Tensor | None, second: Tensor | None
    ) -> LayerOutput:
        """Return normed states without the refinement, since box heads read the normed state again."""
        return LayerOutput(self.norm(tgt), reference, None, None if second is None else self.norm(second))


class DinoTransformer(DeformableTransformer):
    """A two-stage transformer whose queries have learned content and start at the proposals."""

    places_proposals = False

    def propose(
        self, memory: Memory, class_head: nn.Linear, box_head: nn.Module, num_proposals: int
    ) -> tuple[Tensor, Prediction | None]:
        """Find proposals (first stage): boxes of the tokens with the largest logit of any class.

        Returns:
            Boxes [B, num_proposals, 4] without gradient, and while training the prediction of these tokens (kind 'enc').

        Raises:
            UserError: there are fewer tokens than proposals.
        """
        features, anchors = self.proposal_features(memory, num_proposals)
        logits = class_head(features)
        best = self.choose_proposals(logits.amax(-1), num_proposals)
        anchors = gather_rows(anchors, best)
        boxes = (box_head(gather_rows(features, best)) + anchors).sigmoid()
        chosen = Prediction(gather_rows(logits, best)[None], boxes[None], anchors.sigmoid()[None])
        return boxes.detach(), chosen if self.training else None

    def queries_from_proposals(self, boxes: Tensor, content: Tensor) -> QueryGroup:
        """Make queries from boxes [B, Q, 4] and learned content [Q, C]; the decoder computes their positions."""
        return QueryGroup('all', content.expand(boxes.shape[0], -1, -1), reference_points=boxes)
