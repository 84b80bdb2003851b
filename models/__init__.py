"""Flags become modules, here only: `add_model_args`, `resolve_args`, `build_detector`, `build_model`."""

from argparse import ArgumentParser, Namespace

from torch import nn

from .backbone import NORM_LAYERS, Joiner, build_backbone
from .conditional_detr import ConditionalDecoder, ConditionalDecoderLayer
from .detr import DETR
from .heads import box_head, class_head
from .position_encoding import build_position_encoding
from .postprocess import SoftmaxPostProcess, TopKPostProcess
from .transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

# What a flag means when it is not given: the official value of the family.
FAMILY_DEFAULTS = {
    'detr': {
        'num_queries': 100,
        'set_cost_class': 1.0,
        'cls_loss_coef': 1.0,
        'epochs': 300,
        'lr_drop': 200,
        'save_every': 100,
    },
    'conditional': {
        'num_queries': 300,
        'set_cost_class': 2.0,
        'cls_loss_coef': 2.0,
        'epochs': 50,
        'lr_drop': 40,
        'save_every': 10,
    },
}
NUM_CLASSES = 91  # of COCO, where no data set has said otherwise


def family_default(flag: str) -> str:
    """Text for the help of a flag whose default depends on the family."""
    values = {family: table[flag] for family, table in FAMILY_DEFAULTS.items()}
    return ', '.join(f'{value:g} for {family}' for family, value in values.items())


def add_model_args(parser: ArgumentParser) -> None:
    """Declare the flags of model, matching and losses."""
    family = parser.add_argument_group('model family (plain DETR when no flag of a variant is given)')
    family.add_argument('--conditional', action='store_true', help='Conditional DETR (arXiv:2108.06152)')
    family.add_argument(
        '--local_init',
        default=0.0,
        type=float,
        metavar='GAIN',
        help='Conditional DETR: start with attention around the reference points, as sharp as GAIN says; helps small models that '
        'learn from random numbers, for instance 12 (default: 0, the official initial values)',
    )

    backbone = parser.add_argument_group('backbone')
    backbone.add_argument('--backbone', default='resnet50', metavar='NAME',
                          help='resnet10 to resnet101, mobilenet_v2, or timm/NAME for any feature '
                               'network of timm (default: %(default)s)')  # fmt: skip
    backbone.add_argument('--backbone_weights', default='imagenet', metavar='SOURCE',
                          help='imagenet (downloaded), none (random), or a file of a state dict under the names of '
                               'torchvision or timm; not read when a checkpoint is loaded (default: %(default)s)')  # fmt: skip
    backbone.add_argument('--backbone_norm', default='frozen', choices=NORM_LAYERS,
                          help='norm layers: frozen statistics with stem and first stage frozen (official), or batch or '
                               'group norms with everything trained, to start from random numbers (default: %(default)s)')  # fmt: skip
    backbone.add_argument('--backbone_stages', default=4, type=int, choices=(2, 3, 4),
                          help='stages used; 4 ends at stride 32, 3 at 16, 2 at 8 (default: %(default)s)')  # fmt: skip
    backbone.add_argument('--dilation', action='store_true',
                          help='dilate the last stage instead of striding: DC5, stride 16')  # fmt: skip
    backbone.add_argument('--position_embedding', default='sine', choices=('sine', 'learned', 'v2', 'v3'),
                          help='positional encoding of the picture; v2 = sine, v3 = learned (default: %(default)s)')  # fmt: skip
    backbone.add_argument(
        '--pe_temperature',
        default=10000,
        type=float,
        help='of sine encodings; about 20 resolves places better where there are few tokens (default: %(default)s)',
    )

    model = parser.add_argument_group('transformer')
    model.add_argument('--enc_layers', default=6, type=int, help='encoder layers (default: %(default)s)')
    model.add_argument('--dec_layers', default=6, type=int, help='decoder layers (default: %(default)s)')
    model.add_argument('--dim_feedforward', default=2048, type=int,
                       help='hidden width of the feed-forward blocks (default: %(default)s)')  # fmt: skip
    model.add_argument(
        '--hidden_dim', default=256, type=int, help='width of tokens and queries (default: %(default)s)'
    )
    model.add_argument(
        '--dropout', default=0.1, type=float, help='dropout probability (default: %(default)s)'
    )
    model.add_argument('--nheads', default=8, type=int, help='attention heads (default: %(default)s)')
    model.add_argument('--num_queries', type=int,
                       help=f'object queries, the most boxes a picture can get (default: {family_default("num_queries")})')  # fmt: skip
    model.add_argument('--pre_norm', action='store_true', help='norm in front of each sub-layer (DETR only)')

    matching = parser.add_argument_group('matching costs')
    matching.add_argument('--set_cost_class', type=float,
                          help=f'class (default: {family_default("set_cost_class")})')  # fmt: skip
    matching.add_argument(
        '--set_cost_bbox', default=5, type=float, help='L1 distance of boxes (default: %(default)s)'
    )
    matching.add_argument(
        '--set_cost_giou', default=2, type=float, help='generalised IoU (default: %(default)s)'
    )

    loss = parser.add_argument_group('loss coefficients')
    loss.add_argument(
        '--no_aux_loss', dest='aux_loss', action='store_false', help='supervise the last decoder layer only'
    )
    loss.add_argument(
        '--cls_loss_coef', type=float, help=f'class (default: {family_default("cls_loss_coef")})'
    )
    loss.add_argument(
        '--bbox_loss_coef', default=5, type=float, help='L1 distance of boxes (default: %(default)s)'
    )
    loss.add_argument(
        '--giou_loss_coef', default=2, type=float, help='generalised IoU (default: %(default)s)'
    )
    loss.add_argument('--eos_coef', default=0.1, type=float,
                      help="weight of the class 'no object' (DETR only; default: %(default)s)")  # fmt: skip
    loss.add_argument('--focal_alpha', default=0.25, type=float,
                      help='weight of positives in the focal loss (not DETR; default: %(default)s)')  # fmt: skip


def resolve_args(args: Namespace) -> Namespace:
    """A copy of `args` with every model flag present, the family named, and its defaults where a flag was not
    given.

    ValueError: flags that contradict each other.
    """
    parser = ArgumentParser()
    add_model_args(parser)
    defaults = vars(parser.parse_args([]))
    given = {name: value for name, value in vars(args).items() if value is not None}
    family = 'conditional' if given.get('conditional') else 'detr'
    resolved = Namespace(
        **{'num_classes': NUM_CLASSES} | defaults | vars(args) | FAMILY_DEFAULTS[family] | given
    )
    resolved.family = family
    check_args(resolved)
    return resolved


def check_args(args: Namespace) -> None:
    """Refuse what cannot be, before anything is built."""
    if args.hidden_dim % args.nheads or args.hidden_dim % 4:
        raise ValueError(
            f'--hidden_dim {args.hidden_dim} must be a multiple of --nheads {args.nheads} and of 4'
        )
    if args.family == 'conditional' and args.pre_norm:
        raise ValueError('--pre_norm exists for DETR only: leave it out, or leave out --conditional')
    if args.family != 'conditional' and args.local_init:
        raise ValueError('--local_init exists for Conditional DETR only: add --conditional, or leave it out')
    if args.dilation and args.backbone_stages != 4:
        raise ValueError(
            f'--dilation changes stage 4, but --backbone_stages is {args.backbone_stages}: give one of them'
        )
    for flag in ('enc_layers', 'dec_layers', 'num_queries', 'num_classes'):
        if getattr(args, flag) < 1:
            raise ValueError(f'--{flag} must be at least 1, not {getattr(args, flag)}')


def build_transformer(args: Namespace) -> Transformer:
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
    layer = ConditionalDecoderLayer(*sizes)
    transformer = Transformer(encoder, ConditionalDecoder(layer, args.dec_layers, norm, args.pe_temperature))
    if args.local_init:
        transformer.decoder.start_local(args.local_init)
    return transformer


def build_detector(
    args: Namespace, num_queries: dict[str, int], query_sources: nn.ModuleDict | None = None
) -> nn.Module:
    """The detector alone. args: resolved. num_queries: learned queries of each group, the inference group
    first.
    """
    backbone = Joiner(
        build_backbone(
            args.backbone,
            args.backbone_weights,
            args.dilation,
            args.backbone_norm,
            args.backbone_stages,
            train=getattr(args, 'lr_backbone', 1) > 0,
        ),
        build_position_encoding(args.position_embedding, args.hidden_dim, args.pe_temperature),
    )
    focal = args.family != 'detr'
    heads = (
        class_head(args.hidden_dim, args.num_classes, prior=0.01)
        if focal
        else class_head(args.hidden_dim, args.num_classes + 1),
        box_head(args.hidden_dim, start_at_reference=focal),
    )
    return DETR(backbone, build_transformer(args), heads, num_queries, args.aux_loss, query_sources)


def build_model(args: Namespace) -> tuple[nn.Module, nn.Module, dict[str, nn.Module]]:
    """Model, criterion and postprocessors from parsed flags (`main.get_args_parser`, or a part of its names).

    `args.num_classes` is 91 unless the data set has set it. ValueError: impossible flags.
    """
    from .training import build_supervision

    args = resolve_args(args)
    criterion, num_queries, query_sources = build_supervision(args)
    model = build_detector(args, num_queries, query_sources)
    return model, criterion, build_postprocessors(args)


def build_postprocessors(args: Namespace) -> dict[str, nn.Module]:
    """`bbox`: outputs to detections in pixels."""
    return {'bbox': SoftmaxPostProcess() if args.family == 'detr' else TopKPostProcess(num_select=100)}
