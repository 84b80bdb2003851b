"""
Deformable DETR (arXiv:2010.04159): feature maps of several sizes, a deformable transformer, and heads.

With box refinement each decoder layer has its own heads; without it all layers share one pair.
"""

from torch import Tensor, nn

from util.nested_tensor import NestedTensor, resize_mask

from .deformable_transformer import DeformableTransformer
from .detr import BaseDETR
from .proposals import FirstStage
from .structures import Memory, Prediction, QueryGroup, split_groups


class DeformableDETR(BaseDETR):
    """Deformable DETR in one or two stages, and DINO with its transformer.

    Args:
        heads: class heads and box heads, one of each per decoder layer. Without box refinement all entries
            are the same module. With `two_stage` a last entry of each reads the encoder's proposals.
        num_queries: number of queries of each group, the inference group first.
        mixed_selection: give two-stage queries learned content.
        input_bias: give the projections of the backbone's maps biases.
        pyramid: modules that make every level from the backbone's only map, in place of projections
            (`models.vit`).
        num_maps: number of the backbone's maps that levels are made from, the coarsest; None: all. Masks read
            all.
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
            input_proj = input_projections(channels, hidden_dim, num_levels, input_bias)
        super().__init__(backbone, transformer, heads, query_embed, input_proj, num_queries, **options)
        self.has_pyramid, self.num_maps, self.mask_level = pyramid is not None, num_maps, num_maps - 1
        self.with_box_refine = with_box_refine
        self.first_stage = FirstStage.of(transformer, heads[0][-1], heads[1][-1]) if two_stage else None
        self.mixed_selection = mixed_selection

    def encode(
        self, samples: NestedTensor, features: list[NestedTensor], pos: list[Tensor]
    ) -> tuple[Memory, Tensor]:
        levels = self.levels(samples, features, pos)
        return self.transformer.encode(*levels, samples.mask), levels[0][self.mask_level]

    def levels(
        self, samples: NestedTensor, features: list[NestedTensor], pos: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return projected feature maps [B, C, H, W], padding masks and encodings of every level, finest
        first.

        features, pos: output of the backbone.
        """
        features, pos = features[-self.num_maps :], pos[-self.num_maps :]
        if self.has_pyramid:
            srcs = [level(features[-1].tensors) for level in self.input_proj]
            masks = [resize_mask(samples.mask, src.shape[-2:]) for src in srcs]
            return srcs, masks, [self.backbone.encode_positions(mask).to(srcs[0].dtype) for mask in masks]
        srcs = [project(x.tensors) for project, x in zip(self.input_proj, features, strict=False)]
        masks = [x.mask for x in features]
        for index in range(len(features), len(self.input_proj)):
            # The first additional level is computed from the backbone's last map, each other from the level
            # before.
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
            every = self.transformer.queries_from_embeddings(embeddings, len(memory.tokens))
            return split_groups(every, num_queries), {}
        boxes, proposals = self.first_stage(memory, total, self.training)
        content = self.query_embed.weight[:total] if self.mixed_selection else None
        every = self.transformer.queries_from_proposals(boxes, content)
        return split_groups(every, num_queries), {'enc': proposals} if self.training else {}


def input_projections(
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
