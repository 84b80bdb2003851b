"""
The transformer of Deformable DETR (arXiv:2010.04159, Sec. 4): every token and every query reads a few places of
several feature maps. With box refinement (Sec. 4.2), each decoder layer corrects the boxes of the one before; in
two stages, the encoder's best proposals are the first boxes.

Shapes travel as plain integers. References, valid ratios and proposals are float32 whatever the model's
precision, as in the official code, and under autocast.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import ExactLinear, add_reference, inverse_sigmoid
from .ops.functions import exporting
from .ops.modules import MSDeformAttn
from .ops.modules.ms_deform_attn import level_sizes
from .parts import call_part
from .position_encoding import sine_embedding
from .structures import LayerOutput, Memory, Prediction, QueryGroup, attention_blocks, check_groups
from .transformer import Blocks, clones, compare_queries, read_twice


class DeformableEncoderLayer(nn.Module):
    """Post-norm; names and numbers of the sub-layers are the official ones."""

    def __init__(self, attention: MSDeformAttn, dim_feedforward: int = 1024, dropout: float = 0.1) -> None:
        super().__init__()
        d_model = attention.d_model
        self.self_attn = attention
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout2 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.dropout3 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(self, src: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """src: [B, S, C]; reference: [B, S, L, 2] centre of each token; memory: everything but the tokens."""
        attended = self.self_attn(
            src + memory.pos,
            reference,
            src,
            memory.shapes,
            input_padding_mask=memory.padding_mask,
            sizes=memory.sizes,
        )
        src = self.norm1(src + self.dropout1(attended))
        hidden = self.linear2(self.dropout2(F.relu(self.linear1(src))))
        return self.norm2(src + self.dropout3(hidden))


class DeformableDecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward. Norms are numbered as in the official code: 2, 1, 3."""

    def __init__(self, attention: MSDeformAttn, dim_feedforward: int = 1024, dropout: float = 0.1) -> None:
        super().__init__()
        d_model, nhead = attention.d_model, attention.n_heads
        self.cross_attn = attention
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout, batch_first=True)
        self.dropout2 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout3 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.dropout4 = nn.Dropout(dropout)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(
        self, tgt: Tensor, query_pos: Tensor, reference: Tensor, memory: Memory, blocks: Blocks
    ) -> tuple[Tensor, Tensor | None]:
        """tgt, query_pos: [B, Q, C]; reference: [B, Q, L, 2 or 4]; blocks: who attends to whom.

        Returns the new state, and the one that a second reading begins with (`models.ms_detr`), if any.
        """
        attended = compare_queries(self.self_attn, tgt + query_pos, tgt, blocks)
        tgt = self.norm2(tgt + self.dropout2(attended))
        tgt = self.norm1(tgt + self.dropout1(self.read_memory(tgt + query_pos, reference, memory)))
        return self.ffn(tgt), None

    def ffn(self, tgt: Tensor) -> Tensor:
        hidden = self.linear2(self.dropout3(F.relu(self.linear1(tgt))))
        return self.norm3(tgt + self.dropout4(hidden))

    def read_memory(self, query: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        return self.cross_attn(
            query,
            reference,
            memory.tokens,
            memory.shapes,
            input_padding_mask=memory.padding_mask,
            sizes=memory.sizes,
        )


class DeformableEncoder(nn.Module):
    def __init__(self, layer: nn.Module, num_layers: int) -> None:
        super().__init__()
        self.layers = clones(layer, num_layers)

    def forward(self, memory: Memory) -> Memory:
        centers = torch.cat(cell_centers(memory.shapes, memory.valid_ratios), dim=1)  # [B, S, 2]
        reference = centers[:, :, None] * memory.valid_ratios[:, None]  # [B, S, L, 2]
        src = memory.tokens
        for layer in self.layers:
            src = call_part(layer, src, reference, memory)
        return replace(memory, tokens=src)


class DeformableDecoder(nn.Module):
    """Decoder layers, with references that stay or that each layer refines.

    look_forward_twice: a layer's box loss also trains the refinement of the layer before (DINO, arXiv:2203.03605,
    Sec. 3.5).
    """

    eps = 1e-5  # of inverse sigmoids

    def __init__(self, layer: nn.Module, num_layers: int, look_forward_twice: bool = False) -> None:
        super().__init__()
        self.layers = clones(layer, num_layers)
        self.look_forward_twice = look_forward_twice

    def forward(
        self, groups: list[QueryGroup], memory: Memory, refine_with: nn.ModuleList | None = None
    ) -> list[LayerOutput]:
        """refine_with: box heads of the layers; None: the references stay."""
        self.check(groups)
        tgt = torch.cat([group.tgt for group in groups], dim=1)  # [B, Q, C]
        reference = torch.cat([group.reference_points for group in groups], dim=1)  # [B, Q, 2 or 4]
        blocks, outputs = attention_blocks(groups), []
        logits = shown = inverse_sigmoid(reference, self.eps)  # what is refined, and what boxes are added to
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            ratios = memory.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)  # [B, L, 2 or 4]
            scaled = reference[:, :, None] * ratios[:, None]  # [B, Q, L, 2 or 4]
            query_pos = self.query_pos(groups, scaled)
            tgt, between = call_part(layer, tgt, query_pos, scaled, memory, blocks)
            delta = None if refine_with is None else self.refinement(refine_with[index], tgt, last)
            second = read_twice(layer, between, groups) if self.training else None
            outputs.append(self.output(tgt, shown, delta, second))
            if delta is not None and not last:
                refined = add_reference(delta, logits)  # [B, Q, 4]
                reference = refined.detach()
                logits = inverse_sigmoid(reference, self.eps)
                shown = inverse_sigmoid(refined, self.eps) if self.look_forward_twice else logits
        return outputs

    def check(self, groups: list[QueryGroup]) -> None:
        check_groups(groups, self, needs=('query_pos', 'reference_points'))

    def query_pos(self, groups: list[QueryGroup], scaled: Tensor) -> Tensor:
        """Positions of all queries, [B, Q, C]; scaled: [B, Q, L, 2 or 4] their references on every level."""
        return torch.cat([group.query_pos for group in groups], dim=1)

    def refinement(self, box_head: nn.Module, tgt: Tensor, last: bool) -> Tensor | None:
        """What a layer's boxes are refined by, [B, Q, 4]."""
        return box_head(tgt)

    def output(self, tgt: Tensor, shown: Tensor, delta: Tensor | None, second: Tensor | None) -> LayerOutput:
        """What the heads read."""
        return LayerOutput(tgt, shown, delta, second)


class DeformableTransformer(nn.Module):
    """Feature maps to `Memory`, memory to proposals, query groups over memory to layer outputs.

    two_stage: has what turns proposals into queries; otherwise what turns learned positions into reference
    points.
    """

    places_proposals = True  # has what gives proposals their query positions

    def __init__(
        self,
        encoder: DeformableEncoder,
        decoder: DeformableDecoder,
        d_model: int,
        num_levels: int,
        two_stage: bool = False,
        temperature: float = 10000,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.encoder = encoder
        self.decoder = decoder
        self.level_embed = nn.Parameter(torch.empty(num_levels, d_model))
        if two_stage:
            self.enc_output = nn.Linear(d_model, d_model)
            self.enc_output_norm = nn.LayerNorm(d_model)
            if self.places_proposals:
                self.pos_trans = nn.Linear(2 * d_model, 2 * d_model)
                self.pos_trans_norm = nn.LayerNorm(2 * d_model)
        else:
            self.reference_points = ExactLinear(d_model, 2)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module._reset_parameters()
        if hasattr(self, 'reference_points'):
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)

    def encode(
        self, srcs: list[Tensor], masks: list[Tensor], pos: list[Tensor], pixel_mask: Tensor | None = None
    ) -> Memory:
        """Levels, finest first. srcs, pos: [B, C, H, W] each; masks: [B, H, W], True = padding; pixel_mask: that of
        the images.
        """
        shapes = [tuple(src.shape[-2:]) for src in srcs]
        valid_ratios = torch.stack([valid_ratio(mask) for mask in masks], dim=1)  # [B, L, 2]
        level_pos = [tokens(encoding) + embed for encoding, embed in zip(pos, self.level_embed, strict=True)]
        memory = Memory(
            tokens=torch.cat([tokens(src) for src in srcs], dim=1),
            padding_mask=torch.cat([mask.flatten(1) for mask in masks], dim=1),
            shapes=shapes,
            pos=torch.cat(level_pos, dim=1),
            valid_ratios=valid_ratios,
            sizes=level_sizes(shapes, valid_ratios),
            pixel_mask=pixel_mask,
        )
        return self.encoder(memory)

    def propose(
        self, memory: Memory, class_head: ExactLinear, box_head: nn.Module, num_proposals: int
    ) -> tuple[Tensor, Prediction | None]:
        """First stage: the boxes [B, num_proposals, 4] with the best logit of class 0, which stands for 'object'
        here; gradients do not pass. While training also the prediction of every token, kind 'enc'.

        ValueError: fewer tokens than proposals.
        """
        features, anchors = self.proposal_features(memory, num_proposals)
        if self.training:
            boxes = (box_head(features) + anchors).sigmoid()
            everywhere = Prediction(class_head(features), boxes, 'enc', anchors=anchors.sigmoid())
            best = everywhere.logits[..., 0].topk(num_proposals, dim=1).indices
            return pick(everywhere.boxes, best).detach(), everywhere
        # At inference only the selected tokens need a box, and none of them other classes.
        best = class_head.first(features).topk(num_proposals, dim=1).indices
        return (box_head(pick(features, best)) + pick(anchors, best)).sigmoid(), None

    def proposal_features(self, memory: Memory, num_proposals: int) -> tuple[Tensor, Tensor]:
        """What proposals are read from, [B, S, C], and the logits of the box around each cell, [B, S, 4]."""
        num_tokens = memory.tokens.shape[1]
        if not exporting() and num_tokens < num_proposals:
            raise ValueError(
                f'{num_proposals} proposals, but the feature maps {memory.shapes} have {num_tokens} cells: lower '
                '--num_queries (or what training adds to it), or use larger images'
            )
        anchors = proposal_logits(memory)  # infinite where there is no proposal
        absent = anchors[..., :1].isinf()
        return self.enc_output_norm(self.enc_output(memory.tokens.masked_fill(absent, 0))), anchors

    def queries_from_proposals(self, boxes: Tensor, content: Tensor | None) -> QueryGroup:
        """Second stage: queries that begin at the proposals. boxes: [B, Q, 4]; content: [Q, C] learned
        (`--mixed_selection`, DINO Sec. 3.4), or None: from the boxes as well.
        """
        d_model = self.level_embed.shape[-1]
        embedding = sine_embedding(boxes, d_model // 2, self.temperature).to(boxes.dtype)  # [B, Q, 2 C]
        query_pos, tgt = self.pos_trans_norm(self.pos_trans(embedding)).split(d_model, dim=-1)
        if content is not None:
            tgt = content.expand(boxes.shape[0], -1, -1)
        return QueryGroup('all', tgt, query_pos, boxes)

    def queries_from_embeddings(self, query_embed: Tensor, batch_size: int) -> QueryGroup:
        """One stage: learned queries. query_embed: [Q, 2 C], position and content."""
        query_pos, tgt = query_embed.expand(batch_size, -1, -1).chunk(2, dim=-1)
        return QueryGroup('all', tgt, query_pos, self.reference_points(query_pos).sigmoid())

    def decode(
        self, groups: list[QueryGroup], memory: Memory, refine_with: nn.ModuleList | None = None
    ) -> list[LayerOutput]:
        return self.decoder(groups, memory, refine_with)


def tokens(feature_map: Tensor) -> Tensor:
    """[B, C, H, W] to [B, H W, C]."""
    return feature_map.flatten(2).transpose(1, 2)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Rows of [B, S, n] by index [B, K]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def valid_sizes(mask: Tensor) -> Tensor:
    """[B, 2] columns and rows of a padding mask [B, H, W] that are not padding."""
    return torch.stack([(~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)], dim=-1)


def valid_ratio(mask: Tensor) -> Tensor:
    """[B, 2] share of width and height that is not padding, float32."""
    width, height = valid_sizes(mask).float().unbind(-1)
    return torch.stack([width / mask.shape[2], height / mask.shape[1]], dim=-1)


def cell_grid(height: int, width: int, device: torch.device) -> Tensor:
    """[H W, 2] x, y of the centres of a map's cells, in cells, float32."""
    y = torch.arange(height, dtype=torch.float32, device=device) + 0.5
    x = torch.arange(width, dtype=torch.float32, device=device) + 0.5
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1).flatten(0, 1)


def cell_centers(shapes: list[tuple[int, int]], valid_ratios: Tensor) -> list[Tensor]:
    """For each level [B, H W, 2] x, y of its cells' centres; 1 is the end of the valid part."""
    return [
        cell_grid(height, width, ratios.device)
        / torch.stack([ratios[:, 0] * width, ratios[:, 1] * height], dim=-1)[:, None]
        for (height, width), ratios in zip(shapes, valid_ratios.unbind(1), strict=True)
    ]


def proposal_logits(memory: Memory) -> Tensor:
    """[B, S, 4] a box around every cell, logits of cxcywh, float32 (Sec. A.4).

    Infinite on padding and where a box comes close to 0 or 1.
    """
    start, levels = 0, []
    for level, (height, width) in enumerate(memory.shapes):
        mask = memory.padding_mask[:, start : start + height * width].unflatten(1, (height, width))
        centers = cell_grid(height, width, mask.device) / valid_sizes(mask)[:, None]
        size = torch.full_like(centers, 0.05 * 2.0**level)
        levels.append(torch.cat([centers, size], dim=-1))
        start += height * width
    boxes = torch.cat(levels, dim=1)  # [B, S, 4]
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True) & ~memory.padding_mask[..., None]
    return torch.log(boxes / (1 - boxes)).masked_fill(~valid, float('inf'))
