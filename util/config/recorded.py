"""
Compare the flags that a checkpoint records with those of a model, and adopt them.

A network that was trained with --dilation, or with another --nheads, has the same shapes as one without, but
predicts other boxes. Only the flags in its file show the difference.
"""

import json
import os
from argparse import Namespace
from collections.abc import Collection, Mapping, Set
from typing import Any

from util.errors import UserError

from .declare import DETECTION, NETWORK, RUN
from .flags import FLAGS
from .rules import is_shards
from .settle import DETECTOR, Settled, check_values, settle, use_current_names

REMEDY = 'Give this flag, or another checkpoint of its run'
WHOLE = ('backbone', 'hidden_dim', 'nheads', 'enc_layers', 'dec_layers')  # in every record of a whole run
CHOOSE_FAMILY = ('conditional', 'deformable')
VAL_DATA = ('dataset_file', 'coco_path', 'val_images', 'val_ann', 'shapes_val', 'shapes_size')
SPLIT = ('train_images', 'train_ann', 'val_share', 'split_seed')  # validation data that are a share of others
DATA_PATHS = {'dataset_file', 'coco_path', 'train_images', 'train_ann', 'val_images', 'val_ann'}
TURNS = ('exif', 'upright')  # belong to the images of the data, like DATA_PATHS
# How images and classes reach the model.
VIEW = ('img_size', 'max_size', 'aug', 'class_ids', 'batch_size', 'pixel_range')
# Flags that may not be adopted if one of these has been given another value: it would contradict the value or
# undo it.
RIVALS = {
    'lr_drop_epochs': ('lr_drop', 'lr_schedule'),
    'lr_schedule': ('lr_drop_epochs',),
    'val_share': ('val_images', 'val_ann'),
    'split_seed': ('val_images', 'val_ann', 'val_share'),
}


class NetworkFlags(dict):
    """Settled flags that decide what a network computes, without those that the names of its weights show."""

    @classmethod
    def of(cls, args: Namespace) -> 'NetworkFlags':
        """Select them from settled flags."""
        flags = [f for f in FLAGS.values() if f.kind == NETWORK and f.is_compared and f.fits(args)]
        values = {flag.name: canonical(flag.name, getattr(args, flag.name)) for flag in flags}
        return cls({'family': args.family} | values)

    def differences(self, recorded: Mapping) -> dict[str, tuple]:
        """Return the flags whose recorded value differs: that value, and the value of this model.

        If the record has all flags of a run, a missing flag has its default. Otherwise it is unknown.
        """
        if is_whole(recorded):
            others: dict = NetworkFlags.of(settle_recorded(recorded))
            if others['family'] != self['family']:
                return {'family': (others['family'], self['family'])}
        else:
            others = {name: canonical(name, value) for name, value in recorded.items()}
        names = [name for name, value in self.items() if name in others and others[name] != value]
        return {name: (others[name], self[name]) for name in names}


def canonical(name: str, value: object) -> object:
    """Return the one of several values of a flag with the same meaning that is compared."""
    same = FLAGS[name].same if name in FLAGS else None
    return same.get(value, value) if same and isinstance(value, str) else value


def is_whole(recorded: Mapping) -> bool:
    """Return whether these are all flags of a run, so that a missing flag has its default."""
    return all(flag in recorded for flag in WHOLE)


def settle_recorded(recorded: Mapping) -> Settled:
    """Return the settled flags of the detector in a file of this or an official repository.

    Raises:
        UserError: they contradict each other.
    """
    # Only the official Conditional DETR has the focal loss and no feature levels.
    is_conditional = (
        'focal_alpha' in recorded and 'family' not in recorded and 'num_feature_levels' not in recorded
    )
    values = {**recorded, 'backbone_weights': 'none'} | ({'conditional': True} if is_conditional else {})
    try:
        return settle(Namespace(**values), DETECTOR)
    except UserError as error:
        raise UserError(f'in args, {error}') from error


def adopt(
    args: Namespace, given: Set[str], recorded: Mapping, resume: bool = False, strict: bool = True
) -> Namespace:
    """Return a copy of flags in which those that were not given have the recorded values.

    This holds for flags of the detector (`Flag.adopted`). To resume a run, it holds for all flags that do not
    belong to one start of the program.

    Args:
        given: names of the flags that win: those on the command line, and those of a recipe.
        recorded: flags in a checkpoint, under current or official names.
        strict: refuse given flags that contradict the weights; otherwise only another family.

    Raises:
        UserError: a recorded value is invalid, or a given flag contradicts the weights; the message has both
            values.
    """
    recorded = use_current_names(recorded)
    unused = [name for name in given & recorded.keys() & FLAGS.keys() if FLAGS[name].problem(recorded[name])]
    recorded = {name: value for name, value in recorded.items() if name not in unused}
    try:
        trained = settle_recorded(recorded)
        others = training_flags(args, given, recorded) if resume else {}
    except UserError as error:
        raise UserError(f'{error}. {REMEDY}') from error
    names = [name for name, flag in FLAGS.items() if flag.kind in DETECTOR and not flag.launch]
    if not is_whole(recorded):
        names = [name for name in names if name in recorded]
    for name in given & set(names if strict else CHOOSE_FAMILY):
        check_given(name, getattr(args, name), trained, recorded)
    adopted = [
        name for name in names if name not in given and (resume or FLAGS[name].adopted in (True, *given))
    ]
    return Namespace(**vars(args) | {name: getattr(trained, name) for name in adopted} | others)


def training_flags(args: Namespace, given: Set[str], recorded: Mapping) -> dict:
    """Return the recorded flags of training, data and run that a resumed run adopts.

    Raises:
        UserError: a value is invalid.
    """
    others = [
        name for name in given & DATA_PATHS if not is_same_path(getattr(args, name), recorded.get(name))
    ]
    excluded = given | (DATA_PATHS.union(TURNS) if others else set())
    for name, rivals in RIVALS.items():
        if any(rival in given and getattr(args, rival) != recorded.get(rival) for rival in rivals):
            excluded |= {name}
    flags = [
        flag
        for flag in FLAGS.values()
        if flag.kind not in DETECTOR and not flag.launch and flag.name in recorded.keys() - excluded
    ]
    values = {flag.name: recorded[flag.name] for flag in flags}
    try:
        check_values(values, flags)
    except UserError as error:
        raise UserError(f'in args, {error}') from error
    return values


def check_given(name: str, value: Any, trained: Namespace, recorded: Mapping) -> None:
    """Refuse a given flag of the detector that contradicts the flags with which the weights were trained."""
    flag, trained_value = FLAGS[name], getattr(trained, name)
    if name in CHOOSE_FAMILY:
        same, text = trained.family == name, f'the family {trained.family}'
    else:  # of flags that are not compared, shapes and names decide, or this run may choose
        same = (
            not flag.compared
            or flag.kind == DETECTION
            or canonical(name, value) == canonical(name, trained_value)
        )
        text = 'it off' if trained_value is False else f'{trained_value}'
    if not same:
        if name not in recorded and name not in CHOOSE_FAMILY:
            text += ', the default, since their file does not know this flag'
        raise UserError(
            f'--{name}{"" if value is True else f" {value}"} contradicts the weights, which were trained '
            f'with {text}: leave it out, or name other weights'
        )


def changes_text(args: Namespace, recorded: Mapping) -> str:
    """Describe the settled flags of a resumed run that differ from the recorded ones; '' if all are equal."""
    recorded = use_current_names(recorded)
    names = [
        name
        for name, flag in FLAGS.items()
        if flag.command and not flag.launch and flag.kind != RUN and name in recorded
    ]
    return ', '.join(
        f'--{name} {recorded[name]} -> {getattr(args, name)}'
        for name in names
        if canonical(name, recorded[name]) != canonical(name, getattr(args, name))
    )


def data_of(args: Namespace, given: Collection[str], recorded: Mapping) -> dict:
    """Return the flags of a run that its evaluation adopts: sizes, and the data unless others are given."""
    recorded = use_current_names(recorded)
    paths = DATA_PATHS.intersection(given)
    if all(is_same_path(getattr(args, name), recorded.get(name)) for name in paths):
        given = set(given) - paths
    split = SPLIT if 'val_share' not in given else ()
    names: tuple[str, ...] = (*VAL_DATA, *split, *TURNS, *VIEW)
    dataset, shapes = recorded.get('dataset_file'), {'shapes_val', 'shapes_size'}
    if set(VAL_DATA) - shapes & set(given):
        same = args.dataset_file == dataset if 'dataset_file' in given else dataset == 'lvis'
        names = (*VIEW, *(('dataset_file', *shapes) if same and not is_shards(args.val_ann) else ()))
    return {name: recorded[name] for name in names if name not in given and name in recorded}


def is_same_path(path: str, recorded: str | None) -> bool:
    return recorded is not None and os.path.realpath(path) == os.path.realpath(recorded)


def as_json(args: Settled) -> str:
    """Return the content of OUT/flags.json, which --config reads: the family, and all flags by kind."""
    kinds: dict[str, dict] = {}
    for flag in FLAGS.values():
        kinds.setdefault(flag.kind, {})[flag.name] = getattr(args, flag.name)
    return json.dumps({'family': args.family, 'settled': kinds}, indent=1, default=str)
