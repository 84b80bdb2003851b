"""
DETR (arXiv:2005.12872): a backbone, a transformer, and two heads that read every query.

Conditional DETR is the same module, built with another decoder and other heads.
"""

from torch import Tensor, nn

from util.nested_tensor import NestedTensor, as_batch

from .heads import read_layers
from .segmentation import predict_masks
from .structures import learned_groups
from .transformer import Transformer


class DETR(nn.Module):
    """A detector that turns a batch of images into sets of boxes.

    Args:
        heads: class head and box head.
        num_queries: number of learned queries of each group, the inference group first.
        aux_loss: predict from every decoder layer while training.
        query_sources: modules that add query groups and losses from memory and targets while training.
        class_embed_o2m: class head of second readings (`models.ms_detr`); None: the usual class head.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transformer: Transformer,
        heads: tuple[nn.Module, nn.Module],
        num_queries: dict[str, int],
        aux_loss: bool = True,
        query_sources: nn.ModuleDict | None = None,
        class_embed_o2m: nn.Module | None = None,
        mask_heads: dict[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.class_embed, self.bbox_embed = heads
        hidden_dim = self.class_embed.in_features
        self.query_embed = nn.Embedding(sum(num_queries.values()), hidden_dim)
        self.input_proj = nn.Conv2d(backbone.num_channels[-1], hidden_dim, kernel_size=1)
        self.backbone = backbone
        self.multiple = getattr(backbone, 'multiple', 1)
        self.class_embed_o2m = class_embed_o2m
        self.query_sources = query_sources if query_sources is not None else nn.ModuleDict()
        self.num_queries = num_queries
        self.aux_loss = aux_loss
        self.has_masks = bool(mask_heads)
        for name, module in (mask_heads or {}).items():
            self.add_module(name, module)

    def forward(
        self, samples: NestedTensor | list[Tensor] | Tensor, targets: list[dict] | None = None
    ) -> dict:
        """Predict class logits and boxes.

        Args:
            samples: padded batch, list of [3, H, W] or [B, 3, H, W]; uint8, or float and normalised.
            targets: objects of each image; only query sources read them, while training.

        Returns:
            `pred_logits` [B, Q, K] and `pred_boxes` [B, Q, 4] (cxcywh in [0, 1]) of the last layer, and `pred_masks`
            [B, Q, h, w] (logits at stride 4) of a detector with masks. While training also
            `predictions`, the flat list of all, and `losses`, the terms that query sources computed themselves.
        """
        samples = as_batch(samples, self.multiple)
        features, pos = self.backbone(samples)
        src, mask = features[-1].decompose()
        projected = self.input_proj(src)
        memory = self.transformer.encode(projected, mask, pos[-1])
        groups = learned_groups(self.num_queries, self.query_embed.weight, src.shape[0], self.training)
        losses: dict[str, Tensor] = {}
        if self.training:
            for source in self.query_sources.values():
                more_groups, more_losses = source(memory, targets)
                groups += more_groups
                losses |= more_losses
        layers = self.transformer.decode(groups, memory)
        layers = layers if self.training else layers[-1:]
        heads = [self.class_embed] * len(layers), [self.bbox_embed] * len(layers)
        second = None if self.class_embed_o2m is None else [self.class_embed_o2m] * len(layers)
        predictions = read_layers(layers, groups, *heads, second, self.aux_loss)
        last = next(p for p in predictions if p.kind == groups[0].name and p.layer is None)
        outputs = {'pred_logits': last.logits, 'pred_boxes': last.boxes}
        if self.has_masks:
            finer = [x.tensors for x in features[-2::-1]]
            queries = layers[-1].hs[:, : last.logits.shape[1]]
            last.masks = predict_masks(
                self.bbox_attention, self.mask_head, queries, memory, 0, projected, finer
            )
            outputs['pred_masks'] = last.masks
        return outputs | {'predictions': predictions, 'losses': losses} if self.training else outputs
