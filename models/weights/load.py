"""
Fill a model with weights of this program, of the official repositories or of other projects.

The names in a file show its project (`layouts.py`). Weights must fit strictly; others are listed.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from models.weights.layouts import State, spread_coco_classes, translate
from models.weights.read import extract_weights, read_checkpoint
from models.weights.records import SharedClasses, extract_flags
from util.config.recorded import NetworkFlags
from util.errors import UserError

MASKS = ('bbox_attention.', 'mask_head.', 'co_masks.')  # may be missing in --pretrained
SOURCES = ('query_sources.',)  # used only in training
RESIZABLE = ('class_embed', 'query_embed')  # --pretrained accepts these from a model of another size
# Entries that a detector of boxes does not need: of training, masks, and MS-DETR's one-to-many branch.
TRAINING_ONLY = re.compile(
    '|'.join(map(re.escape, (*MASKS, *SOURCES, 'class_embed_o2m.')))
    + r'|transformer\.decoder\.layers\.\d+\.(linear3|linear4|norm4)\.'
)
INPUT_BIAS = re.compile(r'input_proj\.\d+\.0\.bias')
DETREX_ONE2MANY = 1500  # queries of H-DETR's second group in every configuration of detrex


@dataclass
class LoadReport:
    """Result of loading a checkpoint.

    layout: project whose names the file has.
    loaded: number of entries of the file that the model took.
    reinitialised: entries of another shape, left as they were or filled in part, and missing entries.
    has_flags: the file records the flags of its run, which were compared with the model's.
    differing: flags of another value, where that is allowed: the file's and the model's.
    kept_classes: names of the classes whose rows of the class heads were kept, if the classes differ.
    """

    layout: str
    loaded: int
    reinitialised: list[str] = field(default_factory=list)
    has_flags: bool = True
    differing: dict[str, tuple] = field(default_factory=dict)
    kept_classes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        flags = '' if self.has_flags else ", no flags in the file to compare with the model's"
        text = f'{self.loaded} entries loaded ({self.layout} names{flags})'
        if self.reinitialised:
            text += f', re-initialised: {", ".join(self.reinitialised)}'
        if self.kept_classes:
            text += f', class heads kept for {", ".join(self.kept_classes)}'
        if self.differing:
            differences = differences_text(self.differing)
            text += f'\nwarning: the weights were trained with other flags: {differences}'
        return text


def load_checkpoint(
    model: nn.Module,
    source: str | Path | dict,
    resize: bool = False,
    resume: bool = False,
    name: str = '',
    classes: SharedClasses | None = None,
) -> LoadReport:
    """Fill a model from a path, a URL, a checkpoint or a state dict, under the names of any known project.

    Heads, layers and queries that only training reads are left out; such queries are known from the flags in
    the file, from its project or from its name. Averaged weights are preferred, except to resume.

    Args:
        resize: re-initialise and list class heads and queries of another number (queries are filled as far as
            they go), and list flags that contradict those in the file.
        resume: the state of an optimizer follows, so every entry must be that of the run.
        name: name of the file, if `source` is its content.
        classes: those of the file that the model has too, if `resize` and they differ. Rows of class heads
            follow them.

    Raises:
        UserError: an entry is missing, left over, of another shape or (except to resume) not finite, or the
            file was trained with other flags of the network. The message lists them. The model is then
            unchanged.
    """
    checkpoint = source if isinstance(source, dict) else read_checkpoint(source)
    name = name or ('' if isinstance(source, dict) else str(source))
    try:
        return fill_model(model, checkpoint, resize, resume, name, classes)
    except UserError as error:
        raise UserError(f'{name}: {error}' if name else str(error)) from error


def fill_model(
    model: nn.Module, checkpoint: dict, resize: bool, resume: bool, name: str, classes: SharedClasses | None
) -> LoadReport:
    """Do the work of `load_checkpoint`, which describes the arguments."""
    layout, state = translate(extract_weights(checkpoint, averaged=not resume))
    recorded, expected = extract_flags(checkpoint), model.state_dict()
    differing = cast(NetworkFlags, model.flags).differences(recorded) if recorded else {}
    if differing and not resize:
        raise UserError(
            'the checkpoint was trained with other flags than this model has: '
            f'{differences_text(differing)}; give the flags of its run'
        )
    check_layer_order(model, layout, recorded, state)
    if not recorded:
        check_shared_heads(model, state)
    num_classes = [len(expected.get('class_embed.0.bias', ())), classes.num_in_file if classes else 0]
    if layout in ('detrex', 'mmdetection') and 91 in num_classes:
        state = spread_coco_classes(state, 91)
    if not resume:
        cut_queries(state, expected, layout, recorded, name)
    state = {
        name: x
        for name, x in state.items()
        if name in expected or not (name.endswith('num_batches_tracked') or TRAINING_ONLY.match(name))
    }
    if not any(map(INPUT_BIAS.fullmatch, state)):  # a bias of 0 does nothing
        state |= {name: torch.zeros_like(x) for name, x in expected.items() if INPUT_BIAS.fullmatch(name)}
    if resize:  # second class heads begin as the first
        firsts = {
            name: name.replace('class_embed_o2m', 'class_embed') for name in expected if name not in state
        }
        state |= {name: state[first] for name, first in firsts.items() if first in state}

    sources_needed = resume or model.eval_module is not None
    replaceable = (*RESIZABLE * resize, *SOURCES * (resize or not sources_needed))
    optional = (*SOURCES * (not sources_needed), *(*MASKS, 'class_embed') * resize)
    wrong_shape = [name for name in state if name in expected and state[name].shape != expected[name].shape]
    refused = [name for name in wrong_shape if not name.startswith(replaceable)]
    missing = [name for name in expected if name not in state]
    needed = [name for name in missing if not name.startswith(optional)]
    unexpected = [name for name in state if name not in expected]
    if needed or unexpected or refused:
        raise UserError(mismatch_text(layout, state, expected, needed, unexpected, refused))
    new = [name for name in missing if name.startswith((*MASKS, 'class_embed'))]
    resized = resize_entries(model, state, expected, classes)
    if not resume:
        check_finite(state)
    model.load_state_dict(expected | state)
    kept_classes = list(classes.pairs) if classes else []
    loaded = len(state) - len(resized)
    return LoadReport(layout, loaded, resized + new, bool(recorded), differing, kept_classes)


# Entries that are changed to fit ----------------------------------------------------------------------------


def cut_queries(state: State, expected: State, layout: str, recorded: dict, name: str) -> None:
    """Keep the queries of the inference group alone, which come first, if the model has as many.

    The flags in the file give their number, else its name (H-DETR writes the size of its second group as
    `_t1500_`), else the project (detrex's second group has 1500).
    """
    in_file, in_model = (len(entries.get('query_embed.weight', ())) for entries in (state, expected))
    if recorded:
        first = recorded.get('num_queries_one2one', recorded.get('num_queries', in_file))
    elif second := re.search(r'_t(\d+)_', Path(name).name):
        first = in_file - int(second[1])
    else:
        first = in_model if layout == 'detrex' and in_file == in_model + DETREX_ONE2MANY else in_file
    if in_file and first == in_model:
        state['query_embed.weight'] = state['query_embed.weight'][:in_model]


def resize_entries(
    model: nn.Module, state: State, expected: State, classes: SharedClasses | None
) -> list[str]:
    """Give entries of another shape, and class heads of other classes, the shape of the model's, in place.

    Row 0 of the class head of Deformable DETR's proposals means 'object', whatever the classes.

    Returns:
        The names of those that keep nothing of the file, or only the first queries.
    """
    first_stage, proposals, resized = getattr(model, 'first_stage', None), None, []
    if first_stage is not None and not first_stage.by_class:
        proposals = f'class_embed.{len(cast(nn.ModuleList, model.class_embed)) - 1}.'
    for name, x in state.items():
        if classes is not None and name.startswith('class_embed'):
            is_proposals = proposals is not None and name.startswith(proposals)
            state[name] = (
                fill_rows(expected[name], x[:1]) if is_proposals else classes.fill(expected[name], x)
            )
        elif x.shape != expected[name].shape:
            state[name] = fill_rows(expected[name], x) if name.startswith('query_embed') else expected[name]
            resized.append(name)
    return resized


def fill_rows(head: Tensor, rows: Tensor) -> Tensor:
    """Return `head` with its first rows replaced, as far as both go; unchanged if the width differs."""
    if rows.shape[1:] != head.shape[1:]:
        return head
    number = min(len(rows), len(head))
    return torch.cat([rows[:number].to(head), head[number:]])


# Checks -----------------------------------------------------------------------------------------------------


def differences_text(differing: dict[str, tuple]) -> str:
    """Describe flags of other values: the file's, then the model's."""

    def word(value: object) -> object:
        return ('on' if value else 'off') if isinstance(value, bool) else value

    parts = [
        f'--{flag} {word(in_file)} there, {word(in_model)} here'
        for flag, (in_file, in_model) in differing.items()
    ]
    return ', '.join(parts).replace('--family', 'the family')


def check_layer_order(model: nn.Module, layout: str, recorded: dict, state: State) -> None:
    """Require that the decoder layers of a file have the model's order: MS-DETR's read the memory first.

    MS-DETR's second feed-forward block shows the order; without it the flags of the run do. Official files
    without flags are accepted.

    Raises:
        UserError: the order is another one.
    """
    if any('.linear3.' in name for name in state):
        in_file = True
    elif recorded or layout != 'official':
        in_file = bool(recorded.get('use_ms_detr')) and not any('class_embed_o2m' in name for name in state)
    else:
        return
    in_model = any(getattr(module, 'reads_memory_first', False) for module in model.modules())
    effect = 'moves the cross-attention of a decoder layer in front of its self-attention'
    check_switch('use_ms_detr', in_file, in_model, effect)


def check_shared_heads(model: nn.Module, state: State) -> None:
    """Require that a file without flags shares box heads among decoder layers if a model of one stage does.

    Raises:
        UserError: with --with_box_refine each layer has its own heads, without it all layers share one.
    """
    heads = getattr(model, 'bbox_embed', None)
    first, second = (state.get(f'bbox_embed.{layer}.layers.2.bias') for layer in (0, 1))
    one_stage = getattr(model, 'first_stage', None) is None
    if not (one_stage and isinstance(heads, nn.ModuleList)) or first is None or second is None:
        return
    in_file, in_model = not torch.equal(first, second), heads[0] is not heads[1]
    check_switch('with_box_refine', in_file, in_model, 'gives each decoder layer heads of its own')


def check_switch(flag: str, in_file: bool, in_model: bool, effect: str) -> None:
    if in_file != in_model:
        raise UserError(
            f'the checkpoint was trained {"with" if in_file else "without"} --{flag}, which {effect}: '
            f'{"add it" if in_file else "leave it out"}'
        )


def check_finite(state: State) -> None:
    """Require that weights are numbers.

    Raises:
        UserError: some are NaN or infinite; the message names the first entries.
    """
    if bad := [name for name, x in state.items() if x.is_floating_point() and not x.float().isfinite().all()]:
        dots = ', ...' if len(bad) > 3 else ''
        raise UserError(
            f'{len(bad)} of {len(state)} entries are not finite ({", ".join(bad[:3])}{dots}): the run that '
            'wrote them has diverged, or the file is damaged; take an earlier checkpoint'
        )


def check_frozen(report: LoadReport) -> None:
    """Require that only masks start from random values, as --frozen_weights demands.

    Raises:
        UserError: another part of the model is not in the file.
    """
    if missing := [name for name in report.reinitialised if not name.startswith(MASKS)]:
        raise UserError(
            f'--frozen_weights must hold the whole detector of boxes, but {", ".join(missing[:4])} would '
            'start from random values: give the --num_queries and classes of its run'
        )


def mismatch_text(
    layout: str,
    state: State,
    expected: State,
    missing: list[str],
    unexpected: list[str],
    refused: list[str],
) -> str:
    lines = [
        f'the checkpoint ({layout} names, {len(state)} entries) does not fit this model '
        f'({len(expected)} entries):'
    ]
    for what, names in (('missing', missing), ('left over', unexpected)):
        if names:
            lines.append(f'  {what}: {len(names)}, such as {", ".join(names[:4])}')
    lines += [
        f'  {name}: {tuple(state[name].shape)} there, {tuple(expected[name].shape)} here'
        for name in refused[:4]
    ]
    if any(name.startswith(RESIZABLE + SOURCES) for name in refused):
        lines.append(
            'another number of classes or queries: train with --pretrained, which re-initialises these, or '
            'give the --class_ids and --num_queries of its run'
        )
    else:
        lines.append(
            'check the flags of the model: --backbone, --conditional, --dec_layers, --hidden_dim, '
            '--input_proj_bias ...'
        )
    return '\n'.join(lines)
