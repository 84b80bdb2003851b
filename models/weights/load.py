"""
Fill a model with weights of this program, of the official repositories or of other projects.

The names of a file reveal its project (`names.py`). Weights must fit strictly; entries that do not fit are listed.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from models.weights.names import COCO_IDS, spread_coco_classes, to_official
from models.weights.read import extract_weights, read_checkpoint
from models.weights.records import SharedClasses, extract_flags
from util.errors import UserError

# Parameters that a detector of boxes does not need: query sources, MS-DETR's second reading of the queries, masks.
TRAINING_ONLY = r'query_sources\.|bbox_attention\.|mask_head\.|co_masks\.|class_embed_o2m\.|transformer\.decoder\.layers\.\d+\.(linear3|linear4|norm4)\.'
INPUT_BIAS = r'input_proj\.\d+\.0\.bias'
RESIZABLE = ('class_embed', 'query_embed')  # --pretrained accepts these from a model of another size
SOURCES = ('query_sources.',)  # used only in training
MASKS = ('bbox_attention.', 'mask_head.', 'co_masks.')  # may be missing in --pretrained
DETREX_ONE2MANY = 1500  # queries of H-DETR's second group in every configuration of detrex


@dataclass
class LoadReport:
    """Result of loading a checkpoint.

    reinitialised: entries of another shape, left as they were or filled in part.
    has_flags: the file tells the flags of its run, which were compared with the model's.
    differing: flags of another value, where that is allowed: the file's and the model's.
    kept_classes: names of the classes whose rows of the class heads were kept, if the classes are others.
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
            text += (
                f'\nwarning: the weights were trained with other flags: {differences_text(self.differing)}'
            )
        return text


def load_checkpoint(
    model: nn.Module,
    source: str | Path | dict,
    resize: bool = False,
    resume: bool = False,
    name: str = '',
    classes: SharedClasses | None = None,
) -> LoadReport:
    """Fill a model from a path, an address, a checkpoint or a state dict, under any known project's names.

    Queries that only train are left out if the flags in the file, its project or its name tell which they are. Heads and
    layers that only training reads are left out too. Averaged weights are preferred, except to resume.

    Args:
        resize: re-initialise and list class heads and queries of another number (queries: fill as far as they go), and
            list flags that contradict those in the file.
        resume: the state of an optimizer follows, so every entry must be that of the run.
        name: name of the file, if `source` is its content.
        classes: those of the file that the model has too, if `resize` and they differ: rows of class heads follow them.

    Raises:
        UserError: an entry is missing, left over, of another shape or (but to resume) not finite, or the file was trained with
            other flags of the network. The message lists them. The model is unchanged then.
    """
    checkpoint = source if isinstance(source, dict) else read_checkpoint(source)
    name = name or ('' if isinstance(source, dict) else str(source))
    try:
        return fill(model, checkpoint, resize, resume, name, classes)
    except UserError as error:
        raise UserError(f'{name}: {error}' if name else str(error)) from error


def fill(
    model: nn.Module, checkpoint: dict, resize: bool, resume: bool, name: str, classes: SharedClasses | None
) -> LoadReport:
    """Do the work of `load_checkpoint`, whose arguments these are."""
    found = extract_weights(checkpoint, averaged=not resume)
    layout, state = to_official(found)
    ours, recorded = model.state_dict(), extract_flags(checkpoint)
    differing = differences(model, recorded) if recorded else {}
    if differing and not resize:
        raise UserError(
            f'the checkpoint was trained with other flags than this model has: {differences_text(differing)}; give the '
            'flags of its run'
        )
    check_layer_order(model, layout, recorded, state)
    if not recorded:
        check_shared_heads(model, state)
    rows = [len(entries.get('class_embed.0.bias', ())) for entries in (state, ours)]
    if (
        layout in ('detrex', 'mmdetection')
        and rows[0] == len(COCO_IDS)
        and 91 in (rows[1], classes and classes.there)
    ):
        state = spread_coco_classes(state, 91)
    if not resume and 'query_embed.weight' in state and 'query_embed.weight' in ours:
        queries, wanted = state['query_embed.weight'], len(ours['query_embed.weight'])
        if first_group(layout, recorded, name, len(queries), wanted) == wanted:
            state['query_embed.weight'] = queries[:wanted]
    state = {name: value for name, value in state.items() if not is_dropped(name, ours)}
    if resize:  # second class heads begin as the first
        for name in ours:
            first = name.replace('class_embed_o2m', 'class_embed')
            if name not in state and first in state:
                state[name] = state[first]
    wrong_shape = [name for name in state if name in ours and state[name].shape != ours[name].shape]
    sources_needed = resume or getattr(model, 'eval_module', None) is not None
    replaceable = (*RESIZABLE * resize, *SOURCES * (resize or not sources_needed))
    refused = [name for name in wrong_shape if not name.startswith(replaceable)]
    if not any(re.fullmatch(INPUT_BIAS, name) for name in state):  # a bias of 0 is as good as none
        state |= {name: torch.zeros_like(x) for name, x in ours.items() if re.fullmatch(INPUT_BIAS, name)}
    optional = (*SOURCES * (not sources_needed), *(*MASKS, 'class_embed') * resize)
    missing = [name for name in ours if name not in state and not name.startswith(optional)]
    fresh = [name for name in ours if name not in state and name.startswith((*MASKS, 'class_embed'))]
    unexpected = [name for name in state if name not in ours]
    if missing or unexpected or refused:
        raise UserError(mismatch_text(layout, state, ours, missing, unexpected, refused))
    anew = fit(state, ours, wrong_shape, classes, proposal_head(model))
    if not resume:
        check_finite(state)
    model.load_state_dict(ours | state)
    kept = classes.names if classes else []
    return LoadReport(layout, len(state) - len(anew), anew + fresh, bool(recorded), differing, kept)


def proposal_head(model: nn.Module) -> str | None:
    """Return the prefix of the class head of Deformable DETR's proposals, whose row 0 means 'object', whatever the classes are."""
    flags = getattr(model, 'flags', None) or {}
    return f'class_embed.{flags["dec_layers"]}.' if flags.get('two_stage') and not flags['dino'] else None


def fit(
    state: dict[str, Tensor],
    ours: dict[str, Tensor],
    wrong_shape: list[str],
    classes: SharedClasses | None,
    proposals: str | None,
) -> list[str]:
    """Give entries of another shape, and class heads of other classes, those of the model; return which start anew, in place."""
    anew = list(wrong_shape)
    for name in state:
        if classes is not None and name.startswith('class_embed'):
            if proposals is not None and name.startswith(proposals):
                state[name] = fit_rows(state[name][:1], ours[name])
            else:
                state[name] = classes.rows(state[name], ours[name])
            if name in anew:
                anew.remove(name)
        elif name in wrong_shape:
            state[name] = fit_rows(state[name], ours[name]) if name.startswith('query_embed') else ours[name]
    return anew


def check_finite(state: dict[str, Tensor]) -> None:
    """Require that weights are numbers.

    Raises:
        UserError: some are NaN or infinite; the message names the first entries.
    """
    if bad := [name for name, x in state.items() if x.is_floating_point() and not x.float().isfinite().all()]:
        more = ', ...' if len(bad) > 3 else ''
        raise UserError(
            f'{len(bad)} of {len(state)} entries are not finite ({", ".join(bad[:3])}{more}): the run that wrote them has diverged, '
            'or the file is damaged; take an earlier checkpoint'
        )


def differences(model: nn.Module, recorded: dict) -> dict[str, tuple]:
    """Return flags of another value in a file (its value, the model's); {} for a model that knows no flags."""
    flags = getattr(model, 'flags', None)
    return flags.differences(recorded) if flags is not None else {}


def differences_text(differing: dict[str, tuple]) -> str:
    """Describe flags of other values: the file's, then the model's."""

    def word(value: object) -> object:
        return ('on' if value else 'off') if isinstance(value, bool) else value

    parts = [
        f'--{flag} {word(theirs)} there, {word(ours)} here' for flag, (theirs, ours) in differing.items()
    ]
    return ', '.join(parts).replace('--family', 'the family')


def first_group(layout: str, recorded: dict, name: str, rows: int, wanted: int) -> int:
    """Return the number of queries in the inference group of a file, which come first.

    The flags tell it, else the name of the file (H-DETR writes the size of its second group as `_t1500_`), else the
    project (detrex's second group has 1500).
    """
    if recorded:
        return recorded.get('num_queries_one2one', recorded.get('num_queries', rows))
    if second := re.search(r'_t(\d+)_', Path(name).name):
        return rows - int(second[1])
    return wanted if layout == 'detrex' and rows == wanted + DETREX_ONE2MANY else rows


def check_shared_heads(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Require that a file without flags shares its box heads among the decoder layers as a model of one stage does.

    Raises:
        UserError: with --with_box_refine each layer has its own heads, without it all layers share one.
    """
    heads = getattr(model, 'bbox_embed', None)
    name = 'bbox_embed.{}.layers.2.bias'
    one_stage = not getattr(model, 'two_stage', False)
    if not isinstance(heads, nn.ModuleList) or not one_stage or name.format(1) not in state:
        return
    ours, theirs = heads[0] is heads[1], torch.equal(state[name.format(0)], state[name.format(1)])
    if ours != theirs:
        raise UserError(
            f'the checkpoint was trained {"without" if theirs else "with"} --with_box_refine, which gives each decoder layer '
            f'heads of its own: {"leave it out" if theirs else "add it"}'
        )


def check_frozen(report: LoadReport) -> None:
    """Require that only masks start anew, as --frozen_weights demands.

    Raises:
        UserError: another part of the model is not in the file.
    """
    if others := [name for name in report.reinitialised if not name.startswith(MASKS)]:
        raise UserError(
            f'--frozen_weights must hold the whole detector of boxes, but {", ".join(others[:4])} would start anew: give the '
            '--num_queries and classes of its run'
        )


def is_dropped(name: str, ours: dict[str, Tensor]) -> bool:
    """Tell whether the model needs no such entry: counters of frozen norms, and parameters used only in training."""
    return name not in ours and (name.endswith('num_batches_tracked') or bool(re.match(TRAINING_ONLY, name)))


def check_layer_order(model: nn.Module, layout: str, trained: dict, state: dict[str, Tensor]) -> None:
    """Require that the checkpoint's decoder layers have the model's order; MS-DETR's read the memory first.

    The auxiliary block of MS-DETR reveals the order; without it the flags of the run do. Official files without flags
    are accepted.

    Raises:
        UserError: the order is another one.
    """
    ours = any(getattr(module, 'reads_memory_first', False) for module in model.modules())
    if any('.linear3.' in name for name in state):
        theirs = True
    elif trained or layout != 'official':
        theirs = bool(trained.get('use_ms_detr')) and not any('class_embed_o2m' in name for name in state)
    else:
        return
    if ours != theirs:
        raise UserError(
            f'the checkpoint was trained {"with" if theirs else "without"} --use_ms_detr, which moves the cross-attention '
            f'of a decoder layer in front of its self-attention: {"add it" if theirs else "leave it out"}'
        )


def fit_rows(theirs: Tensor, ours: Tensor) -> Tensor:
    """Return rows of `theirs` as far as they go, then `ours`; `ours` alone if the width differs."""
    if theirs.shape[1:] != ours.shape[1:]:
        return ours
    rows = min(len(theirs), len(ours))
    return torch.cat([theirs[:rows].to(ours), ours[rows:]])


def mismatch_text(
    layout: str,
    state: dict[str, Tensor],
    ours: dict[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    refused: list[str],
) -> str:
    lines = [
        f'the checkpoint ({layout} names, {len(state)} entries) does not fit this model ({len(ours)} entries):'
    ]
    for what, names in (('missing', missing), ('left over', unexpected)):
        if names:
            lines.append(f'  {what}: {len(names)}, such as {", ".join(names[:4])}')
    lines += [
        f'  {name}: {tuple(state[name].shape)} there, {tuple(ours[name].shape)} here' for name in refused[:4]
    ]
    if any(name.startswith(RESIZABLE + SOURCES) for name in refused):
        lines.append(
            'another number of classes or queries: train with --pretrained, which re-initialises these, or give the '
            '--class_ids and --num_queries of its run'
        )
    else:
        lines.append(
            'check the flags of the model: --backbone, --conditional, --dec_layers, --hidden_dim, --input_proj_bias ...'
        )
    return '\n'.join(lines)
