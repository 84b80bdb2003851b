"""What a file of weights records beside them: flags and classes."""

from argparse import Namespace
from dataclasses import dataclass

from torch import Tensor

from datasets.class_map import PANOPTIC_CLASSES, ClassMap
from models.weights.names import COCO_IDS, to_official
from models.weights.read import extract_weights
from util.errors import UserError


@dataclass(frozen=True)
class SharedClasses:
    """Classes of one name in a file and in a model. pairs: index there and here. there, here: number of class indices."""

    pairs: list[tuple[int, int]]
    there: int
    here: int
    names: list[str]

    def rows(self, theirs: Tensor, ours: Tensor) -> Tensor:
        """Return the rows of a class head: theirs for shared classes and for 'no object', if both have it, else ours."""
        if theirs.shape[1:] != ours.shape[1:]:
            return ours
        pairs = [
            *self.pairs,
            *[(self.there, self.here)] * (len(theirs) > self.there and len(ours) > self.here),
        ]
        rows = ours.clone()
        for there, here in pairs:
            rows[here] = theirs[there]
        return rows


def extract_flags(checkpoint: dict, resume: bool = False) -> dict:
    """Return the flags of the run that wrote a checkpoint (or those in transformers' configuration), {} if it has none.

    resume: with the learning rate drops that the schedule of an official run has.
    """
    if 'config' in checkpoint and 'args' not in checkpoint:
        return flags_of_transformers(checkpoint['config'])
    flags = checkpoint.get('args', {})
    flags = dict(vars(flags)) if isinstance(flags, Namespace) else flags
    if flags.get('use_ms_detr') and 'ms_variant' not in flags:  # the official programs have the same flags
        state = checkpoint.get('model', {})
        flags |= {'ms_variant': 'a'} if any('class_embed_o2m' in name for name in state) else {}
    schedule = checkpoint.get('lr_scheduler', {}) if resume else {}
    if 'milestones' in schedule:
        return flags | {'lr_drop_epochs': sorted(schedule['milestones'].elements())}
    return flags | {'lr_drop': schedule['step_size']} if 'step_size' in schedule else flags


# Flags in a configuration of transformers, where they have another name; it may leave out what has the usual value.
TRANSFORMERS_FLAGS = {
    'd_model': 'hidden_dim', 'encoder_layers': 'enc_layers', 'decoder_layers': 'dec_layers',
    'encoder_attention_heads': 'nheads', 'encoder_ffn_dim': 'dim_feedforward', 'encoder_n_points': 'enc_n_points',
    'decoder_n_points': 'dec_n_points', 'position_embedding_type': 'position_embedding',
    'num_queries': 'num_queries', 'num_feature_levels': 'num_feature_levels', 'dilation': 'dilation',
    'with_box_refine': 'with_box_refine', 'two_stage': 'two_stage',
}  # fmt: skip
RESNET_LAYERS = {(3, 4, 6, 3): 'resnet50', (3, 4, 23, 3): 'resnet101', (2, 2, 2, 2): 'resnet18'}


def flags_of_transformers(config: dict) -> dict:
    """Return our flags for the `config.json` of a detector of transformers.

    Raises:
        UserError: it is no DETR, Conditional DETR or Deformable DETR, or one that cannot be built here.
    """
    kind = config.get('model_type')
    if kind not in ('detr', 'conditional_detr', 'deformable_detr'):
        raise UserError(
            f'the configuration beside the weights is that of {kind!r}: known are detr, conditional_detr, deformable_detr'
        )
    heads = config.get('encoder_attention_heads', 8), config.get('decoder_attention_heads', 8)
    if heads[0] != heads[1]:
        raise UserError(
            f'the configuration has {heads[0]} attention heads in the encoder and {heads[1]} in the decoder: here both '
            'have --nheads'
        )
    usual = {'hidden_dim': 256, 'nheads': 8, 'enc_layers': 6, 'dec_layers': 6}
    flags = usual | {ours: config[theirs] for theirs, ours in TRANSFORMERS_FLAGS.items() if theirs in config}
    body = config.get('backbone_config') or {}
    name = config.get('backbone') or body.get('backbone')
    if body.get('model_type') == 'resnet':
        name = RESNET_LAYERS.get(tuple(body.get('depths', (3, 4, 6, 3))))
    if name is None and body:
        raise UserError(f'the configuration has a backbone that is not known: {body.get("model_type")!r}')
    flags['backbone'] = name or 'resnet50'
    return flags | {'conditional': kind == 'conditional_detr', 'deformable': kind == 'deformable_detr'}


def extract_class_map(checkpoint: dict, source: str) -> ClassMap:
    """Return the classes that a file tells, or COCO's for heads of their number; others are called by their index."""
    if 'class_map' in checkpoint:
        return ClassMap.from_dict(checkpoint['class_map'])
    layout, state = to_official(extract_weights(checkpoint, source=source))
    rows = next(
        (len(state[name]) for name in ('class_embed.0.bias', 'class_embed.bias') if name in state), None
    )
    if rows is None:
        raise UserError(f'{source} has no class head ({layout} names), so it is no detector of this family')
    rows -= 'class_embed.bias' in state and 'transformer.decoder.ref_point_head.layers.0.weight' not in state
    names = names_in(checkpoint)
    if rows == PANOPTIC_CLASSES:
        return ClassMap.coco(PANOPTIC_CLASSES)
    if rows == 91 or (
        rows == len(COCO_IDS) and layout in ('detrex', 'mmdetection') and len(names) in (0, 80)
    ):
        return ClassMap.coco()  # `load_checkpoint` gives each class of 80 the row of its id
    names = names if len(names) == rows else [f'class {index}' for index in range(rows)]
    return ClassMap(tuple(range(rows)), tuple(names))


def shared_classes(checkpoint: dict, class_map: ClassMap) -> SharedClasses | None:
    """Return the classes of a file that a data set has too, by their names; None if all are the same, or none is."""
    try:
        theirs = extract_class_map(checkpoint, '')
    except UserError:  # its class heads are gone
        return None
    if theirs.names == class_map.names:
        return None
    here = {name: index for index, name in enumerate(class_map.names) if name is not None}
    pairs = {name: (index, here[name]) for index, name in enumerate(theirs.names) if name in here}
    if not pairs:
        return None
    return SharedClasses(list(pairs.values()), theirs.num_classes, class_map.num_classes, list(pairs))


def names_in(checkpoint: dict) -> list[str]:
    """Return the class names that mmdetection (2 and 3) or transformers keep in a file, [] if none."""
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, dict) else {}
    dataset = meta.get('dataset_meta')
    names = meta.get('CLASSES') or (dataset if isinstance(dataset, dict) else {}).get('classes')
    if names is None:
        labels = checkpoint.get('config', {}).get('id2label', {})
        names = [labels[key] for key in sorted(labels, key=int)]
    return list(names) if isinstance(names, list | tuple) else []
