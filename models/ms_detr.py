"""
MS-DETR (arXiv:2401.03989, Sec. 3): the same decoder queries are supervised twice, one-to-one and one-to-many.

While training the heads read the queries a second time, in a one-to-many branch of each layer. Variant b (the
main one) reads them after the cross-attention, which therefore comes before the self-attention, at inference
too. Variant a reads the layer's output with class heads of its own.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .conditional_detr import ConditionalDecoderLayer
from .deformable_transformer import DeformableDecoderLayer
from .structures import Memory
from .transformer import Blocks, self_attention


class BranchA:
    """A mixin of decoder layers for variant a, whose branch reads the layer's output."""

    entry_points = ('o2m_branch',)  # methods called besides forward, which FSDP must know

    def forward(self, *args: object) -> tuple[Tensor, Tensor]:
        tgt, _ = super().forward(*args)
        return tgt, tgt

    def o2m_branch(self, x: Tensor) -> Tensor:
        return x


class BranchB:
    """A mixin of decoder layers for variant b, with or without a feed-forward block in the branch.

    Parameter names are the official ones; the block belongs to `--use_aux_ffn`.
    """

    reads_memory_first = True
    has_aux_ffn = False
    entry_points = ('o2m_branch',)

    def add_aux_ffn(self, d_model: int, dim_feedforward: int) -> None:
        self.has_aux_ffn = True
        self.linear3 = nn.Linear(d_model, dim_feedforward)
        self.linear4 = nn.Linear(dim_feedforward, d_model)
        self.norm4 = nn.LayerNorm(d_model)

    def o2m_branch(self, x: Tensor) -> Tensor:
        """Turn the state after the cross-attention into what the heads read, [B, Q, C]."""
        if not self.has_aux_ffn:
            return x
        return self.add(self.norm4, x, self.linear4(self.dropout(F.relu(self.linear3(x)))))


class DeformableDecoderLayerA(BranchA, DeformableDecoderLayer):
    """Variant a for Deformable DETR."""


class ConditionalDecoderLayerA(BranchA, ConditionalDecoderLayer):
    """Variant a for Conditional DETR (ours; the paper has Deformable DETR only)."""


class DeformableDecoderLayerB(BranchB, DeformableDecoderLayer):
    """Variant b for Deformable DETR: cross-attention, self-attention, feed-forward."""

    def forward(
        self, tgt: Tensor, query_pos: Tensor, reference: Tensor, memory: Memory, blocks: Blocks
    ) -> tuple[Tensor, Tensor]:
        x = self.add(self.norm1, tgt, self.cross_attention(tgt + query_pos, reference, memory))
        y = self.add(self.norm2, x, self_attention(self.self_attn, x + query_pos, x, blocks))
        return self.feed_forward(self.norm3, y), x


class ConditionalDecoderLayerB(BranchB, ConditionalDecoderLayer):
    """Variant b for Conditional DETR."""

    def forward(
        self, tgt: Tensor, query_pos: Tensor, query_sine: Tensor, memory: Memory, blocks: Blocks
    ) -> tuple[Tensor, Tensor]:
        x = self.add(self.norm2, tgt, self.cross_attention(tgt, query_pos, query_sine, memory))
        y = self.add(self.norm1, x, self.self_attention(x, query_pos, blocks))
        return self.feed_forward(self.norm3, y), x
