"""
Recipes, whose only source are the shell scripts in scripts/, and where published weights are.

A recipe is one call, `recipe FLAGS "$@"` (scripts/recipe.sh), under a head whose first line is its result. A copy of a script is
a recipe too: `main.py --recipe mine` trains as `bash scripts/mine.sh` does.
"""

import json
import re
import shlex
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from util.errors import UserError
from util.flags import ParsedFlags, did_you_mean, given_of

from .declare import NETWORK
from .flags import FLAGS
from .parser import make_parser
from .recorded import SOURCES, adopt
from .settle import in_our_names

SCRIPTS = Path(__file__).resolve().parents[2] / 'scripts'
CALL = 'recipe '
HEAD = re.compile(
    r'# (?P<title>.*?): (?:(?P<ap>[\d.]+) )?AP on (?P<data>COCO val2017|LVIS v1 val).*?(?:after|;) (?P<epochs>\d+) epochs'
)


@dataclass(frozen=True)
class Recipe:
    """A recipe: its flags as words, and from its head what it trains and the published AP (None: not published), where it says so."""

    name: str
    words: tuple[str, ...]
    title: str
    ap: float | None = None
    data: str = ''
    epochs: int | None = None

    @property
    def flags(self) -> ParsedFlags:
        """Its flags, those of main.py's defaults beside them; `given` names its own."""
        return make_parser(None).parse_args(self.words)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in SCRIPTS.glob('*.sh') if f'\n{CALL}' in path.read_text())


@cache
def find_recipe(name: str) -> Recipe:
    """Read a recipe.

    Raises:
        UserError: there is none of this name (the message names similar ones), or it is no single call.
    """
    path = SCRIPTS / f'{name}.sh'
    if Path(name).name != name or not path.is_file():
        raise UserError(f'no recipe {name!r} is in scripts/{did_you_mean(name, recipe_names())}')
    text = path.read_text()
    calls = [line for line in text.replace('\\\n', ' ').splitlines() if line.startswith(CALL)]
    head = HEAD.match(text.splitlines()[1]) if text.count('\n') else None
    if len(calls) != 1 or not calls[0].endswith(' "$@"'):
        raise UserError(f'scripts/{name}.sh is no recipe: it must call `recipe FLAGS "$@"` once')
    words = tuple(shlex.split(calls[0])[1:-1])
    if odd := [word for word in words if set(word) & set('$`*?')]:
        raise UserError(
            f'scripts/{name}.sh is no recipe: {odd[0]} means something to the shell alone; write its value'
        )
    if head is None:  # of one's own
        return Recipe(name, words, name)
    ap = float(head['ap']) if head['ap'] else None
    return Recipe(name, words, head['title'], ap, head['data'], int(head['epochs']))


def merged(args: Namespace, values: Mapping[str, object]) -> ParsedFlags:
    """Return a copy of flags with other values for those that were not given, which then count as given."""
    given = given_of(args)
    new = {name: value for name, value in values.items() if name not in given}
    found = ParsedFlags(**vars(args) | new)
    found.given = given | new.keys()
    return found


def with_recipe(args: Namespace, recipe: Recipe, own_data: bool = False) -> ParsedFlags:
    """Return a copy of flags with those of a recipe where none was given. own_data: but not the data that the recipe names."""
    theirs, left_out = recipe.flags, SOURCES if own_data else ()
    return merged(args, {name: getattr(theirs, name) for name in theirs.given if name not in left_out})


def with_config(args: Namespace, file: str | Path) -> ParsedFlags:
    """Return a copy of flags with those of a JSON file where none was given.

    file: OUT/flags.json of a run, or an object of flags and values.

    Raises:
        UserError: it cannot be read, or has an unknown flag.
    """
    try:
        found = json.loads(Path(file).read_text(encoding='utf-8'))
        kinds = found.get('settled')
        values = {name: value for kind in kinds.values() for name, value in kind.items()} if kinds else found
        values = in_our_names(values)
        if kinds:  # of another start of the program: its folders and devices are not taken
            values = {
                name: value for name, value in values.items() if name in FLAGS and not FLAGS[name].launch
            }
        unknown = [name for name in values if name not in FLAGS]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f'--config {file} is no file of flags ({error}): give flags.json of a run, or {{"lr": 1e-4}}'
        ) from error
    if unknown:
        raise UserError(f'--config {file}: {unknown[0]!r} is no flag{did_you_mean(unknown[0], FLAGS)}')
    return merged(args, {name: value for name, value in values.items() if value is not None})


def with_named_flags(args: Namespace) -> Namespace:
    """Return a copy of flags with those of the file, model or recipe that they name, where none were given."""
    if args.config:
        args = with_config(args, args.config)
    if args.model:
        return with_row(args)
    if args.recipe:
        return merged(with_recipe(args, find_recipe(args.recipe)), {'output_dir': f'exps/{args.recipe}'})
    return args


# Published weights ---------------------------------------------------------------------------------------------------

DETR_FILES = 'https://dl.fbaipublicfiles.com/detr/detr-'
# The authors' weights under the names of transformers; models/weights/names.py knows them.
CONDITIONAL_R50 = 'https://huggingface.co/microsoft/conditional-detr-resnet-50/resolve/main/pytorch_model.bin'
DEFORMABLE_FILES = 'https://huggingface.co/SenseTime/deformable-detr{}/resolve/main/pytorch_model.bin'
HYBRID_FILES = 'https://github.com/HDETR/H-Deformable-DETR/releases/download/v0.1/'
MMDET_FILES = 'https://download.openmmlab.com/mmdetection/v3.0/codetr/co_dino_5scale_'
TWO_STAGE_NAME = 'deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage'
TRICKS_NAME = f'dp0_mqs_lft_{TWO_STAGE_NAME}'
HYBRID_NAME = f'hybrid_branch_lambda1_group6_t1500_{TRICKS_NAME}'
HYBRID_900_NAME = f'hybrid_branch_lambda1_group6_t1500_n900_{TRICKS_NAME}'


@dataclass(frozen=True)
class Row:
    """Published weights.

    name: hub entry; '' where nobody publishes weights and another row has the same network. script: recipe in scripts/. weights: URL; '' if there is none. linked: where weights without an address,
    or the authors' own, are linked from. size: published millions of parameters and 1e9 multiply-adds. The rest is for weights
    without a recipe (own: their flags), or of another result than it states.
    """

    name: str
    script: str
    weights: str = ''
    linked: str = ''
    size: tuple[int, int] | None = None
    ap: float | None = None
    title: str = ''
    own: str = ''
    epochs: int | None = None
    num_classes: int | None = None

    @property
    def recipe(self) -> Recipe:
        if self.script:
            return find_recipe(self.script)
        return Recipe(self.name, tuple(self.own.split()), self.title, self.ap, 'COCO val2017', self.epochs)

    @property
    def classes(self) -> int:
        """Class indices of the weights: COCO's ids, or those of another dataset."""
        return self.num_classes or (1203 if self.recipe.flags.dataset_file == 'lvis' else 91)

    @property
    def network(self) -> str:
        """Flags of the network and its classes, as text: equal for rows of equal networks."""
        flags = self.recipe.flags
        others = ('masks', 'co_masks', 'img_size')  # they change parameters or operations too
        given = sorted(name for name in flags.given if FLAGS[name].kind == NETWORK or name in others)
        return repr([*((name, getattr(flags, name)) for name in given), self.classes])

    def source(self) -> str:
        """Return the address of the weights.

        Raises:
            UserError: there is none; the message says where they are linked from.
        """
        if self.weights:
            return self.weights
        where = self.linked or 'no place: their authors have not published them'
        raise UserError(
            f'the weights of {self.name} ({self.recipe.title}) have no direct address: fetch them by hand from {where}, and pass '
            'their path (weights=PATH, --weights PATH, or --resume PATH)'
        )


CONDITIONAL_SHARE = 'the share linked from github.com/Atten4Vis/ConditionalDETR ({})'
MS_SHARE = 'the drive linked from github.com/Atten4Vis/MS-DETR ({})'
CO_SHARE = 'the drive linked from github.com/Sense-X/Co-DETR ({})'


def hub_file(name: str) -> str:
    return f'huggingface.co/zongzhuofan ({name})'


def hybrid_files(prefix: str, name: str, epochs: int, suffix: str = '') -> str:
    return f'{HYBRID_FILES}{prefix}{name}_{epochs}eps{suffix}.pth'


def co_file(name: str) -> str:
    return CO_SHARE.format(f'{name}.pth')


# fmt: off
ZOO = [
    Row('detr_resnet50', 'detr_r50_500ep', f'{DETR_FILES}r50-e632da11.pth', size=(41, 86)),
    Row('', 'detr_r50_50ep', size=(41, 86)),
    Row('detr_resnet50_dc5', 'detr_r50dc5_500ep', f'{DETR_FILES}r50-dc5-f0fb7ef5.pth', size=(41, 187)),
    Row('', 'detr_r50dc5_50ep', size=(41, 187)),
    Row('detr_resnet101', 'detr_r101_500ep', f'{DETR_FILES}r101-2c7b67e5.pth', size=(60, 152)),
    Row('', 'detr_r101_50ep', size=(60, 152)),
    Row('detr_resnet101_dc5', 'detr_r101dc5_500ep', f'{DETR_FILES}r101-dc5-a2e86def.pth', size=(60, 253)),
    Row('', 'detr_r101dc5_50ep', size=(60, 253)),
    Row('conditional_detr_resnet50', 'conddetr_r50_epoch50', CONDITIONAL_R50, linked=CONDITIONAL_SHARE.format('ConditionalDETR_r50_epoch50.pth'), size=(44, 90)),
    Row('conditional_detr_resnet50_dc5', 'conddetr_r50dc5_epoch50', linked=CONDITIONAL_SHARE.format('ConditionalDETR_r50dc5_epoch50.pth'), size=(44, 195)),
    Row('conditional_detr_resnet101', 'conddetr_r101_epoch50', linked=CONDITIONAL_SHARE.format('ConditionalDETR_r101_epoch50.pth'), size=(63, 156)),
    Row('conditional_detr_resnet101_dc5', 'conddetr_r101dc5_epoch50', linked=CONDITIONAL_SHARE.format('ConditionalDETR_r101dc5_epoch50.pth'), size=(63, 262)),
    Row('deformable_detr_resnet50_single_scale', 'r50_deformable_detr_single_scale', DEFORMABLE_FILES.format('-single-scale'), size=(34, 78)),
    Row('deformable_detr_resnet50_single_scale_dc5', 'r50_deformable_detr_single_scale_dc5', DEFORMABLE_FILES.format('-single-scale-dc5'), size=(34, 128)),
    Row('deformable_detr_resnet50', 'r50_deformable_detr', DEFORMABLE_FILES.format(''), size=(40, 173)),
    Row('deformable_detr_resnet50_box_refine', 'r50_deformable_detr_plus_iterative_bbox_refinement', DEFORMABLE_FILES.format('-with-box-refine'), size=(41, 173)),
    Row('deformable_detr_resnet50_two_stage', 'r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage', DEFORMABLE_FILES.format('-with-box-refine-two-stage'), size=(41, 173)),
    Row('two_stage_deformable_detr_resnet50', 'r50_two_stage_deformable_detr_12ep', hybrid_files('r50_', TWO_STAGE_NAME, 12)),
    Row('two_stage_deformable_detr_resnet50_36ep', 'r50_two_stage_deformable_detr_36ep', hybrid_files('r50_', TWO_STAGE_NAME, 36)),
    Row('two_stage_deformable_detr_swin_tiny', 'swin_tiny_two_stage_deformable_detr_12ep', hybrid_files('swin_tiny_', TWO_STAGE_NAME, 12)),
    Row('two_stage_deformable_detr_swin_tiny_second_run', 'swin_tiny_two_stage_deformable_detr_12ep', hybrid_files('swin_tiny_', TWO_STAGE_NAME, 12, '_2'), ap=46.0),
    Row('two_stage_deformable_detr_swin_tiny_36ep', 'swin_tiny_two_stage_deformable_detr_36ep', hybrid_files('swin_tiny_', TWO_STAGE_NAME, 36)),
    Row('two_stage_deformable_detr_swin_tiny_36ep_second_run', 'swin_tiny_two_stage_deformable_detr_36ep', hybrid_files('swin_tiny_', TWO_STAGE_NAME, 36, '_2'), ap=49.6),
    Row('two_stage_deformable_detr_swin_large', 'swin_large_two_stage_deformable_detr_12ep', hybrid_files('swin_large_', TWO_STAGE_NAME, 12)),
    Row('two_stage_deformable_detr_swin_large_36ep', 'swin_large_two_stage_deformable_detr_36ep', hybrid_files('drop_path0.5_swin_large_', TWO_STAGE_NAME, 36)),
    Row('deformable_detr_plus_plus_resnet50', 'r50_two_stage_deformable_detr_tricks_12ep', hybrid_files('r50_', TRICKS_NAME, 12)),
    Row('deformable_detr_plus_plus_resnet50_36ep', 'r50_two_stage_deformable_detr_tricks_36ep', hybrid_files('r50_', TRICKS_NAME, 36)),
    Row('deformable_detr_plus_plus_swin_tiny', 'swin_tiny_two_stage_deformable_detr_tricks_12ep', hybrid_files('swin_tiny_', TRICKS_NAME, 12)),
    Row('deformable_detr_plus_plus_swin_tiny_36ep', 'swin_tiny_two_stage_deformable_detr_tricks_36ep', hybrid_files('swin_tiny_', TRICKS_NAME, 36)),
    Row('deformable_detr_plus_plus_swin_large', 'swin_large_two_stage_deformable_detr_tricks_12ep', hybrid_files('swin_large_', TRICKS_NAME, 12)),
    Row('deformable_detr_plus_plus_swin_large_36ep', 'swin_large_two_stage_deformable_detr_tricks_36ep', hybrid_files('drop_path0.5_swin_large_', TRICKS_NAME, 36)),
    Row('h_deformable_detr_resnet50', 'r50_h_deformable_detr_12ep', hybrid_files('r50_', HYBRID_NAME, 12)),
    Row('h_deformable_detr_resnet50_36ep', 'r50_h_deformable_detr_36ep', hybrid_files('r50_', HYBRID_NAME, 36)),
    Row('', 'r101_h_deformable_detr_12ep'),
    Row('', 'r101_h_deformable_detr_36ep'),
    Row('h_deformable_detr_swin_tiny', 'swin_tiny_h_deformable_detr_12ep', hybrid_files('swin_tiny_', HYBRID_NAME, 12)),
    Row('h_deformable_detr_swin_tiny_36ep', 'swin_tiny_h_deformable_detr_36ep', hybrid_files('swin_tiny_', HYBRID_NAME, 36)),
    Row('h_deformable_detr_swin_tiny_decay', 'swin_tiny_h_deformable_detr_decay0.05_12ep', hybrid_files('decay0.05_swin_tiny_', HYBRID_NAME, 12)),
    Row('h_deformable_detr_swin_tiny_decay_36ep', 'swin_tiny_h_deformable_detr_decay0.05_36ep', hybrid_files('decay0.05_swin_tiny_', HYBRID_NAME, 36)),
    Row('', 'swin_small_h_deformable_detr_12ep'),
    Row('', 'swin_small_h_deformable_detr_36ep'),
    Row('h_deformable_detr_swin_large', 'swin_large_h_deformable_detr_12ep', hybrid_files('swin_large_', HYBRID_NAME, 12)),
    Row('h_deformable_detr_swin_large_36ep', 'swin_large_h_deformable_detr_36ep', hybrid_files('drop_path0.5_swin_large_', HYBRID_NAME, 36)),
    Row('h_deformable_detr_swin_large_900', 'swin_large_h_deformable_detr_900_12ep', hybrid_files('swin_large_', HYBRID_900_NAME, 12)),
    Row('h_deformable_detr_swin_large_900_36ep', 'swin_large_h_deformable_detr_900_36ep', hybrid_files('drop_path0.5_swin_large_', HYBRID_900_NAME, 36)),
    Row('h_deformable_detr_swin_large_900_decay_36ep', 'swin_large_h_deformable_detr_900_decay0.05_36ep', hybrid_files('decay0.05_drop_path0.5_swin_large_', HYBRID_900_NAME, 36)),
    Row('ms_detr_resnet50_deformable', 'r50_ms_detr_300', linked=MS_SHARE.format('ms_detr_300')),
    Row('ms_detr_resnet50', 'r50_ms_detr_pp_300', linked=MS_SHARE.format('ms_detr_pp_300')),
    Row('ms_detr_resnet50_900', 'r50_ms_detr_pp_900', linked=MS_SHARE.format('ms_detr_pp_900')),
    Row('ms_detr_a_resnet50', 'r50_ms_detr_a_300'),
    Row('co_deformable_detr_resnet50', 'r50_co_deformable_detr_12ep', linked=co_file('co_deformable_detr_r50_1x_coco')),
    Row('', 'r50_co_deformable_detr_mask_12ep'),
    Row('co_deformable_detr_swin_tiny', 'swin_tiny_co_deformable_detr_12ep', linked=co_file('co_deformable_detr_swin_tiny_1x_coco')),
    Row('co_deformable_detr_swin_tiny_36ep', 'swin_tiny_co_deformable_detr_36ep', linked=co_file('co_deformable_detr_swin_tiny_3x_coco')),
    Row('co_deformable_detr_swin_small', 'swin_small_co_deformable_detr_12ep', linked=co_file('co_deformable_detr_swin_small_1x_coco')),
    Row('co_deformable_detr_swin_small_36ep', 'swin_small_co_deformable_detr_36ep', linked=co_file('co_deformable_detr_swin_small_3x_coco')),
    Row('co_deformable_detr_swin_base', 'swin_base_co_deformable_detr_12ep', linked=co_file('co_deformable_detr_swin_base_1x_coco')),
    Row('co_deformable_detr_swin_base_36ep', 'swin_base_co_deformable_detr_36ep', linked=co_file('co_deformable_detr_swin_base_3x_coco')),
    Row('co_deformable_detr_swin_large', 'swin_large_co_deformable_detr_12ep', linked=co_file('co_deformable_detr_swin_large_1x_coco')),
    Row('co_deformable_detr_swin_large_900_36ep', 'swin_large_co_deformable_detr_36ep', linked=co_file('co_deformable_detr_swin_large_900q_3x_coco')),
    Row('co_dino_resnet50', 'r50_co_dino_5scale_12ep', f'{MMDET_FILES}r50_1x_coco-7481f903.pth', linked=co_file('co_dino_5scale_r50_1x_coco')),
    Row('co_dino_resnet50_lsj', 'r50_co_dino_5scale_lsj_12ep', f'{MMDET_FILES}r50_lsj_8xb2_1x_coco/co_dino_5scale_r50_lsj_8xb2_1x_coco-69a72d67.pth', linked=co_file('co_dino_5scale_lsj_r50_1x_coco'), ap=52.0),
    Row('co_dino_resnet50_lsj_36ep', 'r50_co_dino_5scale_lsj_36ep', f'{MMDET_FILES}lsj_r50_3x_coco-fe5a6829.pth', linked=co_file('co_dino_5scale_lsj_r50_3x_coco')),
    Row('co_dino_resnet50_9encoder_lsj', 'r50_co_dino_5scale_9encoder_lsj_12ep', linked=co_file('co_dino_5scale_9encoder_lsj_r50_1x_coco')),
    Row('co_dino_resnet50_9encoder_lsj_36ep', 'r50_co_dino_5scale_9encoder_lsj_36ep', linked=co_file('co_dino_5scale_9encoder_lsj_r50_3x_coco')),
    Row('co_dino_swin_large', 'swin_large_co_dino_5scale_12ep', f'{MMDET_FILES}swin_large_1x_coco-27c13da4.pth', linked=co_file('co_dino_5scale_swin_large_1x_coco')),
    Row('co_dino_swin_large_24ep', 'swin_large_co_dino_5scale_24ep', linked=co_file('co_dino_5scale_swin_large_2x_coco')),
    Row('co_dino_swin_large_36ep', 'swin_large_co_dino_5scale_36ep', f'{MMDET_FILES}swin_large_3x_coco-d7a6d8af.pth', linked=co_file('co_dino_5scale_swin_large_3x_coco')),
    Row('co_dino_swin_large_lsj', 'swin_large_co_dino_5scale_lsj_12ep', f'{MMDET_FILES}lsj_swin_large_1x_coco-3af73af2.pth', linked=co_file('co_dino_5scale_lsj_swin_large_1x_coco')),
    Row('co_dino_swin_large_lsj_24ep', 'swin_large_co_dino_5scale_lsj_24ep', linked=co_file('co_dino_5scale_lsj_swin_large_2x_coco')),
    Row('co_dino_swin_large_lsj_36ep', 'swin_large_co_dino_5scale_lsj_36ep', linked=co_file('co_dino_5scale_lsj_swin_large_3x_coco')),
    Row('co_dino_swin_large_o365', 'swin_large_co_dino_5scale_o365_16ep', f'{MMDET_FILES}swin_large_16e_o365tococo-614254c9.pth', linked=co_file('co_dino_5scale_swin_large_16e_o365tococo')),
    Row('co_dino_vit_large_o365', 'vit_large_co_dino_5scale_o365_12ep', linked=hub_file('co-detr-vit-large-coco')),
    Row('co_dino_vit_large_o365_instance', 'vit_large_co_dino_5scale_o365_instance_12ep', linked=hub_file('co-detr-vit-large-coco-instance')),
    Row('co_dino_resnet50_lvis', 'r50_co_dino_5scale_lvis_12ep'),
    Row('co_dino_resnet50_lsj_lvis', 'r50_co_dino_5scale_lsj_lvis_12ep'),
    Row('co_dino_swin_large_lsj_lvis', 'swin_large_co_dino_5scale_lsj_lvis_36ep', linked=co_file('co_dino_5scale_lsj_swin_large_3x_lvis')),
    Row('co_dino_swin_large_lsj_o365_lvis', 'swin_large_co_dino_5scale_lsj_o365_lvis_16ep', linked=co_file('co_dino_5scale_lsj_swin_large_16e_o365tolvis')),
    Row('co_dino_vit_large_lsj_o365_lvis', 'vit_large_co_dino_5scale_lsj_o365_lvis_16ep', linked=hub_file('co-detr-vit-large-lvis')),
    Row('co_dino_vit_large_lsj_o365_lvis_instance', 'vit_large_co_dino_5scale_lsj_o365_lvis_instance_16ep', linked=hub_file('co-detr-vit-large-lvis-instance')),
    Row('', 'detr_r50_masks'),
    Row('detr_resnet50_panoptic', '', f'{DETR_FILES}r50-panoptic-00ce5173.pth', title='DETR R50, panoptic: boxes and masks', own='--masks', ap=38.8, epochs=500, num_classes=250),
    Row('detr_resnet50_dc5_panoptic', '', f'{DETR_FILES}r50-dc5-panoptic-da08f1b1.pth', title='DETR-DC5 R50, panoptic: boxes and masks', own='--masks --dilation', ap=40.2, epochs=500, num_classes=250),
    Row('detr_resnet101_panoptic', '', f'{DETR_FILES}r101-panoptic-40021d53.pth', title='DETR R101, panoptic: boxes and masks', own='--masks --backbone resnet101', ap=40.1, epochs=500, num_classes=250),
]
# fmt: on


def find_row(name: str) -> Row:
    """Return the row of a hub entry, or of a recipe in scripts/ (which need not have weights).

    Raises:
        UserError: there is none; the message names similar ones.
    """
    for row in ZOO:
        if name and name in (row.name, row.script):
            return row
    if name in recipe_names():
        return Row(name, name)
    near = did_you_mean(name, [row.name for row in ZOO])
    raise UserError(f'no model {name!r} is known{near or ":"} docs/zoo.md has all')


def with_row(args: Namespace) -> ParsedFlags:
    """Return a copy of the flags of main.py with those of the recipe behind --model, and its weights as --pretrained.

    Raises:
        UserError: there is no such row, a given flag contradicts its network, or weights are needed and have no direct address.
    """
    row = find_row(args.model)
    adopt(args, given_of(args), vars(row.recipe.flags))  # refuses flags that contradict the weights
    own_data = not args.dry_run or bool(given_of(args) & set(SOURCES))  # a dry run counts those of the recipe
    args = with_recipe(args, row.recipe, own_data)
    weights = args.resume not in ('', 'auto') or args.pretrained or args.frozen_weights
    return args if weights else merged(args, {'pretrained': row.source()})
