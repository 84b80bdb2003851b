"""Read what a file of weights records besides them: the flags of its model, and its classes."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from datasets.class_map import PANOPTIC_CLASSES, ClassMap
from models.weights.layouts import COCO_IDS, DINO_KEY, translate
from models.weights.read import extract_weights
from util.errors import UserError


def extract_flags(checkpoint: dict, resume: bool = False) -> dict:
    """Return the flags of the run that wrote a checkpoint, else of transformers' configuration, else {}.

    resume: add the learning rate drops of an official run, which its schedule has.
    """
    if 'config' in checkpoint and 'args' not in checkpoint:
        return read_config(checkpoint['config'])
    flags = checkpoint.get('args', {})
    flags = dict(vars(flags)) if isinstance(flags, Namespace) else flags
    if flags.get('use_ms_detr') and 'ms_variant' not in flags:  # the official programs have the same flags
        state = checkpoint.get('model', {})
        flags |= {'ms_variant': 'a'} if any('class_embed_o2m' in name for name in state) else {}
    schedule = checkpoint.get('lr_scheduler', {}) if resume else {}
    if 'milestones' in schedule:
        return flags | {'lr_drop_epochs': sorted(schedule['milestones'].elements())}
    return flags | {'lr_drop': schedule['step_size']} if 'step_size' in schedule else flags


# transformers' configuration --------------------------------------------------------------------------------
# Flag here -> its name there. A configuration may leave out a default.
CONFIG_NAMES = {
    'hidden_dim': 'd_model',
    'enc_layers': 'encoder_layers',
    'dec_layers': 'decoder_layers',
    'nheads': 'encoder_attention_heads',
    'dim_feedforward': 'encoder_ffn_dim',
    'position_embedding': 'position_embedding_type',
    'num_queries': 'num_queries',
    'dilation': 'dilation',
}
DEFORMABLE_CONFIG_NAMES = {
    'enc_n_points': 'encoder_n_points',
    'dec_n_points': 'decoder_n_points',
    'num_feature_levels': 'num_feature_levels',
    'with_box_refine': 'with_box_refine',
    'two_stage': 'two_stage',
}
# By the family of the model.
MODEL_TYPES = {'detr': 'detr', 'conditional': 'conditional_detr', 'deformable': 'deformable_detr'}
RESNET_LAYERS = {(3, 4, 6, 3): 'resnet50', (3, 4, 23, 3): 'resnet101', (2, 2, 2, 2): 'resnet18'}
# Flags of which transformers has one value only.
FIXED = {
    'pre_norm': False,
    'dino': False,
    'mixed_selection': False,
    'pe_temperature': 10000,
    'finest_stride': 8,
    'backbone_stages': 4,
}


def read_config(config: Mapping) -> dict:
    """Return our flags for the `config.json` of a detector of transformers.

    Raises:
        UserError: it is not a DETR, Conditional DETR or Deformable DETR, or one that cannot be built here.
    """
    kind = config.get('model_type')
    if kind not in MODEL_TYPES.values():
        raise UserError(f'the configuration is that of {kind!r}: known are {", ".join(MODEL_TYPES.values())}')
    heads = config.get('encoder_attention_heads', 8), config.get('decoder_attention_heads', 8)
    if heads[0] != heads[1]:
        raise UserError(
            f'the configuration has {heads[0]} attention heads in the encoder and {heads[1]} in the decoder: '
            'here both have --nheads'
        )
    body = config.get('backbone_config') or {}
    backbone = config.get('backbone') or body.get('backbone')
    if body.get('model_type') == 'resnet':
        backbone = RESNET_LAYERS.get(tuple(body.get('depths', (3, 4, 6, 3))))
    if backbone is None and body:
        raise UserError(f'the configuration has a backbone that is not known: {body.get("model_type")!r}')
    flags = {
        'hidden_dim': 256,
        'nheads': 8,
        'enc_layers': 6,
        'dec_layers': 6,
        'backbone': backbone or 'resnet50',
    }
    names = (CONFIG_NAMES | DEFORMABLE_CONFIG_NAMES).items()
    flags |= {name: config[key] for name, key in names if key in config}
    return flags | {name: kind == MODEL_TYPES[name] for name in ('conditional', 'deformable')}


def write_config(flags: Mapping, names: list[str | None]) -> dict:
    """Return the configuration of the same detector in transformers.

    Args:
        flags: settled flags of the detector, with `family`.
        names: name of each class index; None: no class.

    Raises:
        UserError: transformers has no such detector.
    """
    wrong = [flag for flag, value in FIXED.items() if flags.get(flag, value) not in (value, None)]
    wrong += ['use_ms_detr'] if flags.get('use_ms_detr') and flags.get('ms_variant') == 'b' else []
    if not str(flags['backbone']).startswith('resnet') or flags['backbone'] == 'resnet10':
        wrong.append('backbone')
    if wrong:
        raise UserError(
            f'transformers has no detector of --{wrong[0]} {flags[wrong[0]]}: only DETR, Conditional DETR '
            'and Deformable DETR with a ResNet can be written for it'
        )
    kind = MODEL_TYPES[flags['family']]
    known = CONFIG_NAMES | (DEFORMABLE_CONFIG_NAMES if kind == 'deformable_detr' else {})
    labels = {index: name or 'N/A' for index, name in enumerate(names)}
    return {key: flags[name] for name, key in known.items() if name in flags} | {
        'model_type': kind,
        'architectures': [f'{"".join(word.capitalize() for word in kind.split("_"))}ForObjectDetection'],
        'decoder_attention_heads': flags['nheads'],
        'decoder_ffn_dim': flags['dim_feedforward'],
        'two_stage_num_proposals': flags['num_queries'],
        'backbone': flags['backbone'],
        'use_timm_backbone': True,
        'use_pretrained_backbone': False,
        'id2label': {str(index): name for index, name in labels.items()},
        'label2id': {name: index for index, name in labels.items()},
    }


# Classes ----------------------------------------------------------------------------------------------------


def extract_class_map(checkpoint: dict, source: str) -> ClassMap:
    """Return the classes that a file records.

    Without a record, heads of 91, 80 or 250 classes have COCO's, and the classes of others are called by
    their index.

    Raises:
        UserError: the file has no class head.
    """
    if 'class_map' in checkpoint:
        return ClassMap.from_dict(checkpoint['class_map'])
    layout, state = translate(extract_weights(checkpoint, source=source))
    heads = [state[name] for name in ('class_embed.0.bias', 'class_embed.bias') if name in state]
    if not heads:
        raise UserError(
            f'{source} has no class head ({layout} names), so it is not a detector of this family'
        )
    rows = len(heads[0])
    rows -= 'class_embed.bias' in state and DINO_KEY not in state  # 'no object'
    names = extract_class_names(checkpoint)
    if rows == PANOPTIC_CLASSES:
        return ClassMap.coco(PANOPTIC_CLASSES)
    without_gaps = rows == len(COCO_IDS) and layout in ('detrex', 'mmdetection') and len(names) in (0, 80)
    if rows == 91 or without_gaps:  # `load_checkpoint` gives each class of 80 the row of its id
        return ClassMap.coco()
    names = names if len(names) == rows else [f'class {index}' for index in range(rows)]
    return ClassMap(tuple(range(rows)), tuple(names))


def extract_class_names(checkpoint: dict) -> list[str]:
    """Return the class names that mmdetection (2 and 3) or transformers keep in a file; [] without any."""
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, dict) else {}
    dataset = meta.get('dataset_meta')
    names = meta.get('CLASSES') or (dataset if isinstance(dataset, dict) else {}).get('classes')
    if names is None:
        labels = checkpoint.get('config', {}).get('id2label', {})
        names = [labels[key] for key in sorted(labels, key=int)]
    return list(names) if isinstance(names, list | tuple) else []


@dataclass(frozen=True)
class SharedClasses:
    """Classes of one name in a file and in a model. pairs: index in the file and in the model, by name."""

    pairs: dict[str, tuple[int, int]]
    num_in_file: int
    num_in_model: int

    def fill(self, head: Tensor, rows: Tensor) -> Tensor:
        """Return a class head [K, ...] with a file's rows of shared classes, and of 'no object' in both."""
        if rows.shape[1:] != head.shape[1:]:
            return head
        filled = head.clone()
        for there, here in self.pairs.values():
            filled[here] = rows[there]
        if len(rows) > self.num_in_file and len(head) > self.num_in_model:
            filled[self.num_in_model] = rows[self.num_in_file]
        return filled


def shared_classes(checkpoint: dict, class_map: ClassMap) -> SharedClasses | None:
    """Return the classes of a file that a dataset has too, by their names; None if all or none are equal."""
    try:
        recorded = extract_class_map(checkpoint, '')
    except UserError:  # its class heads were removed
        return None
    if recorded.names == class_map.names:
        return None
    indices = {name: index for index, name in enumerate(class_map.names) if name is not None}
    pairs = {name: (index, indices[name]) for index, name in enumerate(recorded.names) if name in indices}
    return SharedClasses(pairs, recorded.num_classes, class_map.num_classes) if pairs else None
