"""
The decoder of DINO (arXiv:2203.03605), where it differs from Deformable DETR's.

The position of a query is computed from its box in every layer, heads read normed states, and proposals are
chosen by their best class. Contrastive denoising is part of training (`models.training.denoising`).
"""

import torch
from torch import Tensor, nn

from .deformable_transformer import DeformableDecoder
from .heads import MLP, LogitBoxes
from .position_encoding import sine_embedding
from .structures import LayerOutput


class DinoDecoder(DeformableDecoder):
    """A decoder that refines boxes with a layer's raw state; heads read it after a norm that layers share."""

    box_code = LogitBoxes(eps=1e-3)
    positions_from_boxes = True
    proposals_by_class = True

    def __init__(self, layer: nn.Module, num_layers: int, look_forward_twice: bool = True) -> None:
        super().__init__(layer, num_layers, look_forward_twice)
        d_model = layer.norm1.normalized_shape[0]
        self.ref_point_head = MLP(2 * d_model, d_model, d_model, num_layers=2)
        self.norm = nn.LayerNorm(d_model)

    def query_pos(self, scaled: Tensor) -> Tensor:
        """Compute positions [B, Q, C] from boxes on the first level, embedded as y, x, width, height."""
        x, y, width, height = scaled[:, :, 0].split(1, dim=-1)
        boxes = torch.cat([y, x, width, height], dim=-1)  # an index list would be copied to the device
        num_feats = self.norm.normalized_shape[0] // 2
        return self.ref_point_head(sine_embedding(boxes, num_feats).to(boxes.dtype))

    def refinement(self, box_head: nn.Module, tgt: Tensor, last: bool) -> Tensor | None:
        """Refine in all layers but the last, because no layer would use its boxes."""
        return None if last else box_head(tgt)

    def output(self, tgt: Tensor, code: Tensor, delta: Tensor | None, hs_o2m: Tensor | None) -> LayerOutput:
        """Return normed states without the refinement, since box heads read the normed state again."""
        return LayerOutput(self.norm(tgt), code, None, None if hs_o2m is None else self.norm(hs_o2m))
