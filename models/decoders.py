"""The classes that decoders consist of: `util.config.networks.DECODERS` names them, and flags choose their layers."""

from argparse import Namespace
from importlib import import_module

from torch import nn

from util.config.networks import decoder_of

from .conditional_detr import ConditionalDecoderLayer
from .deformable_transformer import DeformableDecoderLayer
from .ms_detr import (
    ConditionalDecoderLayerA,
    ConditionalDecoderLayerB,
    DeformableDecoderLayerA,
    DeformableDecoderLayerB,
)
from .transformer import TransformerDecoderLayer

# Family -> the plain decoder layer, and those of MS-DETR's variants a and b.
LAYERS = {
    'detr': (TransformerDecoderLayer,),
    'conditional': (ConditionalDecoderLayer, ConditionalDecoderLayerA, ConditionalDecoderLayerB),
    'deformable': (DeformableDecoderLayer, DeformableDecoderLayerA, DeformableDecoderLayerB),
}


def decoder_class(args: Namespace) -> type[nn.Module]:
    """Return the class that the record of the chosen decoder names."""
    module, name = decoder_of(args).build_with.split('.')
    return getattr(import_module(f'.{module}', __package__), name)


def build_decoder_layer(args: Namespace, *sizes: object, **options: object) -> nn.Module:
    """Build the decoder layer that the flags choose, from arguments that all layers of its family take."""
    index = 0 if not args.use_ms_detr else 1 if args.ms_variant == 'a' else 2
    layer = LAYERS[args.family][index](*sizes, **options)
    if args.use_aux_ffn:
        layer.add_aux_ffn(args.hidden_dim, args.dim_feedforward)
    return layer
