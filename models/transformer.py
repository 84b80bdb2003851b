"""
The dense transformer of DETR (arXiv:2005.12872, Sec. A.3): attention over every cell of one feature map.

Tensors are batch first. Parameter names are the official ones. Every layer adds position encodings to queries
and keys, never to values.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import LogitBoxes
from .structures import AttentionBlock, LayerOutput, Memory, QueryGroup, attention_blocks, join_groups
from .units import call_unit

Blocks = list[AttentionBlock]


def clones(layer: nn.Module, num_layers: int) -> nn.ModuleList:
    """Copy a layer `num_layers` times. Biases stay equal, since only weights are initialised later."""
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


def run_o2m_branch(layer: nn.Module, state: Tensor | None, groups: list[QueryGroup]) -> Tensor | None:
    """Run the one-to-many branch of a layer (`models.ms_detr`) for the inference group.

    state: [B, Q of all groups, C], which the branch reads; None: there is no branch.
    """
    if state is None:
        return None
    return call_unit(layer, state[:, : groups[0].tgt.shape[1]], method=layer.o2m_branch)


class SubLayers(nn.Module):
    """What layers of encoders and decoders share: residual sums, one dropout, and a feed-forward block.

    Norms stand behind the residual sums (post-norm), or in front of the sub-layers (`pre_norm`).
    """

    def __init__(self, dropout: float, pre_norm: bool = False) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def add_feed_forward(self, d_model: int, dim_feedforward: int) -> None:
        """Create the block's linear layers. A layer calls this where the official one creates them."""
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)

    def before(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Return what a sub-layer reads of the state x."""
        return norm(x) if self.pre_norm else x

    def add(self, norm: nn.Module, x: Tensor, update: Tensor) -> Tensor:
        """Add the output of a sub-layer to the state x."""
        x = x + self.dropout(update)
        return x if self.pre_norm else norm(x)

    def feed_forward(self, norm: nn.Module, x: Tensor) -> Tensor:
        hidden = self.dropout(F.relu(self.linear1(self.before(norm, x))))
        return self.add(norm, x, self.linear2(hidden))


class TransformerEncoderLayer(SubLayers):
    """Self-attention and feed-forward."""

    def __init__(
        self, d_model: int, nhead: int, dim_feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__(dropout, pre_norm)
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout, batch_first=True)
        self.add_feed_forward(d_model, dim_feedforward)
        self.norm1, self.norm2 = (nn.LayerNorm(d_model) for _ in range(2))

    def forward(self, src: Tensor, pos: Tensor, padding_mask: Tensor) -> Tensor:
        """Run the layer; src, pos: [B, S, C]; padding_mask: [B, S], True = padding."""
        x = self.before(self.norm1, src)
        q = k = x + pos
        attended = self.self_attn(q, k, x, key_padding_mask=padding_mask, need_weights=False)[0]
        return self.feed_forward(self.norm2, self.add(self.norm1, src, attended))


class TransformerEncoder(nn.Module):
    """Encoder layers, with a norm at the end for pre-norm."""

    def __init__(self, layer: nn.Module, num_layers: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = clones(layer, num_layers)
        self.norm = norm

    def forward(self, src: Tensor, pos: Tensor, padding_mask: Tensor) -> Tensor:
        for layer in self.layers:
            src = call_unit(layer, src, pos, padding_mask)
        return src if self.norm is None else self.norm(src)


class DecoderLayer(SubLayers):
    """Self-attention, cross-attention and feed-forward; `norm3` belongs to the last."""

    def forward(
        self, tgt: Tensor, query_pos: Tensor, place: Tensor, memory: Memory, blocks: Blocks
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer.

        Args:
            tgt, query_pos: [B, Q, C].
            place: positions that the cross-attention reads, in the form of each family.
            blocks: which queries attend to which (`attention_blocks`).

        Returns:
            The new state, and the state that a one-to-many branch reads (`models.ms_detr`); here None.
        """
        tgt = self.attend_queries(tgt, query_pos, blocks)
        tgt = self.attend_memory(tgt, query_pos, place, memory)
        return self.feed_forward(self.norm3, tgt), None

    def attend_queries(self, tgt: Tensor, query_pos: Tensor, blocks: Blocks) -> Tensor:
        """Return the state after the self-attention."""
        raise NotImplementedError

    def attend_memory(self, tgt: Tensor, query_pos: Tensor, place: Tensor, memory: Memory) -> Tensor:
        """Return the state after the cross-attention."""
        raise NotImplementedError


class TransformerDecoderLayer(DecoderLayer):
    """The layer of DETR."""

    def __init__(
        self, d_model: int, nhead: int, dim_feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__(dropout, pre_norm)
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(d_model, nhead, dropout, batch_first=True)
        self.add_feed_forward(d_model, dim_feedforward)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d_model) for _ in range(3))

    def attend_queries(self, tgt: Tensor, query_pos: Tensor, blocks: Blocks) -> Tensor:
        x = self.before(self.norm1, tgt)
        return self.add(self.norm1, tgt, self_attention(self.self_attn, x + query_pos, x, blocks))

    def attend_memory(self, tgt: Tensor, query_pos: Tensor, key: Tensor, memory: Memory) -> Tensor:
        """key: [B, S, C] memory tokens with their position encodings added."""
        query = self.before(self.norm2, tgt) + query_pos
        attended = self.multihead_attn(
            query, key, memory.tokens, key_padding_mask=memory.padding_mask, need_weights=False
        )[0]
        return self.add(self.norm2, tgt, attended)


class TransformerDecoder(nn.Module):
    """Decoder layers. The heads read normed states; the next layer gets the state without the norm."""

    box_code = LogitBoxes()

    def __init__(self, layer: nn.Module, num_layers: int, norm: nn.Module) -> None:
        super().__init__()
        self.layers = clones(layer, num_layers)
        self.norm = norm

    def forward(self, groups: list[QueryGroup], memory: Memory) -> list[LayerOutput]:
        tgt, query_pos = join_groups(groups, self, 'query_pos')  # [B, Q, C]
        key, blocks, states = memory.tokens + memory.pos, attention_blocks(groups), []
        for layer in self.layers:
            tgt, _ = call_unit(layer, tgt, query_pos, key, memory, blocks)
            states.append(tgt)
        return [LayerOutput(hs) for hs in self.norm(torch.stack(states))]


class Transformer(nn.Module):
    """Encoder and decoder: `encode` turns a feature map into `Memory`, the decoder's input."""

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
