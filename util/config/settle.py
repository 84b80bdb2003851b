"""Settle flags: choose the family, fill in defaults, and refuse flags that contradict each other."""

from argparse import Namespace
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Self

from util.errors import UserError

from .declare import ALWAYS, DATA, DETECTION, NETWORK, RUN, TRAINING, UNLESS_CONDITIONAL, Flag
from .flags import FLAGS
from .networks import TITLES, VARIANTS, Usual, decoder_of, kind_of
from .rules import PROBLEMS

DETECTOR = (NETWORK, DETECTION)
MODEL = (NETWORK, DETECTION, TRAINING)
EVERYTHING = (*MODEL, DATA, RUN)
OFFICIAL_NAMES = {alias: flag.name for flag in FLAGS.values() for alias in flag.aliases}
PLACES = ('backbone', 'encoder', 'decoder')  # parts of a network that --use_checkpoint names


@dataclass(frozen=True)
class OldFlag:
    """A flag that exists only in older records.

    instead: what the command line answers to a user who gives it. convert: returns the flags that replace it,
    from its value and the whole record.
    """

    instead: str
    convert: Callable[[Any, Mapping], dict] = lambda value, record: {}


def rename_if_set(name: str) -> Callable[[Any, Mapping], dict]:
    return lambda value, record: {name: value} if value else {}


def replace_if_on(name: str, new_value: object) -> Callable[[Any, Mapping], dict]:
    return lambda value, record: {name: new_value} if value else {}


OLD = {
    'train_shards': OldFlag('give --train_ann shards.json or its folder', rename_if_set('train_ann')),
    'val_shards': OldFlag('give --val_ann shards.json or its folder', rename_if_set('val_ann')),
    'backbone_frozen_stages': OldFlag(
        'give --freeze body.patch_embed body.layers.0 ...', lambda number, record: freeze_stages(number)
    ),
    'o2m_iou_weight': OldFlag('it is 0.7: leave it out'),
    'o2m_score_weight': OldFlag('it is 0.3: leave it out'),
    'lsj_size': OldFlag(
        'give --img_size, the side of the squares of --aug lsj',
        lambda size, record: {'img_size': size} if record.get('aug') == 'lsj' else {},
    ),
    'group_aspect_ratio': OldFlag('give --batches aspect', replace_if_on('batches', 'aspect')),
    'coco_eval': OldFlag('leave it out: hotcoco computes all metrics'),
    'bucket_sizes': OldFlag('give --batches size', replace_if_on('batches', 'size')),
    'no_validate': OldFlag('give --eval_every 0', replace_if_on('eval_every', 0)),
}


def freeze_stages(number: int) -> dict:
    parts = ['body.patch_embed', *(f'body.layers.{stage}' for stage in range(number - 1))]
    return {'freeze': parts} if number >= 0 else {}


def use_current_names(record: Mapping) -> dict:
    """Return flags with current names instead of official names and those in `OLD`."""
    renamed = {OFFICIAL_NAMES.get(name, name): value for name, value in record.items()}
    flags = {name: value for name, value in renamed.items() if name not in OLD}
    for name, old in OLD.items():
        if name in renamed:
            flags |= old.convert(renamed[name], renamed)
    return flags


class Settled(Namespace):
    """Settled flags, which do not change: `but` returns a copy with other values."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f'settled flags are not changed: use but({name}=...)')

    def but(self, **values: Any) -> Self:
        return type(self)(**vars(self) | values)


def settle(args: Namespace, kinds: Collection[str] = MODEL) -> Settled:
    """Return a copy of flags in which all flags of these kinds, and `family`, are settled.

    Raises:
        UserError: a value is invalid, or flags contradict each other.
    """
    given = use_current_names({name: value for name, value in vars(args).items() if value is not None})
    others = {name: value for name, value in vars(args).items() if name not in OLD}
    flags = [flag for flag in FLAGS.values() if flag.kind in kinds]
    settle_checkpointing(given)
    check_values(given, flags)
    settled = Namespace(**others | given, **{} if 'family' in given else {'family': ''})
    settled.family = family_of(given)
    for flag in sorted(flags, key=lambda flag: flag.depends_on_flags):
        if flag.name not in given:
            setattr(settled, flag.name, flag.default_of(settled))
        if flag.name in decoder_of(settled).implies:
            setattr(settled, flag.name, True)
    check(settled, flags)
    return Settled(**vars(settled))


def settle_checkpointing(given: dict) -> None:
    """Make `use_checkpoint` a list, or remove it. Official namespaces and older records have a bool."""
    value = given.get('use_checkpoint')
    if value is False:
        del given['use_checkpoint']
    elif value is True or value == []:  # networks of timm cannot be recomputed in parts
        without_backbone = 'use_checkpoint' not in kind_of(str(given.get('backbone', ''))).supports
        given['use_checkpoint'] = list(PLACES[without_backbone:])


def family_of(given: dict) -> str:
    """Return the family that given flags choose.

    Raises:
        UserError: they choose two families.
    """
    chosen = [flag.name for flag in FLAGS.values() if flag.chooses == ALWAYS and given.get(flag.name)]
    decoders = [f'--{variant.name}' for variant in VARIANTS if variant.name in chosen]
    if len(decoders) > 1:
        raise UserError(f'{" and ".join(decoders)} choose different decoders: give one of them')
    if given.get('conditional'):
        if chosen:
            raise UserError(f'--conditional and --{chosen[0]} choose different models: leave one of them out')
        return 'conditional'
    # A value of 0 counts too: --hybrid_k 0 is for the baselines of H-DETR.
    others = [flag.name for flag in FLAGS.values() if flag.chooses == UNLESS_CONDITIONAL]
    chosen += [name for name in others if given.get(name, False) is not False]
    return 'deformable' if chosen else 'detr'


def chosen_by(args: Settled) -> str:
    """Describe the family of settled flags, and the flag that chose it."""
    title = TITLES[args.family]
    if args.family == 'detr':
        return f'{title} (no flag of a variant is given)'
    if args.family == 'conditional':
        return f'{title} (--conditional)'
    flags = [flag for flag in FLAGS.values() if flag.chooses and getattr(args, flag.name, None) is not None]
    chosen = [flag for flag in flags if getattr(args, flag.name) != flag.default_of(args)]
    chosen += [flag for flag in flags if isinstance(flag.default, Usual)]  # they have their default
    chosen += [FLAGS['num_feature_levels']]
    value = getattr(args, chosen[0].name)
    return f'{title} (chosen by --{chosen[0].name}{"" if value is True else f" {value}"})'


def check_values(values: Mapping, flags: Collection[Flag]) -> None:
    """Refuse invalid values, each by itself."""
    for flag in flags:
        if problem := flag.problem(values.get(flag.name)):
            raise UserError(f'--{flag.name} {problem}')


def check(args: Namespace, flags: Collection[Flag]) -> None:
    """Refuse flags of other families and backbones, without flags they need, and `rules.PROBLEMS`."""
    for flag in flags:
        value = getattr(args, flag.name)
        if value == flag.default_of(args):
            continue
        shown = f'--{flag.name}' if value is True else f'--{flag.name} {value}'
        if flag.needs and not getattr(args, flag.needs, None):
            raise UserError(f'{shown} needs --{flag.needs}: add it')
        if not flag.fits(args):
            families = ' and '.join(TITLES[family] for family in flag.families)
            raise UserError(
                f'{shown} is for {families}, and the other flags choose {args.family}: leave it out'
            )
        if not flag.fits_backbone(args):
            raise UserError(f'{shown} is not for --backbone {args.backbone}: leave it out')
    kinds = {flag.kind for flag in flags}
    for kind, problems in PROBLEMS.items():
        if kind in kinds and (problem := next(problems(args), None)):
            raise UserError(problem)


def check_processes(args: Namespace, world_size: int) -> int:
    """Return the number of batches of an optimizer step, from --total_batch_size and the processes.

    Raises:
        UserError: the number of processes contradicts the flags.
    """
    if args.fsdp and world_size == 1:
        raise UserError(
            '--fsdp shares a model among processes, and there is one: start several, or leave it out'
        )
    if args.total_batch_size is None or args.eval:
        return args.accum_steps
    at_a_time = args.batch_size * world_size
    if args.total_batch_size % at_a_time:
        raise UserError(
            f'--total_batch_size {args.total_batch_size} is not a multiple of --batch_size {args.batch_size} '
            f'x {world_size} processes'
        )
    return args.total_batch_size // at_a_time
