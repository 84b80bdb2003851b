"""
DETR (arXiv:2005.12872): a backbone, a transformer, and two heads that read every query.

Conditional DETR is the same module with another decoder and other heads.
"""

import torch
from torch import Tensor, nn

from util.nested_tensor import NestedTensor, as_batch

from .heads import read_layers
from .segmentation import predict_masks
from .structures import Memory, Prediction, QueryGroup, TrainingBranch, split_groups
from .transformer import Transformer


class BaseDETR(nn.Module):
    """What all detectors share: from a batch of images to sets of boxes.

    A subclass encodes the images (`encode`) and makes queries (`queries`).

    Args:
        heads: class head and box head, or lists with one for each decoder layer, and perhaps for proposals.
        query_embed: learned queries of all groups; None: the encoder's proposals are the only ones.
        input_proj: projections of the backbone's maps.
        num_queries: number of queries of each group, the inference group first.
        aux_loss: predict from every decoder layer while training.
        query_sources: training branches by name; names of their weights in checkpoints begin with this word.
        class_embed_o2m: class heads of the one-to-many branch (`models.ms_detr`); None: those in `heads`.
        mask_heads: modules that predict masks (`models.segmentation.build_mask_heads`).
        co_masks: module that predicts masks of detections (`models.refine_masks`).
        eval_module: auxiliary head that detects outside training, in place of the decoder.
    """

    entry_points = ('detect_masks',)  # methods called besides forward, which FSDP must know
    mask_level = 0  # level of the memory that masks are made from
    with_box_refine = False  # the decoder itself applies the box heads
    first_stage = None  # what makes queries of the encoder's proposals (`models.deformable_detr.FirstStage`)

    def __init__(
        self,
        backbone: nn.Module,
        transformer: nn.Module,
        heads: tuple[nn.Module, nn.Module],
        query_embed: nn.Embedding | None,
        input_proj: nn.Module,
        num_queries: dict[str, int],
        aux_loss: bool = True,
        query_sources: nn.ModuleDict | None = None,
        class_embed_o2m: nn.Module | None = None,
        mask_heads: dict[str, nn.Module] | None = None,
        co_masks: nn.Module | None = None,
        eval_module: str | None = None,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.class_embed, self.bbox_embed = heads
        self.query_embed, self.input_proj = query_embed, input_proj
        self.backbone = backbone
        self.multiple = getattr(backbone, 'multiple', 1)
        self.class_embed_o2m = class_embed_o2m
        self.query_sources = query_sources if query_sources is not None else nn.ModuleDict()
        self.num_queries = num_queries
        self.aux_loss = aux_loss
        self.eval_module = eval_module
        self.has_masks, self.co_masks = bool(mask_heads), co_masks
        for name, module in (mask_heads or {}).items():
            self.add_module(name, module)

    def encode(
        self, samples: NestedTensor, features: list[NestedTensor], pos: list[Tensor]
    ) -> tuple[Memory, Tensor]:
        """Return the encoder's output, and the projected map [B, C, H, W] of `mask_level`.

        features, pos: output of the backbone.
        """
        raise NotImplementedError

    def queries(
        self, memory: Memory, num_queries: dict[str, int]
    ) -> tuple[list[QueryGroup], dict[str, Prediction]]:
        """Return query groups of these sizes, and in training the predictions of the encoder."""
        raise NotImplementedError

    def forward(
        self, samples: NestedTensor | list[Tensor] | Tensor, targets: list[dict] | None = None
    ) -> dict:
        """Predict class logits and boxes.

        Args:
            samples: padded batch, list of [3, H, W] or [B, 3, H, W]; uint8, or float and normalised.
            targets: objects of each image; only training branches read them.

        Returns:
            `pred_logits` [B, Q, K] and `pred_boxes` [B, Q, 4] (cxcywh in [0, 1]) of the last layer, and
            `pred_masks` [B, Q, h, w] (logits at stride 4) of a detector with masks; or `candidates` of
            `eval_module`. `maps`, each [B, C, H, W], are for `detect_masks`. Training adds `aux_outputs` (the
            same of earlier layers), `predictions` of each kind, of which all these are views, and `losses`
            that training branches computed.
        """
        samples = as_batch(samples, self.multiple)
        features, pos = self.backbone(samples)
        memory, projected = self.encode(samples, features, pos)
        if self.training or self.eval_module is None:
            outputs = self.predict(memory, projected, features, targets)
        else:
            outputs = self.query_sources['collaborative'].detect(memory, self.eval_module)
        if not self.training and self.region_masks is not None:
            outputs['maps'] = memory.maps()
        return outputs

    def predict(
        self, memory: Memory, projected: Tensor, features: list[NestedTensor], targets: list[dict] | None
    ) -> dict:
        """Run decoder and heads, and in training the branches; return outputs as `forward` does."""
        inference = next(iter(self.num_queries))
        num_queries = self.num_queries if self.training else {inference: self.num_queries[inference]}
        groups, predictions = self.queries(memory, num_queries)
        branches: list[TrainingBranch] = [*self.query_sources.values()] if self.training else []
        losses: dict[str, Tensor] = {}
        for branch in branches:
            added, terms = branch.queries(memory, targets)
            groups += added
            losses |= terms
        refine_with = (self.bbox_embed,) if self.with_box_refine else ()
        layers = self.transformer.decoder(groups, memory, *refine_with)
        first = 0 if self.training else len(layers) - 1
        heads = self.class_embed, self.bbox_embed, self.class_embed_o2m
        box_code = self.transformer.decoder.box_code
        predictions |= read_layers(
            layers[first:], groups, box_code, *heads, first=first, aux_loss=self.aux_loss
        )
        last = predictions[inference]
        outputs = {'pred_logits': last.logits[-1], 'pred_boxes': last.boxes[-1]}
        if self.has_masks:
            finer = [x.tensors for x in features[-2::-1]]
            states = layers[-1].hs[:, : last.logits.shape[2]]
            last.masks = outputs['pred_masks'] = predict_masks(
                self.bbox_attention, self.mask_head, states, memory, self.mask_level, projected, finer
            )
        if not self.training:
            return outputs
        for branch in branches:
            losses |= branch.losses(self, memory, predictions, targets)
        earlier = zip(last.logits[:-1], last.boxes[:-1], strict=True)
        aux = [{'pred_logits': logits, 'pred_boxes': boxes} for logits, boxes in earlier]
        return outputs | {'aux_outputs': aux, 'predictions': predictions, 'losses': losses}

    @property
    def region_masks(self) -> nn.Module | None:
        """Return the module that predicts masks of detections from their RoI features."""
        if self.eval_module is None:
            return self.co_masks
        return self.query_sources['collaborative'].heads[self.eval_module].masks

    def detect_masks(
        self, maps: list[Tensor], boxes: list[Tensor], labels: list[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Predict masks of the detections of a batch.

        Args:
            maps: `maps` of the outputs.
            boxes: [N_i, 4] xyxy in pixels of the network's input, for each image.
            labels: [N_i] for each image.

        Returns:
            For each image probabilities [N_i, h, w] of the pixels of boxes, and the quality [N_i] of masks.
        """
        masks = []
        for index, (box, label) in enumerate(zip(boxes, labels, strict=True)):
            empty = box.new_zeros(0, 1, 1), box.new_zeros(0)
            image_maps = [x[index : index + 1] for x in maps]
            masks.append(self.region_masks.detect(image_maps, box, label) if len(box) else empty)
        return masks


class DETR(BaseDETR):
    """DETR and Conditional DETR: one feature map, a dense transformer, one pair of heads for all layers."""

    def __init__(
        self,
        backbone: nn.Module,
        transformer: Transformer,
        heads: tuple[nn.Module, nn.Module],
        num_queries: dict[str, int],
        **options: object,
    ) -> None:
        hidden_dim = heads[0].in_features
        query_embed = nn.Embedding(sum(num_queries.values()), hidden_dim)
        input_proj = nn.Conv2d(backbone.num_channels[-1], hidden_dim, kernel_size=1)
        super().__init__(backbone, transformer, heads, query_embed, input_proj, num_queries, **options)

    def encode(
        self, samples: NestedTensor, features: list[NestedTensor], pos: list[Tensor]
    ) -> tuple[Memory, Tensor]:
        src, mask = features[-1].decompose()
        projected = self.input_proj(src)
        return self.transformer.encode(projected, mask, pos[-1]), projected

    def queries(
        self, memory: Memory, num_queries: dict[str, int]
    ) -> tuple[list[QueryGroup], dict[str, Prediction]]:
        """Return learned queries, whose content is zero and whose position is learned (DETR Sec. 3.2)."""
        learned = self.query_embed.weight[: sum(num_queries.values())]
        positions = learned.expand(memory.tokens.shape[0], -1, -1)
        return split_groups(QueryGroup('all', torch.zeros_like(positions), positions), num_queries), {}
