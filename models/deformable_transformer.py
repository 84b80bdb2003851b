"""
The transformer of Deformable DETR (arXiv:2010.04159, Sec. 4): tokens and queries sample a few points of
several feature maps.

With box refinement (Sec. 4.2), each decoder layer corrects the boxes of the layer before. In two stages, the
encoder's best proposals are the first boxes.

Shapes are plain integers. Reference points, valid ratios and proposals are float32 whatever the model's
precision and under autocast, as in the official code.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from .heads import ExactLinear, LogitBoxes
from .ops.modules import MSDeformAttn, level_sizes
from .position_encoding import sine_embedding
from .structures import LayerOutput, Memory, QueryGroup, attention_blocks, join_groups
from .transformer import Blocks, DecoderLayer, SubLayers, clones, run_o2m_branch, self_attention
from .units import call_unit


class DeformableEncoderLayer(SubLayers):
    """Self-attention and feed-forward, with post-norm. Sub-layers have their official names and numbers."""

    def __init__(self, attention: MSDeformAttn, dim_feedforward: int, dropout: float) -> None:
        super().__init__(dropout)
        self.self_attn = attention
        self.norm1 = nn.LayerNorm(attention.d_model)
        self.add_feed_forward(attention.d_model, dim_feedforward)
        self.norm2 = nn.LayerNorm(attention.d_model)

    def forward(self, src: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """Run the layer on src [B, S, C].

        Args:
            reference: [B, S, L, 2] centre of each token.
            memory: its tokens are not read, only what describes them.
        """
        attended = self.self_attn(
            src + memory.pos,
            reference,
            src,
            memory.shapes,
            input_padding_mask=memory.padding_mask,
            sizes=memory.sizes,
        )
        return self.feed_forward(self.norm2, self.add(self.norm1, src, attended))


class DeformableDecoderLayer(DecoderLayer):
    """The layer of Deformable DETR; its norms have the official numbers, `norm2` for the self-attention."""

    def __init__(self, attention: MSDeformAttn, dim_feedforward: int, dropout: float) -> None:
        super().__init__(dropout)
        d_model, nhead = attention.d_model, attention.n_heads
        self.cross_attn = attention
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(d_model)
        self.add_feed_forward(d_model, dim_feedforward)
        self.norm3 = nn.LayerNorm(d_model)

    def attend_queries(self, tgt: Tensor, query_pos: Tensor, blocks: Blocks) -> Tensor:
        return self.add(self.norm2, tgt, self_attention(self.self_attn, tgt + query_pos, tgt, blocks))

    def attend_memory(self, tgt: Tensor, query_pos: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """reference: [B, Q, L, 2 or 4] points or boxes."""
        attended = self.cross_attn(
            tgt + query_pos,
            reference,
            memory.tokens,
            memory.shapes,
            input_padding_mask=memory.padding_mask,
            sizes=memory.sizes,
        )
        return self.add(self.norm1, tgt, attended)


class DeformableEncoder(nn.Module):
    def __init__(self, layer: nn.Module, num_layers: int) -> None:
        super().__init__()
        self.layers = clones(layer, num_layers)

    def forward(self, memory: Memory) -> Memory:
        centers = cell_centers(memory.shapes, memory.valid_ratios)  # [B, S, 2]
        reference = centers[:, :, None] * memory.valid_ratios[:, None]  # [B, S, L, 2]
        src = memory.tokens
        for layer in self.layers:
            src = call_unit(layer, src, reference, memory)
        return replace(memory, tokens=src)


class DeformableDecoder(nn.Module):
    """Decoder layers, with reference points that are fixed or refined by each layer.

    look_forward_twice: let the box loss of a layer also train the refinement of the layer before (DINO,
    arXiv:2203.03605, Sec. 3.5).
    """

    box_code = LogitBoxes()
    positions_from_boxes = False  # `query_pos` computes the positions of queries, in place of query groups
    proposals_by_class = False  # chosen by the best logit of any class (`models.deformable_detr.FirstStage`)

    def __init__(self, layer: nn.Module, num_layers: int, look_forward_twice: bool = False) -> None:
        super().__init__()
        self.layers = clones(layer, num_layers)
        self.look_forward_twice = look_forward_twice

    def forward(
        self, groups: list[QueryGroup], memory: Memory, refine_with: nn.ModuleList | None = None
    ) -> list[LayerOutput]:
        """Return the output of every layer.

        refine_with: box heads of the layers; None keeps the reference points.
        """
        fields = ('reference_points',) if self.positions_from_boxes else ('reference_points', 'query_pos')
        # [B, Q, C], [B, Q, 2 or 4], and without `positions_from_boxes` [B, Q, C].
        tgt, reference, *positions = join_groups(groups, self, *fields)
        blocks, outputs = attention_blocks(groups), []
        # The layers refine `code`; the box heads add their output to `head_code`.
        code = head_code = self.box_code.encode(reference)
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            ratios = memory.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)  # [B, L, 2 or 4]
            scaled = reference[:, :, None] * ratios[:, None]  # [B, Q, L, 2 or 4]
            query_pos = self.query_pos(scaled) if self.positions_from_boxes else positions[0]
            tgt, o2m_state = call_unit(layer, tgt, query_pos, scaled, memory, blocks)
            delta = None if refine_with is None else self.refinement(refine_with[index], tgt, last)
            hs_o2m = run_o2m_branch(layer, o2m_state, groups) if self.training else None
            outputs.append(self.output(tgt, head_code, delta, hs_o2m))
            if delta is not None and not last:
                refined = self.box_code.decode(delta, code)  # [B, Q, 4]
                reference = refined.detach()
                code = self.box_code.encode(reference)
                head_code = self.box_code.encode(refined) if self.look_forward_twice else code
        return outputs

    def query_pos(self, scaled: Tensor) -> Tensor:
        """Compute the positions of all queries, [B, Q, C], in a decoder with `positions_from_boxes`.

        scaled: [B, Q, L, 4], boxes in units of each level.
        """
        raise NotImplementedError

    def refinement(self, box_head: nn.Module, tgt: Tensor, last: bool) -> Tensor | None:
        """Return what the box head adds to the reference points of a layer, [B, Q, 4]."""
        return box_head(tgt)

    def output(self, tgt: Tensor, code: Tensor, delta: Tensor | None, hs_o2m: Tensor | None) -> LayerOutput:
        """Return what the heads read."""
        return LayerOutput(tgt, code, delta, hs_o2m)


class DeformableTransformer(nn.Module):
    """Encoder and decoder: `encode` turns feature maps into `Memory`, the decoder's input.

    two_stage: create the layers that turn tokens into proposals (`models.deformable_detr`) and these into
        queries, instead of the one that turns learned positions into reference points.
    """

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
            if not decoder.positions_from_boxes:
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
        """Run the encoder over all levels, finest first.

        Args:
            srcs, pos: feature maps and position encodings, [B, C, H, W] each.
            masks: [B, H, W] each, True = padding.
            pixel_mask: [B, H, W] padding mask of the images.
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

    def queries_from_proposals(self, boxes: Tensor, content: Tensor | None) -> QueryGroup:
        """Make queries that start at proposals (second stage).

        Args:
            boxes: [B, Q, 4].
            content: [Q, C] learned (`--mixed_selection`, DINO Sec. 3.4); None: computed from the boxes, as
                the positions.
        """
        if self.decoder.positions_from_boxes:
            return QueryGroup('all', content.expand(boxes.shape[0], -1, -1), reference_points=boxes)
        d_model = self.level_embed.shape[-1]
        embedding = sine_embedding(boxes, d_model // 2, self.temperature).to(boxes.dtype)  # [B, Q, 2 C]
        query_pos, tgt = self.pos_trans_norm(self.pos_trans(embedding)).split(d_model, dim=-1)
        if content is not None:
            tgt = content.expand(boxes.shape[0], -1, -1)
        return QueryGroup('all', tgt, query_pos, boxes)

    def queries_from_embeddings(self, query_embed: Tensor, batch_size: int) -> QueryGroup:
        """Make learned queries (one stage). query_embed: [Q, 2 C], position and content."""
        query_pos, tgt = query_embed.expand(batch_size, -1, -1).chunk(2, dim=-1)
        points = self.decoder.box_code.decode(self.reference_points(query_pos))
        return QueryGroup('all', tgt, query_pos, points)


def tokens(feature_map: Tensor) -> Tensor:
    """Flatten [B, C, H, W] to [B, H W, C]."""
    return feature_map.flatten(2).transpose(1, 2)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows of [B, S, n] by index [B, K], to [B, K, n]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def valid_sizes(mask: Tensor) -> Tensor:
    """Count the columns and rows of a padding mask [B, H, W] that are not padding, [B, 2]."""
    return torch.stack([(~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)], dim=-1)


def valid_ratio(mask: Tensor) -> Tensor:
    """Return the share of width and height that is not padding, [B, 2] float32."""
    width, height = valid_sizes(mask).float().unbind(-1)
    return torch.stack([width / mask.shape[2], height / mask.shape[1]], dim=-1)


def cell_grid(height: int, width: int, device: torch.device) -> Tensor:
    """Return the centres x, y of a map's cells in units of cells, [H W, 2] float32."""
    y = torch.arange(height, dtype=torch.float32, device=device) + 0.5
    x = torch.arange(width, dtype=torch.float32, device=device) + 0.5
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1).flatten(0, 1)


def cell_centers(shapes: list[tuple[int, int]], valid_ratios: Tensor) -> Tensor:
    """Return the centres x, y of all levels' cells, [B, S, 2]; 1 is where the padding begins."""
    levels = []
    for (height, width), ratios in zip(shapes, valid_ratios.unbind(1), strict=True):
        sides = torch.stack([ratios[:, 0] * width, ratios[:, 1] * height], dim=-1)
        levels.append(cell_grid(height, width, ratios.device) / sides[:, None])
    return torch.cat(levels, dim=1)
