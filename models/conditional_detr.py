"""
The decoder of Conditional DETR (arXiv:2108.06152, Sec. 3.3).

Each head of its cross-attention compares content with content and position with position, in separate
channels. The rest of the detector is DETR's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import MLP, ExactMLP, LogitBoxes
from .position_encoding import sine_embedding
from .structures import LayerOutput, Memory, QueryGroup, attention_blocks, join_groups
from .transformer import Blocks, DecoderLayer, clones, run_o2m_branch
from .units import call_unit


class BareAttention(nn.Module):
    """Multi-head attention without input projections.

    It computes softmax(q k / sqrt(d)) v and applies `out_proj`; d is the number of channels of a head in q
    and k, which may differ from that in v.
    """

    def __init__(self, d_model: int, nhead: int, dropout: float) -> None:
        super().__init__()
        self.nhead = nhead
        self.dropout = dropout
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.zeros_(self.out_proj.bias)

    def split(self, x: Tensor) -> Tensor:
        """Split [B, N, C] into heads [B, M, N, C / M]."""
        return x.unflatten(-1, (self.nhead, -1)).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Attend with q, k and v of [B, M, N, width]; return [B, Q, C].

        Args:
            hidden: bool, broadcast to [B, M, Q, K]; True = may not attend.
        """
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if hidden is None else ~hidden,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))


class ConditionalDecoderLayer(DecoderLayer):
    """A layer with separate projections of content and position.

    Names are the official ones: sa_* belong to the self-attention, ca_* to the cross-attention. Only the
    first layer of a decoder has `ca_qpos_proj`, which adds the learned query position to the content.
    """

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__(dropout)
        for name in ('qcontent', 'qpos', 'kcontent', 'kpos', 'v'):
            self.add_module(f'sa_{name}_proj', nn.Linear(d_model, d_model))
        self.self_attn = BareAttention(d_model, nhead, dropout)
        for name in ('qcontent', 'qpos', 'kcontent', 'kpos', 'v', 'qpos_sine'):
            self.add_module(f'ca_{name}_proj', nn.Linear(d_model, d_model))
        self.cross_attn = BareAttention(d_model, nhead, dropout)
        self.add_feed_forward(d_model, dim_feedforward)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d_model) for _ in range(3))

    def attend_queries(self, tgt: Tensor, query_pos: Tensor, blocks: Blocks) -> Tensor:
        q = self.self_attn.split(self.sa_qcontent_proj(tgt) + self.sa_qpos_proj(query_pos))
        k = self.self_attn.split(self.sa_kcontent_proj(tgt) + self.sa_kpos_proj(query_pos))
        v = self.self_attn.split(self.sa_v_proj(tgt))
        attended = [
            self.self_attn(q[:, :, block.queries], block.pick(k, dim=2), block.pick(v, dim=2), block.hidden)
            for block in blocks
        ]
        joined = attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)
        return self.add(self.norm1, tgt, joined)

    def attend_memory(self, tgt: Tensor, query_pos: Tensor, query_sine: Tensor, memory: Memory) -> Tensor:
        """query_sine: [B, Q, C] sine embedding of the reference points."""
        split = self.cross_attn.split
        q, k = self.ca_qcontent_proj(tgt), self.ca_kcontent_proj(memory.tokens)
        k_pos = self.ca_kpos_proj(memory.pos)
        if self.ca_qpos_proj is not None:
            q, k = q + self.ca_qpos_proj(query_pos), k + k_pos
        q = torch.cat([split(q), split(self.ca_qpos_sine_proj(query_sine))], dim=-1)  # [B, M, Q, 2 C / M]
        k = torch.cat([split(k), split(k_pos)], dim=-1)
        v, hidden = split(self.ca_v_proj(memory.tokens)), memory.padding_mask[:, None, None]
        return self.add(self.norm2, tgt, self.cross_attn(q, k, v, hidden))


class ConditionalDecoder(nn.Module):
    """Decoder layers that share one reference point per query, computed from its learned position.

    From the second layer on, the sine embedding of the reference is scaled by a function of the state
    (official code; the paper scales it in every layer). The reference never changes, and no gradient is cut.
    """

    box_code = LogitBoxes()

    def __init__(
        self,
        layer: ConditionalDecoderLayer,
        num_layers: int,
        norm: nn.LayerNorm,
        temperature: float = 10000,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        d_model = norm.normalized_shape[0]
        self.layers = clones(layer, num_layers)
        for later in self.layers[1:]:
            later.ca_qpos_proj = None
        self.norm = norm
        # Only later layers use it; DDP refuses parameters without a gradient.
        self.query_scale = MLP(d_model, d_model, d_model, num_layers=2) if num_layers > 1 else None
        self.ref_point_head = ExactMLP(d_model, d_model, 2, num_layers=2)

    def forward(self, groups: list[QueryGroup], memory: Memory) -> list[LayerOutput]:
        tgt, query_pos = join_groups(groups, self, 'query_pos')  # [B, Q, C]
        points = self.box_code.decode(self.ref_point_head(query_pos))  # [B, Q, 2] x, y
        y_first = points.flip(-1)
        sine = sine_embedding(y_first, tgt.shape[-1] // 2, self.temperature).to(tgt.dtype)  # [B, Q, C]
        blocks, states, o2m_states = attention_blocks(groups), [], []
        for index, layer in enumerate(self.layers):
            query_sine = sine if index == 0 else sine * self.query_scale(tgt)
            tgt, o2m_state = call_unit(layer, tgt, query_pos, query_sine, memory, blocks)
            hs_o2m = run_o2m_branch(layer, o2m_state, groups) if self.training else None
            states.append(tgt)
            o2m_states.append(None if hs_o2m is None else self.norm(hs_o2m))
        reference = self.box_code.encode(points)
        return [
            LayerOutput(hs, reference, hs_o2m=hs_o2m)
            for hs, hs_o2m in zip(self.norm(torch.stack(states)), o2m_states, strict=True)
        ]
