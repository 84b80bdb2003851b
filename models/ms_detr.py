"""
MS-DETR (arXiv:2401.03989, Sec. 3): the same decoder queries are supervised twice, one-to-one and one-to-many.

In training the heads read the queries a second time, in a one-to-many branch of each layer. Variant b (the
main one) reads them behind the cross-attention, which comes before the self-attention then, at inference too.
Variant a reads the output of the layer with other class heads.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .conditional_detr import ConditionalDecoderLayer
from .deformable_transformer import DeformableDecoderLayer
from .structures import Memory
from .transformer import Blocks


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

    def forward(
        self, tgt: Tensor, query_pos: Tensor, place: Tensor, memory: Memory, blocks: Blocks
    ) -> tuple[Tensor, Tensor]:
        """Run cross-attention, self-attention and feed-forward (`DecoderLayer`)."""
        x = self.attend_memory(tgt, query_pos, place, memory)
        return self.feed_forward(self.norm3, self.attend_queries(x, query_pos, blocks)), x

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
    """Variant a for Conditional DETR; the paper has Deformable DETR only."""


class DeformableDecoderLayerB(BranchB, DeformableDecoderLayer):
    """Variant b for Deformable DETR."""


class ConditionalDecoderLayerB(BranchB, ConditionalDecoderLayer):
    """Variant b for Conditional DETR."""
