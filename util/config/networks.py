"""
Facts about decoders and backbones that flags depend on.

`DECODERS` has one record for each decoder. A new variant of the decoder of Deformable DETR needs a record
here and the class that it names. `KINDS` has one record for all backbones with the same prefix;
`models.backbone.BACKBONES` builds them, and a test compares the networks with their records.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TITLES = {'detr': 'DETR', 'conditional': 'Conditional DETR', 'deformable': 'Deformable DETR'}


@dataclass(frozen=True)
class Usual:
    """A default that depends on other flags: in words, and as a function of flags that are settled before."""

    text: str
    of: Callable[[Namespace], object]


@dataclass(frozen=True)
class Decoder:
    """All facts about a decoder that are needed before it is built.

    name: name of the record, and of the switch that chooses the decoder.
    family: family of the rest of the detector.
    build_with: module and class in `models`, such as `dino.DinoDecoder`.
    help: effect of its switch; '' if the family alone chooses the decoder.
    implies: switches that it turns on.
    defaults: flag to default, where that differs from the default of the family.
    encoding_offset: number added to positions in cells before they are encoded.
    as_mmdetection: matching of classes and averages of losses use mmdetection's epsilons, not DETR's.
    """

    name: str
    family: str
    build_with: str
    help: str = ''
    implies: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    encoding_offset: float = 0.0
    as_mmdetection: bool = False


DECODERS = {
    decoder.name: decoder
    for decoder in (
        Decoder('detr', 'detr', 'transformer.TransformerDecoder'),
        Decoder('conditional', 'conditional', 'conditional_detr.ConditionalDecoder'),
        Decoder('deformable', 'deformable', 'deformable_transformer.DeformableDecoder', encoding_offset=-0.5),
        Decoder(
            'dino',
            'deformable',
            'dino.DinoDecoder',
            help="use DINO's decoder (arXiv:2203.03605), which computes positions from boxes and chooses "
            'proposals by their best class',
            implies=('with_box_refine', 'two_stage', 'mixed_selection', 'look_forward_twice'),
            defaults={
                'finest_stride': Usual(
                    '4 with 5 or more levels', lambda a: 4 if a.num_feature_levels >= 5 else 8
                ),
                'input_proj_bias': False,
                'pe_temperature': 20.0,
                'dim_feedforward': 2048,
                'dropout': 0.0,
                'num_queries': 900,
                'topk_eval': 300,
                'soft_nms_threshold': 0.8,
                'clamp_boxes': True,
                'epochs': 12,
                'lr_drop': 11,
                'lr_linear_proj_names': [],
                'cls_loss_coef': 1.0,
                'class_loss': 'quality_focal',
                'with_coord_feat': False,
            },
            as_mmdetection=True,
        ),
    )
}
VARIANTS = [decoder for decoder in DECODERS.values() if decoder.help]


def decoder_of(args: Namespace) -> Decoder:
    """Return the record of the decoder that flags choose; `family` must be settled."""
    chosen = (decoder for decoder in VARIANTS if getattr(args, decoder.name, False))
    return next(chosen, DECODERS[args.family])


def follows_mmdetection(args: Namespace) -> bool:
    """Return whether a detector is trained with the epsilons of mmdetection."""
    return decoder_of(args).as_mmdetection or bool(args.co_aux_heads)


@dataclass(frozen=True)
class BackboneKind:
    """Facts about all backbones whose names have the same prefix.

    supports: flags for some backbones only that these have; `use_checkpoint` means its `backbone`.
    stages: stages with a feature map. Stage s has stride 2^(s + 1), or half of it with --dilation if last.
    pyramid: strides of the levels that are computed from the only map; () if there are several maps.
    """

    supports: tuple[str, ...]
    stages: range = range(1, 5)
    pyramid: tuple[int, ...] = ()


CONVOLUTIONAL = ('dilation', 'backbone_norm', 'backbone_stages')
# By the prefix of a name. The last record is for all others, which torchvision has.
KINDS = {
    'timm/': BackboneKind(CONVOLUTIONAL),
    'swin_': BackboneKind(('drop_path_rate', 'backbone_stages', 'use_checkpoint')),
    'vit_': BackboneKind(
        ('drop_path_rate', 'lr_layer_decay', 'use_checkpoint'), range(3, 4), (4, 8, 16, 32, 64)
    ),
    '': BackboneKind((*CONVOLUTIONAL, 'use_checkpoint')),
}


def kind_of(name: str) -> BackboneKind:
    return next(kind for prefix, kind in KINDS.items() if name.startswith(prefix))


def backbone_maps(args: Namespace) -> range:
    """Return the stages whose maps the detector reads: the last, or all from the first or second on."""
    stages = kind_of(args.backbone).stages
    if len(stages) == 1:
        return stages
    if args.family != 'deformable' or args.num_feature_levels == 1:
        first = args.backbone_stages
    else:
        first = 1 if args.finest_stride == 4 else 2
    return range(first, args.backbone_stages + 1)


def returned_maps(args: Namespace) -> range:
    """Return the stages whose maps the backbone returns: those that the detector reads, or all for masks."""
    maps = backbone_maps(args)
    return range(1, maps[-1] + 1) if args.masks else maps


def has_pyramid(args: Namespace) -> bool:
    """Return whether all levels are computed from the only map of the backbone."""
    return bool(kind_of(args.backbone).pyramid) and (args.num_feature_levels or 1) > 1


def level_strides(args: Namespace) -> list[int]:
    """Return the strides of the feature maps of Deformable DETR, finest first."""
    if has_pyramid(args):
        return list(kind_of(args.backbone).pyramid)
    strides = [2 ** (stage + 1) for stage in backbone_maps(args)]
    if args.dilation:
        strides[-1] //= 2
    while args.family == 'deformable' and len(strides) < args.num_feature_levels:
        strides.append(2 * strides[-1])
    return strides
