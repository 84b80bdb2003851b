"""
Compare the flags that a checkpoint records with those of a model, and take them from it.

A file trained with --dilation or another --nheads has the shapes of one trained without, and gives other
boxes. Only its flags show it.
"""

import json
from argparse import Namespace
from collections.abc import Collection, Mapping, Set
from typing import Any

from util.errors import UserError

from .declare import DETECTION, NETWORK, RUN
from .flags import FLAGS
from .rules import is_shards
from .settle import DETECTOR, Settled, check_values, in_our_names, settle

REMEDY = 'Give this flag, or another checkpoint of its run'
WHOLE = (
    'backbone',
    'hidden_dim',
    'nheads',
    'enc_layers',
    'dec_layers',
)  # in every record of all flags of a run
CHOOSE_FAMILY = ('conditional', 'deformable')
SOURCES = ('dataset_file', 'coco_path', 'val_images', 'val_ann', 'shapes_val', 'shapes_size')
PLACES_OF_DATA = {
    'dataset_file',
    'coco_path',
    *(f'{part}_{what}' for part in ('train', 'val') for what in ('images', 'ann')),
}
VIEW = ('img_size', 'max_size', 'aug', 'class_ids', 'batch_size')  # how images and classes reach the model


class NetworkFlags(dict):
    """Settled flags that decide what a network computes, without those that names of its weights show."""

    @classmethod
    def of(cls, args: Namespace) -> 'NetworkFlags':
        """Pick them from settled flags."""
        flags = [f for f in FLAGS.values() if f.kind == NETWORK and f.compared is True and f.fits(args)]
        return cls(
            {'family': args.family}
            | {flag.name: one_name(flag.name, getattr(args, flag.name)) for flag in flags}
        )

    def differences(self, recorded: Mapping) -> dict[str, tuple]:
        """Return the flags in a file that differ: its value, and that of this model.

        A flag that is missing has its default if the file has the flags of a whole run, and is not known
        otherwise.
        """
        if not is_whole(recorded):
            theirs = {name: one_name(name, value) for name, value in recorded.items()}
        else:
            theirs = NetworkFlags.of(settle_recorded(recorded))
            if theirs['family'] != self['family']:
                return {'family': (theirs['family'], self['family'])}
        return {
            name: (theirs[name], mine)
            for name, mine in self.items()
            if name in theirs and theirs[name] != mine
        }


def one_name(name: str, value: object) -> object:
    same = FLAGS[name].same if name in FLAGS else None
    return same.get(value, value) if same and isinstance(value, str) else value


def is_whole(recorded: Mapping) -> bool:
    """Return whether these are all flags of a run, so that what is missing has its default."""
    return all(flag in recorded for flag in WHOLE)


def settle_recorded(recorded: Mapping) -> Settled:
    """Return the detector's flags in a file of this or an official repository, with defaults for those it
    lacks.

    Raises:
        UserError: they contradict each other.
    """
    known = set(recorded)
    # Only the official Conditional DETR has the focal loss and no feature levels.
    conditional = 'family' not in known and 'focal_alpha' in known and 'num_feature_levels' not in known
    more = {'backbone_weights': 'none'} | ({'conditional': True} if conditional else {})
    try:
        return settle(Namespace(**{**recorded, **more}), DETECTOR)
    except UserError as error:
        raise UserError(f'in args, {error}') from error


def adopt(
    args: Namespace, given: Set[str], recorded: Mapping, resume: bool = False, strict: bool = True
) -> Namespace:
    """Return a copy of flags in which those that were not given are the recorded ones.

    These are flags of the detector (`Flag.adopted`), and to resume a run all that do not belong to one start
    of the program.

    Args:
        given: names of the flags that win: those on the command line, and those of a recipe.
        recorded: flags in a checkpoint, under our names or official ones.
        strict: refuse given flags that contradict the weights; else only another family.

    Raises:
        UserError: a recorded value makes no sense, or a given flag contradicts the weights; the message has
            both values.
    """
    recorded = in_our_names(recorded)
    recorded = {name: value for name, value in recorded.items() if is_sound(name, value) or name not in given}
    try:
        theirs = settle_recorded(recorded)
        others = of_training(args, given, recorded) if resume else {}
    except UserError as error:
        raise UserError(f'{error}. {REMEDY}') from error
    names = [name for name, flag in FLAGS.items() if flag.kind in DETECTOR and not flag.launch]
    if not is_whole(recorded):
        names = [name for name in names if name in recorded]
    for name in given & set(names if strict else CHOOSE_FAMILY):
        check_given(name, getattr(args, name), theirs, recorded)
    taken = [
        name for name in names if name not in given and (resume or FLAGS[name].adopted in (True, *given))
    ]
    return Namespace(**vars(args) | {name: getattr(theirs, name) for name in taken} | others)


def of_training(args: Namespace, given: Set[str], recorded: Mapping) -> dict:
    """Return the recorded flags of training, data and run that a resumed run takes.

    Raises:
        UserError: one makes no sense.
    """
    left_out = given | (PLACES_OF_DATA if given & PLACES_OF_DATA else set())
    flags = [
        flag
        for flag in FLAGS.values()
        if flag.kind not in DETECTOR
        and not flag.launch
        and flag.name in recorded
        and flag.name not in left_out
    ]
    taken = {
        flag.name: recorded[flag.name] for flag in flags if not crowded_out(flag.name, args, given, recorded)
    }
    try:
        check_values(taken, flags)
    except UserError as error:
        raise UserError(f'in args, {error}') from error
    return taken


def is_sound(name: str, value: object) -> bool:
    return name not in FLAGS or FLAGS[name].problem(value) is None


def check_given(name: str, value: Any, theirs: Namespace, recorded: Mapping) -> None:
    """Refuse a given flag of the detector that contradicts weights, which were trained with `theirs`."""
    flag, trained = FLAGS[name], getattr(theirs, name)
    if name in CHOOSE_FAMILY:
        same, text = theirs.family == name, f'the family {theirs.family}'
    else:  # of those that are not compared, shapes and names decide, or this run is free to choose
        same = not flag.compared or flag.kind == DETECTION or one_name(name, value) == one_name(name, trained)
        text = 'it off' if trained is False else f'{trained}'
    if not same:
        if name not in recorded and name not in CHOOSE_FAMILY:
            text += ', the default, since their file does not know this flag'
        raise UserError(
            f'--{name}{"" if value is True else f" {value}"} contradicts the weights, which were trained '
            f'with {text}: leave it out, or name other weights'
        )


# A given flag of another value leaves no place for the second one of a checkpoint.
CROWDED_OUT = {'lr_drop_epochs': ('lr_drop', 'lr_schedule'), 'lr_schedule': ('lr_drop_epochs',)}


def crowded_out(name: str, args: Namespace, given: Collection[str], recorded: Mapping) -> bool:
    rivals = [rival for rival in CROWDED_OUT.get(name, ()) if rival in given]
    return any(getattr(args, rival) != recorded.get(rival) for rival in rivals)


def changes_text(args: Namespace, recorded: Mapping) -> str:
    """Describe the settled flags of a resumed run that are not the recorded ones; '' if all are."""
    recorded = in_our_names(recorded)
    flags = [
        flag for flag in FLAGS.values() if not flag.launch and flag.name in recorded and flag.kind != RUN
    ]
    return ', '.join(
        f'--{flag.name} {recorded[flag.name]} -> {getattr(args, flag.name)}'
        for flag in flags
        if one_name(flag.name, recorded[flag.name]) != one_name(flag.name, getattr(args, flag.name))
    )


def data_of(args: Namespace, given: Collection[str], recorded: Mapping) -> dict:
    """Return the flags of a run that an evaluation of it needs and that were not given: sizes, and the data
    if none is named.
    """
    recorded = in_our_names(recorded)
    names: tuple[str, ...] = (*SOURCES, *VIEW)
    kind, shapes = recorded.get('dataset_file'), {'shapes_val', 'shapes_size'}
    if set(SOURCES) - shapes & set(given):
        same = args.dataset_file == kind if 'dataset_file' in given else kind == 'lvis'
        names = (*VIEW, *(('dataset_file', *shapes) if same and not is_shards(args.val_ann) else ()))
    return {name: recorded[name] for name in names if name not in given and name in recorded}


def as_json(args: Settled) -> str:
    """Return the content of OUT/flags.json, which --config reads: the family, and every settled flag by kind."""
    kinds: dict[str, dict] = {}
    for flag in FLAGS.values():
        kinds.setdefault(flag.kind, {})[flag.name] = getattr(args, flag.name)
    return json.dumps({'family': args.family, 'settled': kinds}, indent=1, default=str)
