"""
Compare the flags that a checkpoint records with those of a model.

A file trained with --dilation or another --nheads has the shapes of one trained without, and gives other boxes. Only its
flags tell.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Mapping

from util.errors import UserError

from .defaults import resolve_args
from .flags import add_model_args

# Flags of the detector that do not change what a trained network computes. Those of detections act after it.
TRAINING_FLAGS = (
    'local_init', 'look_forward_twice', 'backbone_weights', 'backbone_norm', 'drop_path_rate', 'backbone_frozen_stages',
    'dropout', 'use_checkpoint', 'use_aux_ffn',
)  # fmt: skip
# Names of entries tell these when weights are loaded.
TOLD_BY_NAMES = ('num_queries', 'input_proj_bias', 'use_ms_detr', 'ms_variant')
CHOOSE_FAMILY = ('conditional', 'deformable')
ONLY_DEFORMABLE = (
    'with_box_refine', 'two_stage', 'mixed_selection', 'dino', 'num_feature_levels', 'finest_stride', 'enc_n_points',
    'dec_n_points',
)  # fmt: skip
SAME = {'v2': 'sine', 'v3': 'learned'}  # two names of one position embedding
WHOLE = (
    'backbone',
    'hidden_dim',
    'nheads',
    'enc_layers',
    'dec_layers',
)  # in every record of all flags of a run


def model_flags(group: str = '') -> list[str]:
    """Return the names of the flags of the detector, of all or of one group of --help."""
    parser = ArgumentParser(add_help=False)
    add_model_args(parser)
    groups = [part for part in parser._action_groups if group in ('', part.title)]
    return [action.dest for part in groups for action in part._group_actions]


def detection_flags() -> list[str]:
    """Return the names of the flags that act after the network, so that they contradict no weights."""
    return model_flags('detections')


class NetworkFlags(dict):
    """Settled flags that decide what a network computes, without those that its names tell."""

    @classmethod
    def of(cls, args: Namespace) -> 'NetworkFlags':
        """Pick them from flags settled by `resolve_args`."""
        left_out = (*TRAINING_FLAGS, *detection_flags(), *TOLD_BY_NAMES, *CHOOSE_FAMILY)
        if args.family != 'deformable':
            left_out += ONLY_DEFORMABLE
        values = {flag: getattr(args, flag) for flag in model_flags() if flag not in left_out}
        values['position_embedding'] = SAME.get(args.position_embedding, args.position_embedding)
        return cls({'family': args.family} | values)

    def differences(self, recorded: Mapping) -> dict[str, tuple]:
        """Return the flags in a file that differ: its value, and that of this model.

        A flag that is missing has its default if the file has the flags of a whole run, and is not known otherwise.
        """
        if not is_whole(recorded):
            return {
                flag: (recorded[flag], value)
                for flag, value in self.items()
                if flag in recorded and SAME.get(recorded[flag], recorded[flag]) != value
            }
        theirs = NetworkFlags.of(settle(recorded))
        if theirs['family'] != self['family']:
            return {'family': (theirs['family'], self['family'])}
        return {flag: (theirs[flag], value) for flag, value in self.items() if theirs[flag] != value}


def is_whole(recorded: Mapping) -> bool:
    """Tell whether these are all flags of a run, so that what is missing has its default."""
    return all(flag in recorded for flag in WHOLE)


def settle(recorded: Mapping) -> Namespace:
    """Return the detector's flags in a file of this or an official repository, with defaults for those it lacks.

    Raises:
        UserError: they contradict each other.
    """
    known = set(recorded)
    # Only the official Conditional DETR has the focal loss and no feature levels.
    conditional = 'family' not in known and 'focal_alpha' in known and 'num_feature_levels' not in known
    more = {'backbone_weights': 'none'} | ({'conditional': True} if conditional else {})
    try:
        return resolve_args(Namespace(**{**recorded, **more}))
    except UserError as error:
        raise UserError(f'the flags in the checkpoint: {error}') from error


def adopt(args: Namespace, given: Collection[str], recorded: Mapping) -> Namespace:
    """Return a copy of flags with those of the detector taken from a checkpoint, as far as they were not given.

    Args:
        given: names of the flags on the command line.
        recorded: flags in the checkpoint, or those of a row of the zoo.

    Raises:
        UserError: a given flag contradicts the checkpoint; the message has both values.
    """
    theirs = settle(recorded)
    network = NetworkFlags.of(theirs)
    flags = set(model_flags())
    if not is_whole(recorded):
        flags &= set(recorded)
    for flag in flags & set(given):
        value = getattr(args, flag)
        if flag in CHOOSE_FAMILY:
            same = theirs.family == flag
        elif flag in (*TRAINING_FLAGS, *detection_flags(), 'num_queries', 'input_proj_bias'):
            continue  # shapes tell the last two
        else:
            same = SAME.get(value, value) == network.get(flag, getattr(theirs, flag))
        if not same:
            raise UserError(
                f'--{flag}{"" if value is True else f" {value}"} on the command line contradicts the weights, which were trained '
                f'with {describe(flag, theirs, recorded)}: leave it out, or name other weights'
            )
    names = flags - set(given) - {'backbone_weights', 'use_checkpoint', 'eval_module'}
    return Namespace(**vars(args) | {name: getattr(theirs, name) for name in names})


def describe(flag: str, args: Namespace, recorded: Mapping) -> str:
    if flag in CHOOSE_FAMILY:
        return f'the family {args.family}'
    value = getattr(args, flag)
    text = 'it off' if value is False else f'{value}'
    return text if flag in recorded else f'{text}, the default, since their file does not know this flag'
