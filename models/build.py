"""
Build detectors, criteria and postprocessors from settled flags. No other module of `models/` reads parsed
flags.

`util.config.networks.DECODERS` and `models.backbone.BACKBONES` are the tables that it builds from.
"""

import copy
from argparse import Namespace

from torch import nn

from util.config.networks import backbone_maps, decoder_of, has_pyramid, level_strides, returned_maps
from util.config.recorded import NetworkFlags
from util.config.settle import Settled, settle

from .backbone import Backbone, Joiner, build_backbone
from .decoders import build_decoder_layer, decoder_class
from .deformable_detr import DeformableDETR
from .deformable_transformer import (
    DeformableEncoder,
    DeformableEncoderLayer,
    DeformableTransformer,
)
from .detr import DETR
from .heads import box_head, class_head
from .ops.modules import MSDeformAttn
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
from .transformer import Transformer, TransformerEncoder, TransformerEncoderLayer
from .units import recompute
from .vit import feature_pyramid


def build_model(args: Namespace) -> tuple[nn.Module, nn.Module, dict[str, nn.Module]]:
    """Build model, criterion and postprocessors.

    Args:
        args: settled flags, or some that are settled here. `num_classes` is 91 unless the dataset has set it.

    Raises:
        UserError: flags contradict each other.
    """
    from util.optim import freeze

    from .training import build_supervision

    args = args if isinstance(args, Settled) else settle(args)
    criterion, num_queries, query_sources = build_supervision(args)
    model = build_detector(args, num_queries, query_sources)
    freeze_unreached_heads(model, criterion)
    freeze(model, args.freeze)
    return model, criterion, build_postprocessors(args)


def build_detector(
    args: Namespace, num_queries: dict[str, int], query_sources: nn.ModuleDict | None = None
) -> nn.Module:
    """Build the detector alone.

    Args:
        args: settled flags.
        num_queries: number of learned queries of each group, the inference group first.
        query_sources: training branches by their names.
    """
    body = build_args_backbone(args, args.backbone_weights)
    encoding = build_position_encoding(
        args.position_embedding,
        args.hidden_dim,
        temperature=args.pe_temperature,
        offset=decoder_of(args).encoding_offset,
        scale=args.position_embedding_scale,
    )
    backbone = Joiner(body, encoding)
    mask_heads = (
        build_mask_heads(args.hidden_dim, args.nheads, backbone.num_channels[-2::-1]) if args.masks else None
    )
    build = build_deformable_detr if args.family == 'deformable' else build_dense_detr
    model = build(
        args,
        backbone,
        num_queries=num_queries,
        aux_loss=args.aux_loss,
        query_sources=query_sources,
        mask_heads=mask_heads,
    )
    recompute(model, args.use_checkpoint or ())
    model.flags = NetworkFlags.of(args)  # what a checkpoint must have been trained with
    return model


def build_args_backbone(args: Namespace, weights: str) -> Backbone:
    """Build the backbone that settled flags ask for, with weights as `build_backbone` takes them."""
    return build_backbone(
        args.backbone,
        weights=weights,
        dilation=args.dilation,
        norm=args.backbone_norm,
        stages=returned_maps(args),
        train=getattr(args, 'lr_backbone', None) != 0,
        drop_path_rate=args.drop_path_rate,
    )


def check_backbone(args: Namespace) -> None:
    """Check a network of timm before data are read. It must be built for that.

    Raises:
        UserError: it cannot be the backbone of a detector.
    """
    if args.backbone.startswith('timm/'):
        build_args_backbone(args, 'none')


def build_dense_detr(args: Namespace, backbone: Joiner, **options: object) -> DETR:
    """Build DETR or Conditional DETR on a backbone. options: arguments of `DETR`."""
    focal = args.family != 'detr'
    heads = (
        class_head(
            args.hidden_dim, args.num_classes + (not focal), prior=0.01 if focal else None
        ),  # DETR: 'no object'
        box_head(args.hidden_dim, start_at_reference=focal),
    )
    class_embed_o2m = copy.deepcopy(heads[0]) if has_second_heads(args) else None
    transformer = build_transformer(args)
    return DETR(backbone, transformer, heads, **options, class_embed_o2m=class_embed_o2m)


def build_deformable_detr(args: Namespace, backbone: Joiner, **options: object) -> DeformableDETR:
    """Build Deformable DETR on a backbone. options: arguments of `DeformableDETR`."""
    transformer = build_deformable_transformer(args)
    heads = build_layer_heads(args)
    class_embed_o2m = copy.deepcopy(heads[0][: args.dec_layers]) if has_second_heads(args) else None
    strides = level_strides(args)
    return DeformableDETR(
        backbone,
        transformer,
        heads,
        **options,
        with_box_refine=args.with_box_refine,
        two_stage=args.two_stage,
        mixed_selection=args.mixed_selection,
        class_embed_o2m=class_embed_o2m,
        eval_module=None if args.eval_module == 'detr' else args.eval_module,
        input_bias=args.input_proj_bias,
        num_maps=len(backbone_maps(args)),
        co_masks=DetectionMasks(args.hidden_dim, args.num_classes, strides) if args.co_masks else None,
        pyramid=feature_pyramid(backbone.num_channels[0], args.hidden_dim) if has_pyramid(args) else None,
    )


def has_second_heads(args: Namespace) -> bool:
    """Return whether the second predictions of MS-DETR have class heads of their own (variant a)."""
    return args.use_ms_detr and args.ms_variant == 'a'


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
        options, more = {'pre_norm': args.pre_norm}, {}
    else:
        options, more = {}, {'temperature': args.pe_temperature}
    layer = build_decoder_layer(args, *sizes, **options)
    return Transformer(encoder, decoder_class(args)(layer, args.dec_layers, norm, **more))


def build_deformable_transformer(args: Namespace) -> DeformableTransformer:
    """Build the transformer of Deformable DETR, with the decoder that the flags choose."""

    def attention(num_points: int) -> MSDeformAttn:
        return MSDeformAttn(args.hidden_dim, args.num_feature_levels, args.nheads, num_points)

    sizes = args.dim_feedforward, args.dropout
    encoder_layer = DeformableEncoderLayer(attention(args.enc_n_points), *sizes)
    encoder = DeformableEncoder(encoder_layer, args.enc_layers)
    layer = build_decoder_layer(args, attention(args.dec_n_points), *sizes)
    return DeformableTransformer(
        encoder,
        decoder_class(args)(layer, args.dec_layers, args.look_forward_twice),
        d_model=args.hidden_dim,
        num_levels=args.num_feature_levels,
        two_stage=args.two_stage,
        temperature=args.pe_temperature,
    )


def build_layer_heads(args: Namespace) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Build the class and box heads of Deformable DETR.

    With box refinement each decoder layer has its own heads, and two stages add a pair for the proposals.
    Without it all layers share one pair.
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


def freeze_unreached_heads(model: nn.Module, criterion: nn.Module) -> None:
    """Freeze heads that no loss reaches: with --no_aux_loss in two stages, or where coefficients are 0.

    DDP would wait for their gradients.
    """
    terms = {kind: set(row.coef) - {'mask', 'dice'} for kind, row in criterion.table.items()}
    proposals = terms.pop('enc', set())
    if not any('_enc' in name for name in criterion.weight_dict):
        proposals = set()
    if model.class_embed_o2m is not None:  # the one-to-many branch has class heads of its own
        model.class_embed_o2m.requires_grad_('ce' in terms['o2m'])
        terms['o2m'] -= {'ce'}
    decoder = set().union(*terms.values())
    two_stage = getattr(model, 'first_stage', None) is not None
    for heads, relevant in ((model.class_embed, {'ce'}), (model.bbox_embed, (decoder | proposals) - {'ce'})):
        layers = heads[:-1] if two_stage else heads
        if not decoder & relevant:
            layers.requires_grad_(False)
        if two_stage and not proposals & relevant:
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
