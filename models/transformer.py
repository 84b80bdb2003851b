"""
The dense transformer of DETR (arXiv:2005.12872, Sec. A.3): attention over every cell of one feature map.

Tensors are batch first. Parameter names are the official ones. Every layer adds the position encodings to queries and
keys again, never to values.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import call_part
from .structures import AttentionBlock, LayerOutput, Memory, QueryGroup, attention_blocks, check_groups

Blocks = list[AttentionBlock]


def clones(layer: nn.Module, num_layers: int) -> nn.ModuleList:
    """Copy one layer `num_layers` times. Parameters that are not initialised again later (biases) are equal in all
    copies, as in the official code.
    """
    return nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))


def self_attention(attention: nn.MultiheadAttention, q: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """Attend among queries; q (queries and keys) and v: [B, Q, C]; blocks: which queries attend to which."""
    attended = [
        attention(
            q[:, block.queries], block.pick(q), block.pick(v), attn_mask=block.hidden, need_weights=False
        )[0]
        for block in blocks
    ]
    return attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)


def read_twice(layer: nn.Module, between: Tensor | None, groups: list[QueryGroup]) -> Tensor | None:
    """Return the second reading of the inference group, [B, Q, C], or None if a layer has none (`models.ms_detr`).

    between: state of the queries of all groups that the second reading starts from.
    """
    if between is None:
        return None
    own = between[:, : groups[0].tgt.shape[1]]
    return call_part(layer, own, method=layer.second_reading)


class SubLayers(nn.Module):
    """A base of layers with norms behind the residual sums (post-norm), or in front of the sub-layers (`pre_norm`)."""

    def __init__(self, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm

    def before(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.pre_norm else x

    def after(self, norm: nn.Module, x: Tensor) -> Tensor:
        return x if self.pre_norm else norm(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


class TransformerEncoderLayer(SubLayers):
    """Self-attention and feed-forward."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        pre_norm: bool = False,
    ) -> None:
        super().__init__(pre_norm)
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout, batch_first=True)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, src: Tensor, pos: Tensor, padding_mask: Tensor) -> Tensor:
        """Run the layer; src, pos: [B, S, C]; padding_mask: [B, S], True = padding."""
        x = self.before(self.norm1, src)
        q = k = x + pos
        attended = self.self_attn(q, k, x, key_padding_mask=padding_mask, need_weights=False)[0]
        src = self.after(self.norm1, src + self.dropout1(attended))
        x = self.before(self.norm2, src)
        return self.after(self.norm2, src + self.dropout2(self.feed_forward(x)))


class TransformerEncoder(nn.Module):
    """Encoder layers, followed by a norm in the case of pre-norm."""

    def __init__(self, layer: nn.Module, num_layers: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = clones(layer, num_layers)
        self.norm = norm

    def forward(self, src: Tensor, pos: Tensor, padding_mask: Tensor) -> Tensor:
        for layer in self.layers:
            src = call_part(layer, src, pos, padding_mask)
        return src if self.norm is None else self.norm(src)


class TransformerDecoderLayer(SubLayers):
    """Self-attention, cross-attention and feed-forward."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        pre_norm: bool = False,
    ) -> None:
        super().__init__(pre_norm)
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(d_model, nhead, dropout, batch_first=True)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)

    def forward(self, tgt: Tensor, query_pos: Tensor, memory: Memory, key: Tensor, blocks: Blocks) -> Tensor:
        """Run the layer.

        Args:
            tgt, query_pos: [B, Q, C].
            key: [B, S, C] memory tokens with their position encodings added.
            blocks: which queries attend to which (`attention_blocks`).
        """
        x = self.before(self.norm1, tgt)
        attended = self_attention(self.self_attn, x + query_pos, x, blocks)
        tgt = self.after(self.norm1, tgt + self.dropout1(attended))
        x = self.before(self.norm2, tgt)
        attended = self.multihead_attn(
            x + query_pos, key, memory.tokens, key_padding_mask=memory.padding_mask, need_weights=False
        )[0]
        tgt = self.after(self.norm2, tgt + self.dropout2(attended))
        x = self.before(self.norm3, tgt)
        return self.after(self.norm3, tgt + self.dropout3(self.feed_forward(x)))


class TransformerDecoder(nn.Module):
    """Decoder layers. The heads read normed states; the next layer gets the state without the norm."""

    def __init__(self, layer: nn.Module, num_layers: int, norm: nn.Module) -> None:
        super().__init__()
        self.layers = clones(layer, num_layers)
        self.norm = norm

    def forward(self, groups: list[QueryGroup], memory: Memory) -> list[LayerOutput]:
        check_groups(groups, self, needs=('query_pos',), ignores=('reference_points',))
        tgt = torch.cat([group.tgt for group in groups], dim=1)  # [B, Q, C]
        query_pos = torch.cat([group.query_pos for group in groups], dim=1)
        key, blocks, states = memory.tokens + memory.pos, attention_blocks(groups), []
        for layer in self.layers:
            tgt = call_part(layer, tgt, query_pos, memory, key, blocks)
            states.append(tgt)
        return [LayerOutput(hs) for hs in self.norm(torch.stack(states))]


class Transformer(nn.Module):
    """Encoder and decoder: `encode` turns a feature map into `Memory`, `decode` runs query groups over it."""

    def __init__(self, encoder: TransformerEncoder, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def encode(self, src: Tensor, mask: Tensor, pos: Tensor) -> Memory:
        """Run the encoder; src, pos: [B, C, H, W]; mask: [B, H, W], True = padding."""
        shape = tuple(src.shape[-2:])
        padding_mask = mask.flatten(1)  # [B, S]
        pos = pos.flatten(2).transpose(1, 2)  # [B, S, C]
        tokens = self.encoder(src.flatten(2).transpose(1, 2), pos, padding_mask)
        return Memory(tokens, padding_mask, [shape], pos)

    def decode(self, groups: list[QueryGroup], memory: Memory) -> list[LayerOutput]:
        return self.decoder(groups, memory)
