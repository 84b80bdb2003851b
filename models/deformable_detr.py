"""
Deformable DETR (arXiv:2010.04159): feature maps of several sizes, a deformable transformer, and heads.

With box refinement each decoder layer has its own heads; without it all layers share one pair. In two stages
(Sec. A.4; DINO, arXiv:2203.03605) the encoder's tokens propose boxes, at which the decoder's queries start.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from util.errors import UserError
from util.nested_tensor import NestedTensor, resize_mask

from .deformable_transformer import DeformableTransformer, cell_grid, gather_rows, valid_sizes
from .detr import BaseDETR
from .heads import ExactLinear, LogitBoxes
from .ops.functions import is_exporting
from .structures import Memory, Prediction, QueryGroup, split_groups


class DeformableDETR(BaseDETR):
    """Deformable DETR in one or two stages, and DINO with its transformer.

    Args:
        heads: class heads and box heads, one of each per decoder layer. Without box refinement all entries
            are the same module. With `two_stage` a last entry of each reads the encoder's proposals.
        num_queries: number of queries of each group, the inference group first.
        mixed_selection: give two-stage queries learned content.
        input_bias: give the projections of the backbone's maps biases.
        pyramid: modules that make every level from the backbone's only map, in place of projections (ViT).
        num_maps: number of the backbone's coarsest maps that levels are made from; None: all. Masks read all.
        options: further arguments of `BaseDETR`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transformer: DeformableTransformer,
        heads: tuple[nn.ModuleList, nn.ModuleList],
        num_queries: dict[str, int],
        with_box_refine: bool = False,
        two_stage: bool = False,
        mixed_selection: bool = False,
        input_bias: bool = True,
        pyramid: nn.ModuleList | None = None,
        num_maps: int | None = None,
        **options: object,
    ) -> None:
        num_levels, hidden_dim = transformer.level_embed.shape
        query_embed = None
        if mixed_selection or not two_stage:  # content alone, or position and content
            width = hidden_dim if two_stage else 2 * hidden_dim
            query_embed = nn.Embedding(sum(num_queries.values()), width)
        num_maps = num_maps or len(backbone.num_channels)
        input_proj = pyramid
        if pyramid is None:
            channels = backbone.num_channels[-num_maps:]
            input_proj = build_input_projections(channels, hidden_dim, num_levels, input_bias)
        super().__init__(backbone, transformer, heads, query_embed, input_proj, num_queries, **options)
        self.has_pyramid, self.num_maps, self.mask_level = pyramid is not None, num_maps, num_maps - 1
        self.with_box_refine = with_box_refine
        self.mixed_selection = mixed_selection
        if two_stage:
            decoder, modules = transformer.decoder, (transformer.enc_output, transformer.enc_output_norm)
            proposal_heads = heads[0][-1], heads[1][-1]
            self.first_stage = FirstStage(
                *modules, *proposal_heads, decoder.box_code, decoder.proposals_by_class
            )

    def encode(
        self, samples: NestedTensor, features: list[NestedTensor], pos: list[Tensor]
    ) -> tuple[Memory, Tensor]:
        levels = self.levels(samples, features, pos)
        return self.transformer.encode(*levels, samples.mask), levels[0][self.mask_level]

    def levels(
        self, samples: NestedTensor, features: list[NestedTensor], pos: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return projected maps [B, C, H, W], padding masks and encodings of every level, finest first."""
        features, pos = features[-self.num_maps :], pos[-self.num_maps :]
        if self.has_pyramid:
            srcs = [level(features[-1].tensors) for level in self.input_proj]
            masks = [resize_mask(samples.mask, src.shape[-2:]) for src in srcs]
            return srcs, masks, [self.backbone.encode_positions(mask).to(srcs[0].dtype) for mask in masks]
        srcs = [project(x.tensors) for project, x in zip(self.input_proj, features, strict=False)]
        masks = [x.mask for x in features]
        for index in range(len(features), len(self.input_proj)):
            # The first additional level comes from the backbone's last map, each other from the level before.
            source = features[-1].tensors if index == len(features) else srcs[-1]
            srcs.append(self.input_proj[index](source))
            masks.append(resize_mask(samples.mask, srcs[-1].shape[-2:]))
            pos.append(self.backbone.encode_positions(masks[-1]).to(srcs[-1].dtype))
        return srcs, masks, pos

    def queries(
        self, memory: Memory, num_queries: dict[str, int]
    ) -> tuple[list[QueryGroup], dict[str, Prediction]]:
        """Return learned queries, or with `two_stage` the best proposals, and all as kind 'enc'."""
        total = sum(num_queries.values())
        if self.first_stage is None:
            embeddings = self.query_embed.weight[:total]
            queries = self.transformer.queries_from_embeddings(embeddings, len(memory.tokens))
            return split_groups(queries, num_queries), {}
        boxes, proposals = self.first_stage(memory, total, self.training)
        content = self.query_embed.weight[:total] if self.mixed_selection else None
        queries = self.transformer.queries_from_proposals(boxes, content)
        return split_groups(queries, num_queries), {'enc': proposals} if self.training else {}


def build_input_projections(
    num_channels: list[int], hidden_dim: int, num_levels: int, bias: bool = True
) -> nn.ModuleList:
    """Build convolutions to `hidden_dim` channels: one per backbone map, strided ones for further levels."""
    convolutions = [nn.Conv2d(channels, hidden_dim, kernel_size=1, bias=bias) for channels in num_channels]
    channels = num_channels[-1]
    for _ in range(len(num_channels), num_levels):
        convolutions.append(nn.Conv2d(channels, hidden_dim, kernel_size=3, stride=2, padding=1, bias=bias))
        channels = hidden_dim
    for convolution in convolutions:
        nn.init.xavier_uniform_(convolution.weight)
        if bias:
            nn.init.zeros_(convolution.bias)
    return nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(32, hidden_dim)) for conv in convolutions)


def best_proposals(scores: Tensor, num_proposals: int) -> Tensor:
    """Return indices [B, num_proposals] of the tokens with the largest scores [B, S], the best first."""
    return scores.topk(num_proposals, dim=1).indices


@dataclass
class FirstStage:
    """Projection, heads and choice of proposals.

    It is not a module: its modules belong to the transformer and to the lists of heads, so that they have
    official names.

    by_class: choose the tokens with the best logit of any class, and supervise these alone (DINO); else those
        with the best logit of class 0, which means 'object' here, and supervise all.
    choose: function of scores [B, S] and a number, which returns the indices of that many tokens.
    """

    projection: nn.Module
    norm: nn.Module
    class_head: ExactLinear
    box_head: nn.Module
    box_code: LogitBoxes
    by_class: bool
    choose: Callable[..., Tensor] = best_proposals

    def __call__(
        self, memory: Memory, num_proposals: int, training: bool
    ) -> tuple[Tensor, Prediction | None]:
        """Find proposals.

        Returns:
            Boxes [B, num_proposals, 4] without gradient, and in training the prediction to supervise ('enc').

        Raises:
            UserError: there are fewer tokens than proposals.
        """
        num_tokens = memory.tokens.shape[1]
        if not is_exporting() and num_tokens < num_proposals:
            raise UserError(
                f'{num_proposals} proposals, but the feature maps {memory.shapes} have {num_tokens} cells: '
                'lower --num_queries (or what training adds to it), or use larger images'
            )
        anchors, exists = default_boxes(memory)
        anchors = self.box_code.encode(anchors).masked_fill(~exists, self.box_code.no_box)
        features = self.norm(self.projection(memory.tokens.masked_fill(~exists, 0)))
        if self.by_class or training:
            logits = self.class_head(features)
            scores = logits.amax(-1) if self.by_class else logits[..., 0]
        else:  # logits of other classes are not needed
            scores = self.class_head.first(features)
        best = self.choose(scores, num_proposals)
        if training and not self.by_class:
            prediction = self.prediction(logits, features, anchors)
            return gather_rows(prediction.boxes[-1], best).detach(), prediction
        features, anchors = gather_rows(features, best), gather_rows(anchors, best)
        if not training:
            return self.box_code.decode(self.box_head(features), anchors), None
        prediction = self.prediction(gather_rows(logits, best), features, anchors)
        return prediction.boxes[-1].detach(), prediction

    def prediction(self, logits: Tensor, features: Tensor, anchors: Tensor) -> Prediction:
        boxes = self.box_code.decode(self.box_head(features), anchors)
        return Prediction(
            logits[None], boxes[None], self.box_code.decode(torch.zeros_like(anchors), anchors)[None]
        )


def default_boxes(memory: Memory) -> tuple[Tensor, Tensor]:
    """Return a box around every cell and a mask of the usable ones.

    Returns:
        Boxes [B, S, 4] cxcywh float32, in units of the image without padding, and a mask [B, S, 1]: False in
        the padding, and where a coordinate is not between 0.01 and 0.99.
    """
    start, levels = 0, []
    for level, (height, width) in enumerate(memory.shapes):
        mask = memory.padding_mask[:, start : start + height * width].unflatten(1, (height, width))
        centers = cell_grid(height, width, mask.device) / valid_sizes(mask)[:, None]
        size = torch.full_like(centers, 0.05 * 2.0**level)
        levels.append(torch.cat([centers, size], dim=-1))
        start += height * width
    boxes = torch.cat(levels, dim=1)
    exists = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True) & ~memory.padding_mask[..., None]
    return boxes, exists
