"""
Published results on COCO val2017 and LVIS: the network of each row, its recipe in scripts/, and where its weights are.

`hubconf.py` has an entry for every row with a name, and `main.py --model` and `tools/predict.py --model` take the same
names. `python -m models.zoo` prints the table of docs/zoo.md.
"""

from argparse import Namespace
from collections.abc import Collection
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch
from torch import nn

from models import build_detector, resolve_args
from models.recorded import adopt, settle
from util.costs import count_flops
from util.errors import UserError

DETR_FILES = 'https://dl.fbaipublicfiles.com/detr/detr-'
# The authors' weights under the names of transformers; util/checkpoint.py knows them.
CONDITIONAL_R50 = 'https://huggingface.co/microsoft/conditional-detr-resnet-50/resolve/main/pytorch_model.bin'
DEFORMABLE_FILES = 'https://huggingface.co/SenseTime/deformable-detr{}/resolve/main/pytorch_model.bin'
HYBRID_FILES = 'https://github.com/HDETR/H-Deformable-DETR/releases/download/v0.1/'
MMDET_FILES = 'https://download.openmmlab.com/mmdetection/v3.0/codetr/co_dino_5scale_'
TWO_STAGE_NAME = 'deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage'
TRICKS_NAME = f'dp0_mqs_lft_{TWO_STAGE_NAME}'
HYBRID_NAME = f'hybrid_branch_lambda1_group6_t1500_{TRICKS_NAME}'
HYBRID_900_NAME = f'hybrid_branch_lambda1_group6_t1500_n900_{TRICKS_NAME}'

R101, DC5 = {'backbone': 'resnet101'}, {'dilation': True}
TINY, SMALL = {'backbone': 'swin_tiny'}, {'backbone': 'swin_small'}
LARGE = {'backbone': 'swin_large'}
BASE_12, LARGE_12 = {'backbone': 'swin_base_window12'}, {'backbone': 'swin_large_window12'}
CONDITIONAL = {'conditional': True}
ONE_LEVEL = {'num_feature_levels': 1}
REFINE = {'with_box_refine': True}
TWO_STAGE = REFINE | {'two_stage': True, 'dim_feedforward': 2048}
TRICKS = TWO_STAGE | {'mixed_selection': True, 'look_forward_twice': True, 'dropout': 0.0}
MIXED = {'use_ms_detr': True, 'use_aux_ffn': True}
CO_HEADS = {'co_aux_heads': ['faster_rcnn', 'atss'], 'aug': 'co_detr'}
CO_DEFORMABLE = TRICKS | CO_HEADS
CO_DINO = {'dino': True, 'num_feature_levels': 5} | CO_HEADS
CO_DINO_LSJ = CO_DINO | {'aug': 'lsj', 'lsj_size': 1024}
CO_DINO_LSJ_LARGE = CO_DINO | {'aug': 'lsj', 'lsj_size': 1280}
MORE, TOP_300, TOP_1000 = {'num_queries': 900}, {'topk_eval': 300}, {'topk_eval': 1000}
WIDE = {'img_size': 1280, 'max_size': 2048}  # images of models from Objects365
VIT = {'backbone': 'vit_large'} | TOP_1000
LVIS = {'num_classes': 1203, 'data': 'LVIS v1 val'}
PANOPTIC = {'num_classes': 250}


@dataclass(frozen=True)
class Row:
    """A published result.

    name: hub entry; '' where nobody publishes weights and another row has the same network.
    script: recipe in scripts/; '' if there is none.
    flags: flags of the detector, as far as they are not defaults.
    ap: box AP on `data`; None: not published.
    weights: address of the weights; '' if there is none.
    linked: where weights without an address, or the authors' own, are linked from.
    parameters, gflops: as published, millions and 1e9 multiply-adds.
    """

    name: str
    script: str
    title: str
    flags: dict = field(hash=False)
    ap: float | None
    epochs: int
    weights: str = ''
    linked: str = ''
    parameters: int | None = None
    gflops: int | None = None
    num_classes: int = 91  # class indices of the weights: COCO's ids, or those of another data set
    data: str = 'COCO val2017'

    def source(self) -> str:
        """Return the address of the weights.

        Raises:
            UserError: there is none; the message says where they are linked from.
        """
        if self.weights:
            return self.weights
        where = self.linked or 'no place: their authors have not published them'
        raise UserError(
            f'the weights of {self.name} ({self.title}) have no direct address: fetch them by hand from {where}, and pass '
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
    Row('detr_resnet50', 'detr_r50_500ep', 'DETR R50', {}, 42.0, 500, f'{DETR_FILES}r50-e632da11.pth', '', 41, 86),
    Row('', 'detr_r50_50ep', 'DETR R50', {}, 34.8, 50, '', '', 41, 86),
    Row('detr_resnet50_dc5', 'detr_r50dc5_500ep', 'DETR-DC5 R50', DC5, 43.3, 500, f'{DETR_FILES}r50-dc5-f0fb7ef5.pth', '', 41, 187),
    Row('', 'detr_r50dc5_50ep', 'DETR-DC5 R50', DC5, 35.3, 50, '', '', 41, 187),
    Row('detr_resnet101', 'detr_r101_500ep', 'DETR R101', R101, 43.5, 500, f'{DETR_FILES}r101-2c7b67e5.pth', '', 60, 152),
    Row('', 'detr_r101_50ep', 'DETR R101', R101, 36.9, 50, '', '', 60, 152),
    Row('detr_resnet101_dc5', 'detr_r101dc5_500ep', 'DETR-DC5 R101', R101 | DC5, 44.9, 500, f'{DETR_FILES}r101-dc5-a2e86def.pth', '', 60, 253),
    Row('', 'detr_r101dc5_50ep', 'DETR-DC5 R101', R101 | DC5, None, 50, '', '', 60, 253),
    Row('conditional_detr_resnet50', 'conddetr_r50_epoch50', 'Conditional DETR R50', CONDITIONAL, 41.0, 50,
        CONDITIONAL_R50, CONDITIONAL_SHARE.format('ConditionalDETR_r50_epoch50.pth'), 44, 90),
    Row('conditional_detr_resnet50_dc5', 'conddetr_r50dc5_epoch50', 'Conditional DETR-DC5 R50', CONDITIONAL | DC5, 43.7, 50,
        '', CONDITIONAL_SHARE.format('ConditionalDETR_r50dc5_epoch50.pth'), 44, 195),
    Row('conditional_detr_resnet101', 'conddetr_r101_epoch50', 'Conditional DETR R101', CONDITIONAL | R101, 42.8, 50,
        '', CONDITIONAL_SHARE.format('ConditionalDETR_r101_epoch50.pth'), 63, 156),
    Row('conditional_detr_resnet101_dc5', 'conddetr_r101dc5_epoch50', 'Conditional DETR-DC5 R101', CONDITIONAL | R101 | DC5, 45.0, 50,
        '', CONDITIONAL_SHARE.format('ConditionalDETR_r101dc5_epoch50.pth'), 63, 262),

    Row('deformable_detr_resnet50_single_scale', 'r50_deformable_detr_single_scale', 'Deformable DETR R50, one level', ONE_LEVEL, 39.4, 50,
        DEFORMABLE_FILES.format('-single-scale'), '', 34, 78),
    Row('deformable_detr_resnet50_single_scale_dc5', 'r50_deformable_detr_single_scale_dc5', 'Deformable DETR-DC5 R50, one level',
        ONE_LEVEL | DC5, 41.5, 50, DEFORMABLE_FILES.format('-single-scale-dc5'), '', 34, 128),
    Row('deformable_detr_resnet50', 'r50_deformable_detr', 'Deformable DETR R50', {'deformable': True}, 44.5, 50,
        DEFORMABLE_FILES.format(''), '', 40, 173),
    Row('deformable_detr_resnet50_box_refine', 'r50_deformable_detr_plus_iterative_bbox_refinement', 'Deformable DETR R50, box refinement',
        REFINE, 46.2, 50, DEFORMABLE_FILES.format('-with-box-refine'), '', 41, 173),
    Row('deformable_detr_resnet50_two_stage', 'r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage',
        'Deformable DETR R50, two stages', REFINE | {'two_stage': True}, 46.9, 50, DEFORMABLE_FILES.format('-with-box-refine-two-stage'), '', 41, 173),

    Row('two_stage_deformable_detr_resnet50', 'r50_two_stage_deformable_detr_12ep', 'Two-stage Deformable DETR R50', TWO_STAGE, 43.7, 12,
        hybrid_files('r50_', TWO_STAGE_NAME, 12)),
    Row('two_stage_deformable_detr_resnet50_36ep', 'r50_two_stage_deformable_detr_36ep', 'Two-stage Deformable DETR R50', TWO_STAGE, 46.8, 36,
        hybrid_files('r50_', TWO_STAGE_NAME, 36)),
    Row('two_stage_deformable_detr_swin_tiny', 'swin_tiny_two_stage_deformable_detr_12ep', 'Two-stage Deformable DETR Swin-T', TWO_STAGE | TINY, 45.3, 12,
        hybrid_files('swin_tiny_', TWO_STAGE_NAME, 12)),
    Row('two_stage_deformable_detr_swin_tiny_second_run', 'swin_tiny_two_stage_deformable_detr_12ep', 'Two-stage Deformable DETR Swin-T, second run',
        TWO_STAGE | TINY, 46.0, 12, hybrid_files('swin_tiny_', TWO_STAGE_NAME, 12, '_2')),
    Row('two_stage_deformable_detr_swin_tiny_36ep', 'swin_tiny_two_stage_deformable_detr_36ep', 'Two-stage Deformable DETR Swin-T', TWO_STAGE | TINY, 49.0, 36,
        hybrid_files('swin_tiny_', TWO_STAGE_NAME, 36)),
    Row('two_stage_deformable_detr_swin_tiny_36ep_second_run', 'swin_tiny_two_stage_deformable_detr_36ep',
        'Two-stage Deformable DETR Swin-T, second run', TWO_STAGE | TINY, 49.6, 36, hybrid_files('swin_tiny_', TWO_STAGE_NAME, 36, '_2')),
    Row('two_stage_deformable_detr_swin_large', 'swin_large_two_stage_deformable_detr_12ep', 'Two-stage Deformable DETR Swin-L', TWO_STAGE | LARGE, 51.0, 12,
        hybrid_files('swin_large_', TWO_STAGE_NAME, 12)),
    Row('two_stage_deformable_detr_swin_large_36ep', 'swin_large_two_stage_deformable_detr_36ep', 'Two-stage Deformable DETR Swin-L', TWO_STAGE | LARGE, 53.7, 36,
        hybrid_files('drop_path0.5_swin_large_', TWO_STAGE_NAME, 36)),
    Row('deformable_detr_plus_plus_resnet50', 'r50_two_stage_deformable_detr_tricks_12ep', 'Deformable-DETR++ R50', TRICKS, 47.0, 12,
        hybrid_files('r50_', TRICKS_NAME, 12)),
    Row('deformable_detr_plus_plus_resnet50_36ep', 'r50_two_stage_deformable_detr_tricks_36ep', 'Deformable-DETR++ R50', TRICKS, 49.0, 36,
        hybrid_files('r50_', TRICKS_NAME, 36)),
    Row('deformable_detr_plus_plus_swin_tiny', 'swin_tiny_two_stage_deformable_detr_tricks_12ep', 'Deformable-DETR++ Swin-T', TRICKS | TINY, 49.3, 12,
        hybrid_files('swin_tiny_', TRICKS_NAME, 12)),
    Row('deformable_detr_plus_plus_swin_tiny_36ep', 'swin_tiny_two_stage_deformable_detr_tricks_36ep', 'Deformable-DETR++ Swin-T', TRICKS | TINY, 51.8, 36,
        hybrid_files('swin_tiny_', TRICKS_NAME, 36)),
    Row('deformable_detr_plus_plus_swin_large', 'swin_large_two_stage_deformable_detr_tricks_12ep', 'Deformable-DETR++ Swin-L', TRICKS | LARGE, 54.5, 12,
        hybrid_files('swin_large_', TRICKS_NAME, 12)),
    Row('deformable_detr_plus_plus_swin_large_36ep', 'swin_large_two_stage_deformable_detr_tricks_36ep', 'Deformable-DETR++ Swin-L', TRICKS | LARGE, 56.3, 36,
        hybrid_files('drop_path0.5_swin_large_', TRICKS_NAME, 36)),

    Row('h_deformable_detr_resnet50', 'r50_h_deformable_detr_12ep', 'H-Deformable-DETR R50', TRICKS, 48.7, 12, hybrid_files('r50_', HYBRID_NAME, 12)),
    Row('h_deformable_detr_resnet50_36ep', 'r50_h_deformable_detr_36ep', 'H-Deformable-DETR R50', TRICKS, 50.0, 36, hybrid_files('r50_', HYBRID_NAME, 36)),
    Row('', 'r101_h_deformable_detr_12ep', 'H-Deformable-DETR R101', TRICKS | R101, None, 12),
    Row('', 'r101_h_deformable_detr_36ep', 'H-Deformable-DETR R101', TRICKS | R101, None, 36),
    Row('h_deformable_detr_swin_tiny', 'swin_tiny_h_deformable_detr_12ep', 'H-Deformable-DETR Swin-T', TRICKS | TINY, 50.6, 12,
        hybrid_files('swin_tiny_', HYBRID_NAME, 12)),
    Row('h_deformable_detr_swin_tiny_36ep', 'swin_tiny_h_deformable_detr_36ep', 'H-Deformable-DETR Swin-T', TRICKS | TINY, 53.2, 36,
        hybrid_files('swin_tiny_', HYBRID_NAME, 36)),
    Row('h_deformable_detr_swin_tiny_decay', 'swin_tiny_h_deformable_detr_decay0.05_12ep', 'H-Deformable-DETR Swin-T, weight decay 0.05',
        TRICKS | TINY, 51.2, 12, hybrid_files('decay0.05_swin_tiny_', HYBRID_NAME, 12)),
    Row('h_deformable_detr_swin_tiny_decay_36ep', 'swin_tiny_h_deformable_detr_decay0.05_36ep', 'H-Deformable-DETR Swin-T, weight decay 0.05',
        TRICKS | TINY, 53.7, 36, hybrid_files('decay0.05_swin_tiny_', HYBRID_NAME, 36)),
    Row('', 'swin_small_h_deformable_detr_12ep', 'H-Deformable-DETR Swin-S', TRICKS | SMALL, None, 12),
    Row('', 'swin_small_h_deformable_detr_36ep', 'H-Deformable-DETR Swin-S', TRICKS | SMALL, None, 36),
    Row('h_deformable_detr_swin_large', 'swin_large_h_deformable_detr_12ep', 'H-Deformable-DETR Swin-L', TRICKS | LARGE, 55.9, 12,
        hybrid_files('swin_large_', HYBRID_NAME, 12)),
    Row('h_deformable_detr_swin_large_36ep', 'swin_large_h_deformable_detr_36ep', 'H-Deformable-DETR Swin-L', TRICKS | LARGE, 57.1, 36,
        hybrid_files('drop_path0.5_swin_large_', HYBRID_NAME, 36)),
    Row('h_deformable_detr_swin_large_900', 'swin_large_h_deformable_detr_900_12ep', 'H-Deformable-DETR Swin-L, 900 queries', TRICKS | LARGE | MORE, 56.1, 12,
        hybrid_files('swin_large_', HYBRID_900_NAME, 12)),
    Row('h_deformable_detr_swin_large_900_36ep', 'swin_large_h_deformable_detr_900_36ep', 'H-Deformable-DETR Swin-L, 900 queries', TRICKS | LARGE | MORE, 57.4, 36,
        hybrid_files('drop_path0.5_swin_large_', HYBRID_900_NAME, 36)),
    Row('h_deformable_detr_swin_large_900_decay_36ep', 'swin_large_h_deformable_detr_900_decay0.05_36ep',
        'H-Deformable-DETR Swin-L, 900 queries, weight decay 0.05', TRICKS | LARGE | MORE, 57.8, 36, hybrid_files('decay0.05_drop_path0.5_swin_large_', HYBRID_900_NAME, 36)),

    Row('ms_detr_resnet50_deformable', 'r50_ms_detr_300', 'MS-DETR R50', TWO_STAGE | MIXED, 47.6, 12, '', MS_SHARE.format('ms_detr_300')),
    Row('ms_detr_resnet50', 'r50_ms_detr_pp_300', 'MS-DETR R50 on Deformable-DETR++', TRICKS | MIXED, 48.8, 12, '', MS_SHARE.format('ms_detr_pp_300')),
    Row('ms_detr_resnet50_900', 'r50_ms_detr_pp_900', 'MS-DETR R50 on Deformable-DETR++, 900 queries', TRICKS | MIXED | MORE | TOP_300, 50.0, 12,
        '', MS_SHARE.format('ms_detr_pp_900')),
    Row('ms_detr_a_resnet50', 'r50_ms_detr_a_300', 'MS-DETR R50, variant a', TWO_STAGE | {'use_ms_detr': True, 'ms_variant': 'a'}, None, 12),

    Row('co_deformable_detr_resnet50', 'r50_co_deformable_detr_12ep', 'Co-Deformable-DETR R50', CO_DEFORMABLE, 49.5, 12, '', co_file('co_deformable_detr_r50_1x_coco')),
    Row('', 'r50_co_deformable_detr_mask_12ep', 'Co-Deformable-DETR R50, masks of its RoI head', CO_DEFORMABLE, None, 12),
    Row('co_deformable_detr_swin_tiny', 'swin_tiny_co_deformable_detr_12ep', 'Co-Deformable-DETR Swin-T', CO_DEFORMABLE | TINY, 51.7, 12,
        '', co_file('co_deformable_detr_swin_tiny_1x_coco')),
    Row('co_deformable_detr_swin_tiny_36ep', 'swin_tiny_co_deformable_detr_36ep', 'Co-Deformable-DETR Swin-T', CO_DEFORMABLE | TINY, 54.1, 36,
        '', co_file('co_deformable_detr_swin_tiny_3x_coco')),
    Row('co_deformable_detr_swin_small', 'swin_small_co_deformable_detr_12ep', 'Co-Deformable-DETR Swin-S', CO_DEFORMABLE | SMALL, 53.4, 12,
        '', co_file('co_deformable_detr_swin_small_1x_coco')),
    Row('co_deformable_detr_swin_small_36ep', 'swin_small_co_deformable_detr_36ep', 'Co-Deformable-DETR Swin-S', CO_DEFORMABLE | SMALL, 55.3, 36,
        '', co_file('co_deformable_detr_swin_small_3x_coco')),
    Row('co_deformable_detr_swin_base', 'swin_base_co_deformable_detr_12ep', 'Co-Deformable-DETR Swin-B', CO_DEFORMABLE | BASE_12, 55.5, 12,
        '', co_file('co_deformable_detr_swin_base_1x_coco')),
    Row('co_deformable_detr_swin_base_36ep', 'swin_base_co_deformable_detr_36ep', 'Co-Deformable-DETR Swin-B', CO_DEFORMABLE | BASE_12, 57.5, 36,
        '', co_file('co_deformable_detr_swin_base_3x_coco')),
    Row('co_deformable_detr_swin_large', 'swin_large_co_deformable_detr_12ep', 'Co-Deformable-DETR Swin-L', CO_DEFORMABLE | LARGE_12, 56.9, 12,
        '', co_file('co_deformable_detr_swin_large_1x_coco')),
    Row('co_deformable_detr_swin_large_900_36ep', 'swin_large_co_deformable_detr_36ep', 'Co-Deformable-DETR Swin-L, 900 queries',
        CO_DEFORMABLE | LARGE_12 | MORE | TOP_300, 58.5, 36, '', co_file('co_deformable_detr_swin_large_900q_3x_coco')),

    Row('co_dino_resnet50', 'r50_co_dino_5scale_12ep', 'Co-DINO R50', CO_DINO, 52.1, 12,
        f'{MMDET_FILES}r50_1x_coco-7481f903.pth', co_file('co_dino_5scale_r50_1x_coco')),
    Row('co_dino_resnet50_lsj', 'r50_co_dino_5scale_lsj_12ep', 'Co-DINO R50, large-scale jitter', CO_DINO_LSJ, 52.1, 12,
        f'{MMDET_FILES}r50_lsj_8xb2_1x_coco-69a72d67.pth', co_file('co_dino_5scale_lsj_r50_1x_coco')),
    Row('co_dino_resnet50_lsj_36ep', 'r50_co_dino_5scale_lsj_36ep', 'Co-DINO R50, large-scale jitter', CO_DINO_LSJ, 54.8, 36,
        '', co_file('co_dino_5scale_lsj_r50_3x_coco')),
    Row('co_dino_resnet50_9encoder_lsj', 'r50_co_dino_5scale_9encoder_lsj_12ep', 'Co-DINO R50, 9 encoder layers, large-scale jitter',
        CO_DINO_LSJ | {'enc_layers': 9}, 52.6, 12, '', co_file('co_dino_5scale_9encoder_lsj_r50_1x_coco')),
    Row('co_dino_resnet50_9encoder_lsj_36ep', 'r50_co_dino_5scale_9encoder_lsj_36ep', 'Co-DINO R50, 9 encoder layers, large-scale jitter',
        CO_DINO_LSJ | {'enc_layers': 9}, 55.4, 36, '', co_file('co_dino_5scale_9encoder_lsj_r50_3x_coco')),
    Row('co_dino_swin_large', 'swin_large_co_dino_5scale_12ep', 'Co-DINO Swin-L', CO_DINO | LARGE_12, 58.9, 12,
        f'{MMDET_FILES}swin_large_1x_coco-27c13da4.pth', co_file('co_dino_5scale_swin_large_1x_coco')),
    Row('co_dino_swin_large_24ep', 'swin_large_co_dino_5scale_24ep', 'Co-DINO Swin-L', CO_DINO | LARGE_12, 59.8, 24,
        '', co_file('co_dino_5scale_swin_large_2x_coco')),
    Row('co_dino_swin_large_36ep', 'swin_large_co_dino_5scale_36ep', 'Co-DINO Swin-L', CO_DINO | LARGE_12, 60.0, 36,
        '', co_file('co_dino_5scale_swin_large_3x_coco')),
    Row('co_dino_swin_large_lsj', 'swin_large_co_dino_5scale_lsj_12ep', 'Co-DINO Swin-L, large-scale jitter', CO_DINO_LSJ_LARGE | LARGE_12, 59.3, 12,
        f'{MMDET_FILES}lsj_swin_large_1x_coco-3af73af2.pth', co_file('co_dino_5scale_lsj_swin_large_1x_coco')),
    Row('co_dino_swin_large_lsj_24ep', 'swin_large_co_dino_5scale_lsj_24ep', 'Co-DINO Swin-L, large-scale jitter', CO_DINO_LSJ_LARGE | LARGE_12, 60.4, 24,
        '', co_file('co_dino_5scale_lsj_swin_large_2x_coco')),
    Row('co_dino_swin_large_lsj_36ep', 'swin_large_co_dino_5scale_lsj_36ep', 'Co-DINO Swin-L, large-scale jitter', CO_DINO_LSJ_LARGE | LARGE_12, 60.7, 36,
        '', co_file('co_dino_5scale_lsj_swin_large_3x_coco')),
    Row('co_dino_swin_large_o365', 'swin_large_co_dino_5scale_o365_16ep', 'Co-DINO Swin-L, pretrained on Objects365', CO_DINO | LARGE_12 | WIDE, 64.1, 16,
        f'{MMDET_FILES}swin_large_16e_o365tococo-614254c9.pth', co_file('co_dino_5scale_swin_large_16e_o365tococo')),
    Row('co_dino_vit_large_o365', 'vit_large_co_dino_5scale_o365_12ep', 'Co-DINO ViT-L, pretrained on Objects365',
        CO_DINO | VIT | WIDE | {'num_queries': 1500}, 65.9, 12, '', hub_file('co-detr-vit-large-coco')),
    Row('co_dino_vit_large_o365_instance', 'vit_large_co_dino_5scale_o365_instance_12ep', 'Co-DINO ViT-L with masks (56.6), pretrained on Objects365',
        CO_DINO | VIT | WIDE | {'num_queries': 1500, 'co_masks': True}, 65.8, 12, '', hub_file('co-detr-vit-large-coco-instance')),

    Row('co_dino_resnet50_lvis', 'r50_co_dino_5scale_lvis_12ep', 'Co-DINO R50 (LVIS)', CO_DINO, None, 12, '', co_file('co_dino_5scale_r50_1x_lvis'), **LVIS),
    Row('co_dino_resnet50_lsj_lvis', 'r50_co_dino_5scale_lsj_lvis_12ep', 'Co-DINO R50, large-scale jitter (LVIS)', CO_DINO_LSJ, None, 12,
        '', co_file('co_dino_5scale_lsj_r50_1x_lvis'), **LVIS),
    Row('co_dino_swin_large_lsj_lvis', 'swin_large_co_dino_5scale_lsj_lvis_36ep', 'Co-DINO Swin-L, large-scale jitter (LVIS)', CO_DINO_LSJ_LARGE | LARGE_12, 56.9, 36,
        '', co_file('co_dino_5scale_lsj_swin_large_3x_lvis'), **LVIS),
    Row('co_dino_swin_large_lsj_o365_lvis', 'swin_large_co_dino_5scale_lsj_o365_lvis_16ep', 'Co-DINO Swin-L, large-scale jitter, pretrained on Objects365 (LVIS)',
        CO_DINO_LSJ | LARGE_12 | TOP_1000 | {'lsj_size': 1536}, 64.5, 16, '', co_file('co_dino_5scale_lsj_swin_large_16e_o365tolvis'), **LVIS),
    Row('co_dino_vit_large_lsj_o365_lvis', 'vit_large_co_dino_5scale_lsj_o365_lvis_16ep', 'Co-DINO ViT-L, large-scale jitter, pretrained on Objects365 (LVIS)',
        CO_DINO_LSJ | VIT | {'backbone': 'vit_large_lsj', 'lsj_size': 1536}, 68.0, 16, '', hub_file('co-detr-vit-large-lvis'), **LVIS),
    Row('co_dino_vit_large_lsj_o365_lvis_instance', 'vit_large_co_dino_5scale_lsj_o365_lvis_instance_16ep',
        'Co-DINO ViT-L with masks (60.7), large-scale jitter, pretrained on Objects365 (LVIS)',
        CO_DINO_LSJ | VIT | {'backbone': 'vit_large_lsj', 'lsj_size': 1536, 'co_masks': True}, 67.3, 16, '', hub_file('co-detr-vit-large-lvis-instance'), **LVIS),

    Row('', 'detr_r50_masks', 'DETR R50, masks', {'masks': True}, None, 25),
    Row('detr_resnet50_panoptic', '', 'DETR R50, panoptic: boxes and masks', {'masks': True}, 38.8, 500, f'{DETR_FILES}r50-panoptic-00ce5173.pth', **PANOPTIC),
    Row('detr_resnet50_dc5_panoptic', '', 'DETR-DC5 R50, panoptic: boxes and masks', {'masks': True} | DC5, 40.2, 500, f'{DETR_FILES}r50-dc5-panoptic-da08f1b1.pth', **PANOPTIC),
    Row('detr_resnet101_panoptic', '', 'DETR R101, panoptic: boxes and masks', {'masks': True} | R101, 40.1, 500, f'{DETR_FILES}r101-panoptic-40021d53.pth', **PANOPTIC),
]
# fmt: on


def find_row(name: str) -> Row:
    """Return the row of a hub entry, or of a recipe in scripts/.

    Raises:
        UserError: there is none; the message names similar ones.
    """
    for row in ZOO:
        if name and name in (row.name, row.script):
            return row
    names = [row.name for row in ZOO if row.name]
    similar = get_close_matches(name, names, n=3) or names[:3]
    raise UserError(f'no model {name!r} is known: {", ".join(similar)}, ... (docs/zoo.md has all)')


def with_row(args: Namespace, given: Collection[str]) -> Namespace:
    """Return a copy of the flags of main.py with those of the row that --model names, and its weights as --pretrained.

    Args:
        given: names of the flags on the command line.

    Raises:
        UserError: there is no such row, a given flag contradicts it, or weights are needed and have no direct address.
    """
    row = find_row(args.model)
    args = adopt(args, given, vars(settle(row.flags)))
    others = set(row.flags) & {'aug', 'lsj_size', 'img_size', 'max_size', 'co_aux_heads'} - set(given)
    args = Namespace(**vars(args) | {flag: row.flags[flag] for flag in others})
    if args.resume in ('', 'auto') and not (args.pretrained or args.frozen_weights):
        args.pretrained = row.source()
    return args


def build_row(
    row: Row, num_classes: int | None = None, backbone_weights: str = 'none'
) -> tuple[nn.Module, Namespace]:
    """Build the detector of a row for inference; return it with its settled flags."""
    num_classes = num_classes or row.num_classes
    own = {'num_classes': num_classes, 'backbone_weights': backbone_weights, 'aux_loss': False}
    args = resolve_args(Namespace(**row.flags | own))
    return build_detector(args, {'one2one': args.num_queries}), args


def counts(row: Row, height: int = 800, width: int = 1136) -> tuple[int, float]:
    """Return parameters and multiply-adds (1e9) of a row's detector for one image, computed without memory for it.

    The published counts are means over the first 100 images of COCO val2017; one image of 800 x 1136 pixels has the same
    for DETR. A network for squares of one size is counted with one.
    """
    if row.flags.get('backbone') == 'vit_large_lsj':
        height = width = row.flags['lsj_size']
    with torch.device('meta'):
        model, _ = build_row(row)
    return sum(p.numel() for p in model.parameters()), count_flops(model, height, width) / 2e9


def table() -> str:
    """Return the table of docs/zoo.md."""
    lines = [
        '| model | epochs | AP | parameters, M (published) | GFLOPs (published) | hub entry | recipe | weights |',
        '| --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    known: dict[str, tuple[int, float]] = {}
    for row in ZOO:
        key = repr(row.flags)
        known[key] = known.get(key) or counts(row)
        parameters, gflops = known[key]
        published = [f' ({value})' if value else '' for value in (row.parameters, row.gflops)]
        where = f'[file]({row.weights})' if row.weights else row.linked.replace('the ', '', 1)
        entry, script = (f'`{name}`' if name else '' for name in (row.name, row.script))
        cells = (
            row.title, row.epochs, row.ap or 'not published', f'{parameters / 1e6:.1f}{published[0]}',
            f'{gflops:.0f}{published[1]}', entry, script, where,
        )  # fmt: skip
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(lines)


if __name__ == '__main__':
    print(table())
