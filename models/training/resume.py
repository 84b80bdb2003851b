"""The flags of a run that is resumed or evaluated: those of its checkpoint, except where this command line gives others."""

from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Mapping

from datasets.flags import PREPARATION, adopt_data, check_data_args
from models.flags import OFFICIAL_NAMES, add_model_args
from models.recorded import TRAINING_FLAGS, adopt
from util.bounds import check_bounds
from util.checkpoint import flags_of
from util.errors import UserError
from util.flags import check_run_args
from util.logger import print_main

from .flags import add_training_args, resolve_all

OTHERS = (*PREPARATION, 'seed', 'amp')  # that a resumed run keeps, beside flags of detector and training

# A given flag of another value leaves no place for the second one of the checkpoint.
REPLACES = {
    'lr_drop': 'lr_drop_epochs',
    'lr_schedule': 'lr_drop_epochs',
    'lr_drop_epochs': 'lr_schedule',
    'accum_steps': 'total_batch_size',
}


def adopt_recorded(args: Namespace, given: Collection[str], checkpoint: dict, parser: ArgumentParser) -> None:
    """Take flags that are not among `given` from the checkpoint that is evaluated or resumed. In place.

    To evaluate these are the flags of the detector and the data, to resume those of the detector, of training and OTHERS.
    What the given ones change in a resumed run is printed.

    Args:
        parser: of all flags.

    Raises:
        UserError: a flag in the file is damaged, a given one contradicts the weights, or flags contradict each other.
    """
    recorded, ours = flags_of(checkpoint), 'class_map' in checkpoint
    if not recorded or not (args.eval or (args.resume and 'optimizer' in checkpoint)):
        return
    if ours:
        # None, where that is no default, was never a value.
        recorded = {
            f: value for f, value in recorded.items() if value is not None or parser.get_default(f) is None
        }
        check_recorded(args, given, recorded, parser)
    if args.eval:
        vars(args).update(vars(resolve_all(adopt(args, given, recorded))))
        if ours:
            adopt_data(args, given, recorded)
            check_data_args(args)
        return
    recorded = flags_of_run(checkpoint, recorded)
    vars(args).update(vars(resume_flags(args, given, recorded)))
    check_data_args(args)
    check_run_args(args)
    if text := changes_text(args, recorded):
        print_main(f'{args.resume} goes on with other flags: {text}')


def check_recorded(
    args: Namespace, given: Collection[str], recorded: Mapping, parser: ArgumentParser
) -> None:
    """Require that the flags which are to be taken from a checkpoint are such as a command line gives.

    Raises:
        UserError: one is not.
    """
    detector = ArgumentParser()
    add_model_args(detector)
    taken = Namespace(**{flag: value for flag, value in recorded.items() if flag not in given})
    try:
        check_bounds(taken, detector if args.eval else parser)
    except UserError as error:
        raise UserError(
            f'{args.resume or args.pretrained} is damaged: in args, {error}. Give this flag, or another checkpoint of its run'
        ) from error


def training_flags() -> list[str]:
    """Return the names of all flags of training."""
    parser = ArgumentParser()
    add_training_args(parser)
    return list(vars(parser.parse_args([])))


def flags_of_run(checkpoint: dict, flags: Mapping) -> dict:
    """Return the flags of the run that wrote a checkpoint under our names, with the drops of an official schedule's state."""
    recorded = {OFFICIAL_NAMES.get(flag, flag): value for flag, value in flags.items()}
    schedule = checkpoint['lr_scheduler']
    if 'milestones' in schedule:
        recorded['lr_drop_epochs'] = sorted(schedule['milestones'].elements())
    elif 'step_size' in schedule:
        recorded['lr_drop'] = schedule['step_size']
    return recorded


def resume_flags(args: Namespace, given: Collection[str], recorded: Mapping) -> Namespace:
    """Return a copy of `args` in which flags of detector and training, and OTHERS, are recorded ones unless they were given.

    Raises:
        UserError: a given flag contradicts the weights, or flags contradict each other.
    """
    resumed = adopt(args, given, recorded)
    names = {*training_flags(), *OTHERS} & recorded.keys()
    replaced = {
        REPLACES[flag]
        for flag in REPLACES.keys() & names & set(given)
        if getattr(args, flag) != recorded[flag]
    }
    for name in names - set(given) - replaced:
        setattr(resumed, name, recorded[name])
    return resolve_all(resumed)


def changes_text(args: Namespace, recorded: Mapping) -> str:
    """Describe the flags of a resumed run that are not the recorded ones, '' if all are."""
    names = [*training_flags(), *OTHERS, *TRAINING_FLAGS]
    changed = {
        name: f'--{name} {recorded[name]} -> {getattr(args, name)}'
        for name in names
        if name in recorded and recorded[name] != getattr(args, name)
    }
    return ', '.join(
        text for name, text in changed.items() if name not in ('backbone_weights', 'use_checkpoint')
    )
