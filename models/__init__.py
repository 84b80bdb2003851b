"""
Build detectors, criteria and postprocessors from flags. No other module of `models/` reads parsed flags, except those
that declare and settle them.
"""

import copy
from argparse import Namespace

from torch import nn

from util.config.recorded import NetworkFlags
from util.config.settle import Settled, backbone_maps, has_pyramid, level_strides, returned_maps, settle

from .backbone import Backbone, Joiner, build_backbone
from .conditional_detr import ConditionalDecoder, ConditionalDecoderLayer
from .deformable_detr import DeformableDETR
from .deformable_transformer import (
    DeformableDecoder,
    DeformableDecoderLayer,
    DeformableEncoder,
    DeformableEncoderLayer,
    DeformableTransformer,
)
from .detr import DETR
from .dino import DinoDecoder, DinoTransformer
from .heads import box_head, class_head
from .ms_detr import (
    MixedConditionalDecoderLayer,
    MixedDecoderLayer,
    TwiceReadConditionalDecoderLayer,
    TwiceReadDecoderLayer,
)
from .ops.modules import MSDeformAttn
from .parts import freeze, recompute
from .position_encoding import build_position_encoding
from .postprocess import (
    AUXILIARY_HEADS,
    CandidatePostProcess,
    MaskPostProcess,
    NMSPostProcess,
    RegionMaskPostProcess,
    SoftmaxPostProcess,
    SoftNMSPostProcess,
    TopKPostProcess,
)
from .refine_masks import DetectionMasks
from .segmentation import build_mask_heads
from .transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from .vit import feature_pyramid

__all__ = [
    'build_detector',
    'build_model',
    'build_postprocessors',
    'build_transformer',
    'check_backbone',
]


def build_transformer(args: Namespace) -> Transformer:
    """Build the dense transformer of DETR or Conditional DETR."""
    sizes = args.hidden_dim, args.nheads, args.dim_feedforward, args.dropout
    encoder = TransformerEncoder(
        TransformerEncoderLayer(*sizes, args.pre_norm),
        args.enc_layers,
        nn.LayerNorm(args.hidden_dim) if args.pre_norm else None,
    )
    norm = nn.LayerNorm(args.hidden_dim)
    if args.family == 'detr':
        layer = TransformerDecoderLayer(*sizes, args.pre_norm)
        return Transformer(encoder, TransformerDecoder(layer, args.dec_layers, norm))
    layer = build_decoder_layer(
        args,
        (ConditionalDecoderLayer, TwiceReadConditionalDecoderLayer, MixedConditionalDecoderLayer),
        sizes,
    )
    return Transformer(encoder, ConditionalDecoder(layer, args.dec_layers, norm, args.pe_temperature))


def build_decoder_layer(args: Namespace, layers: tuple[type[nn.Module], ...], sizes: tuple) -> nn.Module:
    """Build the decoder layer that the flags choose.

    Args:
        layers: three classes: the plain layer, and those of MS-DETR's variants a and b.
        sizes: positional arguments that all three classes take.
    """
    plain, variant_a, variant_b = layers
    if not args.use_ms_detr:
        return plain(*sizes)
    if args.ms_variant == 'a':
        return variant_a(*sizes)
    layer = variant_b(*sizes)
    if args.use_aux_ffn:
        layer.add_aux_ffn(args.hidden_dim, args.dim_feedforward, args.dropout)
    return layer


def build_deformable_transformer(args: Namespace) -> DeformableTransformer:
    """Build the transformer of Deformable DETR, with DINO's decoder if the flags ask for it."""
    sizes = args.dim_feedforward, args.dropout

    def attention(num_points: int) -> MSDeformAttn:
        return MSDeformAttn(args.hidden_dim, args.num_feature_levels, args.nheads, num_points)

    encoder_layer = DeformableEncoderLayer(attention(args.enc_n_points), *sizes)
    encoder = DeformableEncoder(encoder_layer, args.enc_layers)
    layers = DeformableDecoderLayer, TwiceReadDecoderLayer, MixedDecoderLayer
    decoder_layer = build_decoder_layer(args, layers, (attention(args.dec_n_points), *sizes))
    decoder_class, transformer_class = (
        (DinoDecoder, DinoTransformer) if args.dino else (DeformableDecoder, DeformableTransformer)
    )
    decoder = decoder_class(decoder_layer, args.dec_layers, args.look_forward_twice)
    return transformer_class(
        encoder,
        decoder,
        d_model=args.hidden_dim,
        num_levels=args.num_feature_levels,
        two_stage=args.two_stage,
        temperature=args.pe_temperature,
    )


def build_layer_heads(args: Namespace) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Build the class and box heads of Deformable DETR.

    With box refinement each decoder layer has its own heads, and two stages add a pair for the proposals. Without
    it all layers share one pair.
    """
    class_embed = class_head(args.hidden_dim, args.num_classes, prior=0.01)
    bbox_embed = box_head(args.hidden_dim, start_at_reference=True)
    if not args.with_box_refine:
        nn.init.constant_(bbox_embed.layers[-1].bias[2:], -2.0)  # boxes begin at 0.12 of a side
        return tuple(nn.ModuleList([head] * args.dec_layers) for head in (class_embed, bbox_embed))
    num_heads = args.dec_layers + args.two_stage
    heads = tuple(
        nn.ModuleList(copy.deepcopy(head) for _ in range(num_heads)) for head in (class_embed, bbox_embed)
    )
    if not args.two_stage:
        nn.init.constant_(heads[1][0].layers[-1].bias[2:], -2.0)
    return heads


def build_masks(args: Namespace, num_channels: list[int]) -> dict[str, nn.Module] | None:
    """Build the mask heads that --masks asks for. num_channels: those of the backbone's maps, finest first."""
    if not args.masks:
        return None
    return build_mask_heads(args.hidden_dim, args.nheads, num_channels[-2::-1])


def backbone_of(args: Namespace, weights: str) -> Backbone:
    """Build the backbone that settled flags ask for, with weights as `build_backbone` takes them."""
    return build_backbone(
        args.backbone,
        weights=weights,
        dilation=args.dilation,
        norm=args.backbone_norm,
        stages=returned_maps(args),
        train=getattr(args, 'lr_backbone', None) != 0,
        drop_path_rate=args.drop_path_rate,
        frozen_stages=args.backbone_frozen_stages,
    )


def check_backbone(args: Namespace) -> None:
    """Refuse a network of timm that is no backbone. It must be built to see that.

    Raises:
        UserError: so it is.
    """
    if args.backbone.startswith('timm/'):
        backbone_of(args, 'none')


def build_detector(
    args: Namespace, num_queries: dict[str, int], query_sources: nn.ModuleDict | None = None
) -> nn.Module:
    """Build the detector alone.

    Args:
        args: settled flags.
        num_queries: number of learned queries of each group, the inference group first.
        query_sources: modules that add query groups while training.
    """
    backbone = Joiner(
        backbone_of(args, args.backbone_weights),
        build_position_encoding(
            args.position_embedding,
            args.hidden_dim,
            temperature=args.pe_temperature,
            offset=-0.5 if args.family == 'deformable' and not args.dino else 0.0,
            scale=args.position_embedding_scale,
        ),
    )
    options = {
        'num_queries': num_queries,
        'aux_loss': args.aux_loss,
        'query_sources': query_sources,
        'mask_heads': build_masks(args, backbone.num_channels),
    }
    second_heads = args.use_ms_detr and args.ms_variant == 'a'
    if args.family == 'deformable':
        transformer = build_deformable_transformer(args)
        heads = build_layer_heads(args)
        model = DeformableDETR(
            backbone,
            transformer,
            heads,
            **options,
            with_box_refine=args.with_box_refine,
            two_stage=args.two_stage,
            mixed_selection=args.mixed_selection,
            class_embed_o2m=copy.deepcopy(heads[0][: args.dec_layers]) if second_heads else None,
            eval_module=None if args.eval_module == 'detr' else args.eval_module,
            input_bias=args.input_proj_bias,
            num_maps=len(backbone_maps(args)),
            co_masks=DetectionMasks(args.hidden_dim, args.num_classes, level_strides(args))
            if args.co_masks
            else None,
            pyramid=feature_pyramid(backbone.num_channels[0], args.hidden_dim) if has_pyramid(args) else None,
        )
    else:
        focal = args.family != 'detr'
        num_outputs = args.num_classes if focal else args.num_classes + 1  # with 'no object'
        heads = (
            class_head(args.hidden_dim, num_outputs, prior=0.01 if focal else None),
            box_head(args.hidden_dim, start_at_reference=focal),
        )
        class_embed_o2m = copy.deepcopy(heads[0]) if second_heads else None
        transformer = build_transformer(args)
        model = DETR(backbone, transformer, heads, **options, class_embed_o2m=class_embed_o2m)
    recompute(model, args.use_checkpoint or ())
    model.flags = NetworkFlags.of(args)  # what a checkpoint must have been trained with
    return model


def build_model(args: Namespace) -> tuple[nn.Module, nn.Module, dict[str, nn.Module]]:
    """Build model, criterion and postprocessors.

    Args:
        args: settled flags, or some that are settled here. `num_classes` is 91 unless the data set has set it.

    Raises:
        UserError: flags contradict each other.
    """
    from .training import build_supervision

    args = args if isinstance(args, Settled) else settle(args)
    criterion, num_queries, query_sources = build_supervision(args)
    model = build_detector(args, num_queries, query_sources)
    freeze_unreached_heads(model, criterion, args.two_stage)
    freeze(model, args.freeze)
    return model, criterion, build_postprocessors(args)


def freeze_unreached_heads(model: nn.Module, criterion: nn.Module, two_stage: bool) -> None:
    """Ask for no gradient of heads that no loss reaches: with --no_aux_loss in two stages, or where coefficients are 0.

    DDP would wait for their gradients.
    """
    terms = {kind: set(row.coef) for kind, row in criterion.table.items()}
    proposals = terms.pop('enc', set())
    if not any('_enc' in name for name in criterion.weight_dict):
        proposals = set()
    if model.class_embed_o2m is not None:  # the second reading has class heads of its own
        if 'ce' not in terms['o2m']:
            model.class_embed_o2m.requires_grad_(False)
        terms['o2m'] -= {'ce'}
    decoder = set().union(*terms.values()) - {'mask', 'dice'}
    for heads, is_class in ((model.class_embed, True), (model.bbox_embed, False)):
        layers = heads[:-1] if two_stage else heads
        if not (decoder & {'ce'} if is_class else decoder - {'ce'}):
            layers.requires_grad_(False)
        if two_stage and not (proposals & {'ce'} if is_class else proposals - {'ce'}):
            heads[-1].requires_grad_(False)


def build_postprocessors(args: Namespace) -> dict[str, nn.Module]:
    """Build the postprocessors: `bbox` turns outputs into detections in pixels, `segm` adds their masks."""
    masks = {'segm': MaskPostProcess()} if args.masks else {}
    if args.co_masks or (args.eval_module == 'faster_rcnn' and getattr(args, 'co_rcnn_masks', False)):
        masks = {'segm': RegionMaskPostProcess()}
    return {'bbox': build_box_postprocessor(args)} | masks


def build_box_postprocessor(args: Namespace) -> nn.Module:
    if args.family == 'detr':
        return SoftmaxPostProcess()
    if args.eval_module != 'detr':
        return CandidatePostProcess(AUXILIARY_HEADS[args.eval_module])
    if args.nms_iou_threshold is not None:
        return NMSPostProcess(args.topk_eval, args.nms_iou_threshold, args.clamp_boxes)
    if args.soft_nms_threshold:
        return SoftNMSPostProcess(args.topk_eval, args.soft_nms_threshold, args.num_queries)
    return TopKPostProcess(args.topk_eval, args.clamp_boxes)
