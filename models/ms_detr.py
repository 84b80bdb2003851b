"""
MS-DETR (arXiv:2401.03989, Sec. 3): decoder queries are supervised twice, one-to-one and one-to-many, without further
queries.

The second reading exists while training only. Variant b (the main one) takes it after the cross-attention, which
therefore comes before the self-attention: this order stays at inference. Variant a takes it from the layer's
output, which second class heads read.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .conditional_detr import ConditionalDecoderLayer
from .deformable_transformer import DeformableDecoderLayer
from .structures import Memory
from .transformer import Blocks, compare_queries


class SecondReading:
    """What variant b adds to a layer for its second reading: nothing, or a feed-forward block of its own
    (`--use_aux_ffn`). Parameter names are the official ones.
    """

    reads_memory_first = True
    has_aux_ffn = False
    entry_points = ('second_reading',)  # besides forward

    def add_aux_ffn(self, d_model: int, dim_feedforward: int, dropout: float) -> None:
        self.has_aux_ffn = True
        self.linear3 = nn.Linear(d_model, dim_feedforward)
        self.dropout5 = nn.Dropout(dropout)
        self.linear4 = nn.Linear(dim_feedforward, d_model)
        self.dropout6 = nn.Dropout(dropout)
        self.norm4 = nn.LayerNorm(d_model)

    def second_reading(self, x: Tensor) -> Tensor:
        """What the heads read, from the state between cross-attention and self-attention; [B, Q, C]."""
        if not self.has_aux_ffn:
            return x
        hidden = self.linear4(self.dropout5(F.relu(self.linear3(x))))
        return self.norm4(x + self.dropout6(hidden))


class MixedDecoderLayer(SecondReading, DeformableDecoderLayer):
    """Cross-attention, self-attention, feed-forward (variant b)."""

    def forward(
        self, tgt: Tensor, query_pos: Tensor, reference: Tensor, memory: Memory, blocks: Blocks
    ) -> tuple[Tensor, Tensor]:
        x = self.norm1(tgt + self.dropout1(self.read_memory(tgt + query_pos, reference, memory)))
        attended = compare_queries(self.self_attn, x + query_pos, x, blocks)
        return self.ffn(self.norm2(x + self.dropout2(attended))), x


class MixedConditionalDecoderLayer(SecondReading, ConditionalDecoderLayer):
    """The same for Conditional DETR (ours; the paper has Deformable DETR only)."""

    def forward(
        self, tgt: Tensor, query_pos: Tensor, query_sine: Tensor, memory: Memory, blocks: Blocks
    ) -> tuple[Tensor, Tensor]:
        x = self.norm2(tgt + self.dropout2(self.read_memory(tgt, query_pos, query_sine, memory)))
        y = self.norm1(x + self.dropout1(self.compare_queries(x, query_pos, blocks)))
        return self.ffn(y), x


class SameReading:
    """What variant a adds to a layer: its output is handed out twice."""

    entry_points = ('second_reading',)

    def forward(self, *args: object) -> tuple[Tensor, Tensor]:
        tgt, _ = super().forward(*args)
        return tgt, tgt

    def second_reading(self, x: Tensor) -> Tensor:
        return x


class TwiceReadDecoderLayer(SameReading, DeformableDecoderLayer):
    """The usual layer, whose output two class heads read (variant a)."""


class TwiceReadConditionalDecoderLayer(SameReading, ConditionalDecoderLayer):
    """The same for Conditional DETR."""
