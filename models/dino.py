"""
What DINO (arXiv:2203.03605) does otherwise than Deformable DETR at inference: the position of a query follows from
its box in every layer, heads read normed states, and proposals are chosen by their best class.

Its contrastive denoising is training's (`models.training.denoising`).
"""

import torch
from torch import Tensor, nn

from .deformable_transformer import DeformableDecoder, DeformableTransformer, pick
from .heads import MLP
from .position_encoding import sine_embedding
from .structures import LayerOutput, Memory, Prediction, QueryGroup, check_groups


class DinoDecoder(DeformableDecoder):
    """Boxes are refined with the raw state of a layer; heads read it after a norm that all layers share."""

    eps = 1e-3

    def __init__(self, layer: nn.Module, num_layers: int, look_forward_twice: bool = True) -> None:
        super().__init__(layer, num_layers, look_forward_twice)
        d_model = layer.norm1.normalized_shape[0]
        self.ref_point_head = MLP(2 * d_model, d_model, d_model, num_layers=2)
        self.norm = nn.LayerNorm(d_model)

    def check(self, groups: list[QueryGroup]) -> None:
        check_groups(groups, self, needs=('reference_points',), ignores=('query_pos',))

    def query_pos(self, groups: list[QueryGroup], scaled: Tensor) -> Tensor:
        """From the boxes as the first level has them, [B, Q, C]; the code's order is y, x, width, height."""
        x, y, width, height = scaled[:, :, 0].split(1, dim=-1)
        boxes = torch.cat([y, x, width, height], dim=-1)  # indices in a list would have to reach the device
        num_feats = self.norm.normalized_shape[0] // 2
        return self.ref_point_head(sine_embedding(boxes, num_feats).to(boxes.dtype))

    def refinement(self, box_head: nn.Module, tgt: Tensor, last: bool) -> Tensor | None:
        """No layer follows the last one that could use it."""
        return None if last else box_head(tgt)

    def output(self, tgt: Tensor, shown: Tensor, delta: Tensor | None, second: Tensor | None) -> LayerOutput:
        """The heads apply themselves to the normed state, so no refinement is handed out."""
        return LayerOutput(self.norm(tgt), shown, None, None if second is None else self.norm(second))


class DinoTransformer(DeformableTransformer):
    """Two stages, the second of which starts with learned content at the boxes of the first."""

    places_proposals = False

    def propose(
        self, memory: Memory, class_head: nn.Linear, box_head: nn.Module, num_proposals: int
    ) -> tuple[Tensor, Prediction | None]:
        """The boxes [B, num_proposals, 4] of the tokens with the best logit of any class; gradients do not pass. While
        training also the prediction of these tokens, kind 'enc'.

        ValueError: fewer tokens than proposals.
        """
        features, anchors = self.proposal_features(memory, num_proposals)
        logits = class_head(features)
        best = logits.amax(-1).topk(num_proposals, dim=1).indices
        anchors = pick(anchors, best)
        boxes = (box_head(pick(features, best)) + anchors).sigmoid()
        chosen = Prediction(pick(logits, best), boxes, 'enc', anchors=anchors.sigmoid())
        return boxes.detach(), chosen if self.training else None

    def queries_from_proposals(self, boxes: Tensor, content: Tensor) -> QueryGroup:
        """boxes: [B, Q, 4]; content: [Q, C] learned. Their positions are the decoder's to derive."""
        return QueryGroup('all', content.expand(boxes.shape[0], -1, -1), reference_points=boxes)
