"""Compute the position or content of queries from their boxes, for query sources."""

from torch import Tensor, nn

from models.position_encoding import sine_embedding


class BoxPositions(nn.Module):
    """A sine embedding of boxes, a linear layer and a norm (Deformable DETR Sec. 4.2 of the appendix, for proposals)."""

    def __init__(self, hidden_dim: int, width: int) -> None:
        super().__init__()
        self.num_feats = hidden_dim // 2
        self.linear = nn.Linear(2 * hidden_dim, width)
        self.norm = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, boxes: Tensor) -> Tensor:
        """Encode boxes [B, Q, 4] cxcywh in [0, 1] as [B, Q, width]."""
        return self.norm(self.linear(sine_embedding(boxes, self.num_feats).to(boxes.dtype)))
