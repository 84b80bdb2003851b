"""
Deformable DETR (arXiv:2010.04159): feature maps of several sizes, a deformable transformer, and heads.

With box refinement each decoder layer has its own heads; without it all layers share one pair.
"""

from functools import partial

from torch import Tensor, nn

from util.nested_tensor import NestedTensor, as_batch, resize_mask

from .deformable_transformer import DeformableTransformer
from .heads import read_layers
from .refine_masks import maps_of
from .segmentation import predict_masks
from .structures import Memory, Prediction, QueryGroup, split_groups


class DeformableDETR(nn.Module):
    """A detector that turns a batch of images into sets of boxes.

    Args:
        heads: class heads and box heads, one of each per decoder layer. Without box refinement all entries are the
            same module. With `two_stage` a last entry of each reads the encoder's proposals.
        num_queries: number of queries of each group, the inference group first.
        mixed_selection: give two-stage queries learned content.
        aux_loss: predict from every decoder layer while training.
        query_sources: modules that add query groups and losses from memory and targets while training.
        class_embed_o2m: class heads of second readings (`models.ms_detr`); None: the usual class heads.
        eval_module: auxiliary head that detects outside training, in place of the decoder.
        input_bias: give the projections of the backbone's maps biases.
        num_maps: number of the backbone's maps that levels are made from, the coarsest; None: all. Masks read all.
        mask_heads: modules that predict masks (`models.segmentation.build_mask_heads`).
        co_masks: module that predicts masks of detections (`models.refine_masks`).
        pyramid: modules that make every level from the backbone's only map, in place of projections (`models.vit`).
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
        aux_loss: bool = True,
        query_sources: nn.ModuleDict | None = None,
        class_embed_o2m: nn.ModuleList | None = None,
        eval_module: str | None = None,
        input_bias: bool = True,
        pyramid: nn.ModuleList | None = None,
        num_maps: int | None = None,
        mask_heads: dict[str, nn.Module] | None = None,
        co_masks: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.class_embed, self.bbox_embed = heads
        num_levels, hidden_dim = transformer.level_embed.shape
        if mixed_selection or not two_stage:  # content alone, or position and content
            width = hidden_dim if two_stage else 2 * hidden_dim
            self.query_embed = nn.Embedding(sum(num_queries.values()), width)
        self.has_pyramid = pyramid is not None
        self.input_proj = pyramid
        if pyramid is None:
            channels = backbone.num_channels[-(num_maps or len(backbone.num_channels)) :]
            self.input_proj = input_projections(channels, hidden_dim, num_levels, input_bias)
        self.num_maps = num_maps or len(backbone.num_channels)
        self.backbone = backbone
        self.multiple = getattr(backbone, 'multiple', 1)
        self.class_embed_o2m = class_embed_o2m
        self.query_sources = query_sources if query_sources is not None else nn.ModuleDict()
        self.num_queries = num_queries
        self.with_box_refine = with_box_refine
        self.two_stage = two_stage
        self.mixed_selection = mixed_selection
        self.aux_loss = aux_loss
        self.eval_module = eval_module
        self.has_masks, self.co_masks = bool(mask_heads), co_masks
        for name, module in (mask_heads or {}).items():
            self.add_module(name, module)

    def forward(
        self, samples: NestedTensor | list[Tensor] | Tensor, targets: list[dict] | None = None
    ) -> dict:
        """Predict class logits and boxes; arguments and result are those of `models.detr.DETR.forward`."""
        samples = as_batch(samples, self.multiple)
        features, pos = self.backbone(samples)
        levels = self.levels(samples, features, pos)
        memory = self.transformer.encode(*levels, samples.mask)
        if self.eval_module is not None and not self.training:
            return self.query_sources['collaborative'].detect(memory, self.eval_module)
        groups, predictions = self.queries(memory)
        losses: dict[str, Tensor] = {}
        if self.training:
            for source in self.query_sources.values():
                more_groups, more_losses = source(memory, targets)
                groups += more_groups
                losses |= more_losses
        refine_with = self.bbox_embed if self.with_box_refine else None
        layers = self.transformer.decode(groups, memory, refine_with)
        first = 0 if self.training else len(layers) - 1
        read = slice(first, len(layers))  # the last heads may belong to the proposals
        heads = self.class_embed[read], self.bbox_embed[read]
        predictions += read_layers(layers[read], groups, *heads, self.class_embed_o2m, self.aux_loss)
        last = next(p for p in predictions if p.kind == groups[0].name and p.layer is None)
        outputs = {'pred_logits': last.logits, 'pred_boxes': last.boxes}
        if self.has_masks:
            finer, level = [x.tensors for x in features[-2::-1]], self.num_maps - 1
            queries = layers[-1].hs[:, : last.logits.shape[1]]
            last.masks = predict_masks(
                self.bbox_attention, self.mask_head, queries, memory, level, levels[0][level], finer
            )
            outputs['pred_masks'] = last.masks
        if self.co_masks is not None and not self.training:
            outputs['masks_of'] = partial(self.co_masks.detect, maps_of(memory))
        if self.training:
            for source in self.query_sources.values():
                if hasattr(source, 'after_decoding'):
                    losses |= source.after_decoding(self.co_masks, memory, predictions, targets)
        return outputs | {'predictions': predictions, 'losses': losses} if self.training else outputs

    def levels(
        self, samples: NestedTensor, features: list[NestedTensor], pos: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return projected feature maps [B, C, H, W], padding masks and encodings of every level, finest first.

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
            # The first additional level is computed from the backbone's last map, each other from the level before.
            source = features[-1].tensors if index == len(features) else srcs[-1]
            srcs.append(self.input_proj[index](source))
            masks.append(resize_mask(samples.mask, srcs[-1].shape[-2:]))
            pos.append(self.backbone.encode_positions(masks[-1]).to(srcs[-1].dtype))
        return srcs, masks, pos

    def queries(self, memory: Memory) -> tuple[list[QueryGroup], list[Prediction]]:
        """Return the query groups, and while training the predictions of the encoder.

        Queries are learned, or with `two_stage` made from the best proposals.
        """
        groups = self.num_queries if self.training else dict(list(self.num_queries.items())[:1])
        total = sum(groups.values())
        if not self.two_stage:
            every = self.transformer.queries_from_embeddings(
                self.query_embed.weight[:total], memory.tokens.shape[0]
            )
            return split_groups(every, groups), []
        heads = self.class_embed[-1], self.bbox_embed[-1]
        boxes, everywhere = self.transformer.propose(memory, *heads, total)
        content = self.query_embed.weight[:total] if self.mixed_selection else None
        every = self.transformer.queries_from_proposals(boxes, content)
        return split_groups(every, groups), [everywhere] if self.training else []


def input_projections(
    num_channels: list[int], hidden_dim: int, num_levels: int, bias: bool = True
) -> nn.ModuleList:
    """Build the convolutions to `hidden_dim` channels: one per backbone map, and strided ones for additional levels."""
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
