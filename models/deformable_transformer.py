"""
The transformer of Deformable DETR (arXiv:2010.04159, Sec. 4): tokens and queries sample a few points of several
feature maps.

With box refinement (Sec. 4.2), each decoder layer corrects the boxes of the layer before. In two stages, the encoder's
best proposals are the first boxes.

Shapes are plain integers. Reference points, valid ratios and proposals are float32 whatever the model's precision and
under autocast, as in the official code.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from util.errors import UserError

from .heads import BestProposals, ExactLinear, add_reference, inverse_sigmoid
from .ops.functions import exporting
from .ops.modules import MSDeformAttn
from .ops.modules.ms_deform_attn import level_sizes
from .position_encoding import sine_embedding
from .structures import LayerOutput, Memory, Prediction, QueryGroup, attention_blocks, check_groups
from .transformer import Blocks, SubLayers, clones, read_twice, self_attention
from .units import call_unit


class DeformableEncoderLayer(SubLayers):
    """Self-attention and feed-forward, with post-norm. Names and numbers of the sub-layers are the official ones."""

    def __init__(self, attention: MSDeformAttn, dim_feedforward: int = 1024, dropout: float = 0.1) -> None:
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


class DeformableDecoderLayer(SubLayers):
    """Self-attention, cross-attention and feed-forward, whose norms have the official numbers 2, 1 and 3."""

    def __init__(self, attention: MSDeformAttn, dim_feedforward: int = 1024, dropout: float = 0.1) -> None:
        super().__init__(dropout)
        d_model, nhead = attention.d_model, attention.n_heads
        self.cross_attn = attention
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(d_model)
        self.add_feed_forward(d_model, dim_feedforward)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(
        self, tgt: Tensor, query_pos: Tensor, reference: Tensor, memory: Memory, blocks: Blocks
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer.

        Args:
            tgt, query_pos: [B, Q, C].
            reference: [B, Q, L, 2 or 4].
            blocks: which queries attend to which (`attention_blocks`).

        Returns:
            The new state, and the state that a second reading starts from (`models.ms_detr`); here None.
        """
        tgt = self.add(self.norm2, tgt, self_attention(self.self_attn, tgt + query_pos, tgt, blocks))
        tgt = self.add(self.norm1, tgt, self.cross_attention(tgt + query_pos, reference, memory))
        return self.feed_forward(self.norm3, tgt), None

    def cross_attention(self, query: Tensor, reference: Tensor, memory: Memory) -> Tensor:
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
            src = call_unit(layer, src, reference, memory)
        return replace(memory, tokens=src)


class DeformableDecoder(nn.Module):
    """Decoder layers, with reference points that are fixed or refined by each layer.

    look_forward_twice: let the box loss of a layer also train the refinement of the layer before (DINO,
    arXiv:2203.03605, Sec. 3.5).
    """

    eps = 1e-5  # smallest argument of the logarithms in inverse sigmoids
    positions_from_boxes = (
        False  # computes the positions of queries itself; query groups have boxes and no positions
    )
    proposals_by_class = (
        False  # proposals have the best logit of any class, not of class 0, and only they are supervised
    )

    def __init__(self, layer: nn.Module, num_layers: int, look_forward_twice: bool = False) -> None:
        super().__init__()
        self.layers = clones(layer, num_layers)
        self.look_forward_twice = look_forward_twice

    def forward(
        self, groups: list[QueryGroup], memory: Memory, refine_with: nn.ModuleList | None = None
    ) -> list[LayerOutput]:
        """Return the output of every layer. refine_with: box heads of the layers; None keeps the reference points."""
        self.check(groups)
        tgt = torch.cat([group.tgt for group in groups], dim=1)  # [B, Q, C]
        reference = torch.cat([group.reference_points for group in groups], dim=1)  # [B, Q, 2 or 4]
        blocks, outputs = attention_blocks(groups), []
        # The layers refine `logits`; the box heads add their output to `head_reference`.
        logits = head_reference = inverse_sigmoid(reference, self.eps)
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            ratios = memory.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)  # [B, L, 2 or 4]
            scaled = reference[:, :, None] * ratios[:, None]  # [B, Q, L, 2 or 4]
            query_pos = self.query_pos(groups, scaled)
            tgt, between = call_unit(layer, tgt, query_pos, scaled, memory, blocks)
            delta = None if refine_with is None else self.refinement(refine_with[index], tgt, last)
            second = read_twice(layer, between, groups) if self.training else None
            outputs.append(self.output(tgt, head_reference, delta, second))
            if delta is not None and not last:
                refined = add_reference(delta, logits)  # [B, Q, 4]
                reference = refined.detach()
                logits = inverse_sigmoid(reference, self.eps)
                head_reference = inverse_sigmoid(refined, self.eps) if self.look_forward_twice else logits
        return outputs

    def check(self, groups: list[QueryGroup]) -> None:
        if self.positions_from_boxes:
            check_groups(groups, self, needs=('reference_points',), ignores=('query_pos',))
        else:
            check_groups(groups, self, needs=('query_pos', 'reference_points'))

    def query_pos(self, groups: list[QueryGroup], scaled: Tensor) -> Tensor:
        """Return the positions of all queries, [B, Q, C].

        scaled: [B, Q, L, 2 or 4], reference points in units of each level.
        """
        return torch.cat([group.query_pos for group in groups], dim=1)

    def refinement(self, box_head: nn.Module, tgt: Tensor, last: bool) -> Tensor | None:
        """Return what the box head adds to the reference points of a layer, [B, Q, 4]."""
        return box_head(tgt)

    def output(
        self, tgt: Tensor, reference: Tensor, delta: Tensor | None, second: Tensor | None
    ) -> LayerOutput:
        """Return what the heads read."""
        return LayerOutput(tgt, reference, delta, second)


class DeformableTransformer(nn.Module):
    """Encoder, first stage and decoder.

    `encode` turns feature maps into `Memory`, `propose` finds boxes in it, and `decode` runs query groups over it.

    two_stage: create the layers that turn proposals into queries, instead of the one that turns learned positions into
    reference points.
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
            self.choose_proposals = BestProposals()
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

    def propose(
        self, memory: Memory, class_head: ExactLinear, box_head: nn.Module, num_proposals: int
    ) -> tuple[Tensor, Prediction | None]:
        """Find proposals (first stage): boxes of the tokens with the largest logit of class 0, which means 'object' here.

        A decoder with `proposals_by_class` takes those with the largest logit of any class (DINO).

        Returns:
            Boxes [B, num_proposals, 4] without gradient, and while training the prediction of every token, or with
            `proposals_by_class` of the chosen ones (kind 'enc').

        Raises:
            UserError: there are fewer tokens than proposals.
        """
        features, anchors = self.proposal_features(memory, num_proposals)
        by_class = self.decoder.proposals_by_class
        if by_class or self.training:
            logits = class_head(features)
            scores = logits.amax(-1) if by_class else logits[..., 0]
        else:  # no token needs logits of other classes
            scores = class_head.first(features)
        best = self.choose_proposals(scores, num_proposals)
        if self.training and not by_class:
            boxes = (box_head(features) + anchors).sigmoid()
            everywhere = Prediction(logits[None], boxes[None], anchors.sigmoid()[None])
            return gather_rows(boxes, best).detach(), everywhere
        anchors = gather_rows(anchors, best)
        boxes = (box_head(gather_rows(features, best)) + anchors).sigmoid()
        if not self.training:
            return boxes, None
        chosen = gather_rows(logits, best)
        return boxes.detach(), Prediction(chosen[None], boxes[None], anchors.sigmoid()[None])

    def proposal_features(self, memory: Memory, num_proposals: int) -> tuple[Tensor, Tensor]:
        """Return features of every cell for the heads, [B, S, C], and its default box in logit space, [B, S, 4]."""
        num_tokens = memory.tokens.shape[1]
        if not exporting() and num_tokens < num_proposals:
            raise UserError(
                f'{num_proposals} proposals, but the feature maps {memory.shapes} have {num_tokens} cells: lower '
                '--num_queries (or what training adds to it), or use larger images'
            )
        anchors = proposal_logits(memory)  # infinite where there is no proposal
        absent = anchors[..., :1].isinf()
        return self.enc_output_norm(self.enc_output(memory.tokens.masked_fill(absent, 0))), anchors

    def queries_from_proposals(self, boxes: Tensor, content: Tensor | None) -> QueryGroup:
        """Make queries that start at proposals (second stage).

        Args:
            boxes: [B, Q, 4].
            content: [Q, C] learned (`--mixed_selection`, DINO Sec. 3.4); None: computed from the boxes, as the positions.
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
        return QueryGroup('all', tgt, query_pos, self.reference_points(query_pos).sigmoid())

    def decode(
        self, groups: list[QueryGroup], memory: Memory, refine_with: nn.ModuleList | None = None
    ) -> list[LayerOutput]:
        return self.decoder(groups, memory, refine_with)


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


def cell_centers(shapes: list[tuple[int, int]], valid_ratios: Tensor) -> list[Tensor]:
    """Return the centres x, y of the cells of each level, [B, H W, 2]; 1 is the end of the part without padding."""
    return [
        cell_grid(height, width, ratios.device)
        / torch.stack([ratios[:, 0] * width, ratios[:, 1] * height], dim=-1)[:, None]
        for (height, width), ratios in zip(shapes, valid_ratios.unbind(1), strict=True)
    ]


def proposal_logits(memory: Memory) -> Tensor:
    """Return a default box around every cell, [B, S, 4] cxcywh in logit space, float32 (Sec. A.4).

    Entries are infinite in the padding, and where a coordinate is not between 0.01 and 0.99.
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
