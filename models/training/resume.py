"""The flags of a resumed run: those of its checkpoint, except where this command line gives others."""

from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Mapping

from models.flags import OFFICIAL_NAMES
from models.recorded import TRAINING_FLAGS, adopt

from .flags import add_training_args, resolve_all

# A given flag of another value leaves no place for the second one of the checkpoint.
REPLACES = {
    'lr_drop': 'lr_drop_epochs',
    'lr_schedule': 'lr_drop_epochs',
    'lr_drop_epochs': 'lr_schedule',
    'accum_steps': 'total_batch_size',
}


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


def resume_flags(
    args: Namespace, given: Collection[str], recorded: Mapping, others: Collection[str]
) -> Namespace:
    """Return a copy of `args` in which flags of detector and training, and `others`, are recorded ones unless they were given.

    Raises:
        UserError: a given flag contradicts the weights, or flags contradict each other.
    """
    resumed = adopt(args, given, recorded)
    names = {*training_flags(), *others} & recorded.keys()
    replaced = {
        REPLACES[flag]
        for flag in REPLACES.keys() & names & set(given)
        if getattr(args, flag) != recorded[flag]
    }
    for name in names - set(given) - replaced:
        setattr(resumed, name, recorded[name])
    return resolve_all(resumed)


def changes_text(args: Namespace, recorded: Mapping, others: Collection[str]) -> str:
    """Describe the flags of a resumed run that are not the recorded ones, '' if all are."""
    names = [*training_flags(), *others, *TRAINING_FLAGS]
    changed = {
        name: f'--{name} {recorded[name]} -> {getattr(args, name)}'
        for name in names
        if name in recorded and recorded[name] != getattr(args, name)
    }
    return ', '.join(
        text for name, text in changed.items() if name not in ('backbone_weights', 'use_checkpoint')
    )
