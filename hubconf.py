"""
Detectors through torch.hub:

  model, postprocess = torch.hub.load(REPO, 'detr_resnet50', pretrained=True, return_postprocessor=True)
  detections = postprocess(model.eval()(images), target_sizes)

An entry is a recipe's flags and the address of its official weights.
"""

from argparse import Namespace

from models import build_detector, build_postprocessors, resolve_args
from util.checkpoint import load_checkpoint

dependencies = ['torch', 'torchvision', 'numpy']

DETR_FILES = 'https://dl.fbaipublicfiles.com/detr/'
# The authors' weights under the names of transformers; util.checkpoint knows them.
CONDITIONAL_R50 = 'https://huggingface.co/microsoft/conditional-detr-resnet-50/resolve/main/pytorch_model.bin'
DEFORMABLE = 'https://huggingface.co/SenseTime/deformable-detr{}/resolve/main/pytorch_model.bin'

TRICKS = {
    'with_box_refine': True,
    'two_stage': True,
    'mixed_selection': True,
    'look_forward_twice': True,
    'dim_feedforward': 2048,
}


def build(
    flags: dict, url: str | None, pretrained: bool, num_classes: int, return_postprocessor: bool
) -> object:
    """Build a detector for inference. num_classes: class indices, 'no object' not counted; 91 for official COCO
    weights.

    ValueError: `pretrained` with another number of classes, or without published weights.
    """
    args = resolve_args(
        Namespace(
            **flags,
            num_classes=num_classes,
            backbone_weights='none' if pretrained else 'imagenet',
            aux_loss=False,
        )
    )
    if pretrained and num_classes != 91:
        raise ValueError(
            f'the published weights know 91 COCO class ids, not {num_classes}: load them, then fine-tune'
        )
    if pretrained and url is None:
        raise ValueError(
            'these weights have no stable address: fetch the file that the authors link to by hand, and call '
            'util.checkpoint.load_checkpoint(model, path)'
        )
    model = build_detector(args, {'one2one': args.num_queries})
    if pretrained:
        load_checkpoint(model, url)
    return (model, build_postprocessors(args)['bbox']) if return_postprocessor else model


def detr_resnet50(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> object:
    """DETR R50, 42.0 AP on COCO val2017 (500 epochs)."""
    return build({}, DETR_FILES + 'detr-r50-e632da11.pth', pretrained, num_classes, return_postprocessor)


def detr_resnet50_dc5(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> object:
    """DETR-DC5 R50, 43.3 AP on COCO val2017 (500 epochs)."""
    url = DETR_FILES + 'detr-r50-dc5-f0fb7ef5.pth'
    return build({'dilation': True}, url, pretrained, num_classes, return_postprocessor)


def detr_resnet101(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> object:
    """DETR R101, 43.5 AP on COCO val2017 (500 epochs)."""
    url = DETR_FILES + 'detr-r101-2c7b67e5.pth'
    return build({'backbone': 'resnet101'}, url, pretrained, num_classes, return_postprocessor)


def detr_resnet101_dc5(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> object:
    """DETR-DC5 R101, 44.9 AP on COCO val2017 (500 epochs)."""
    flags = {'backbone': 'resnet101', 'dilation': True}
    url = DETR_FILES + 'detr-r101-dc5-a2e86def.pth'
    return build(flags, url, pretrained, num_classes, return_postprocessor)


def conditional_detr_resnet50(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> object:
    """Conditional DETR R50, 41.0 AP on COCO val2017 (50 epochs)."""
    return build({'conditional': True}, CONDITIONAL_R50, pretrained, num_classes, return_postprocessor)


def conditional_detr_resnet50_dc5(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> object:
    """Conditional DETR-DC5 R50, 43.7 AP on COCO val2017 (50 epochs); weights:
    ConditionalDETR_r50dc5_epoch50.pth.
    """
    flags = {'conditional': True, 'dilation': True}
    return build(flags, None, pretrained, num_classes, return_postprocessor)


def conditional_detr_resnet101(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> object:
    """Conditional DETR R101, 42.8 AP on COCO val2017 (50 epochs); weights: ConditionalDETR_r101_epoch50.pth."""
    flags = {'conditional': True, 'backbone': 'resnet101'}
    return build(flags, None, pretrained, num_classes, return_postprocessor)


def conditional_detr_resnet101_dc5(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> object:
    """Conditional DETR-DC5 R101, 45.0 AP on COCO val2017 (50 epochs); weights:
    ConditionalDETR_r101dc5_epoch50.pth.
    """
    flags = {'conditional': True, 'backbone': 'resnet101', 'dilation': True}
    return build(flags, None, pretrained, num_classes, return_postprocessor)


def deformable_detr_resnet50(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> object:
    """Deformable DETR R50, 44.5 AP on COCO val2017 (50 epochs)."""
    url = DEFORMABLE.format('')
    return build({'deformable': True}, url, pretrained, num_classes, return_postprocessor)


def deformable_detr_resnet50_single_scale(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> object:
    """Deformable DETR R50, one feature level, 39.4 AP on COCO val2017 (50 epochs)."""
    url = DEFORMABLE.format('-single-scale')
    return build({'num_feature_levels': 1}, url, pretrained, num_classes, return_postprocessor)


def deformable_detr_resnet50_single_scale_dc5(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> object:
    """Deformable DETR R50-DC5, one feature level, 41.5 AP on COCO val2017 (50 epochs)."""
    url = DEFORMABLE.format('-single-scale-dc5')
    return build(
        {'num_feature_levels': 1, 'dilation': True}, url, pretrained, num_classes, return_postprocessor
    )


def deformable_detr_resnet50_box_refine(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> object:
    """Deformable DETR R50 with box refinement, 46.2 AP on COCO val2017 (50 epochs)."""
    url = DEFORMABLE.format('-with-box-refine')
    return build({'with_box_refine': True}, url, pretrained, num_classes, return_postprocessor)


def deformable_detr_resnet50_two_stage(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> object:
    """Two-stage Deformable DETR R50 with box refinement, 46.9 AP on COCO val2017 (50 epochs)."""
    url = DEFORMABLE.format('-with-box-refine-two-stage')
    return build(
        {'with_box_refine': True, 'two_stage': True}, url, pretrained, num_classes, return_postprocessor
    )


def h_deformable_detr_resnet50(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> object:
    """H-Deformable-DETR R50 with the tricks, 48.7 AP on COCO val2017 (12 epochs), 50.0 (36 epochs); weights:
    r50_hybrid_branch_lambda1_group6_t1500_dp0_mqs_lft_..._12eps.pth (or _36eps.pth). Only the one-to-one queries
    are built.
    """
    return build(TRICKS, None, pretrained, num_classes, return_postprocessor)


def ms_detr_resnet50(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> object:
    """MS-DETR R50 on Deformable-DETR++, 300 queries, 48.8 AP on COCO val2017 (12 epochs); weights: the authors' file
    of exps/ms_detr_pp_300.
    """
    flags = TRICKS | {'use_ms_detr': True, 'use_aux_ffn': True}
    return build(flags, None, pretrained, num_classes, return_postprocessor)


def co_deformable_detr_resnet50(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> object:
    """Co-Deformable-DETR R50, 49.5 AP on COCO val2017 (12 epochs); weights: the authors' file of
    co_deformable_detr_r50_1x_coco, whose 80 classes go to COCO's 91 ids.
    """
    flags = TRICKS | {'co_aux_heads': ['faster_rcnn', 'atss']}
    return build(flags, None, pretrained, num_classes, return_postprocessor)


def co_dino_resnet50(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> object:
    """Co-DINO R50, five levels, 52.1 AP on COCO val2017 (12 epochs); weights: the authors' file of
    co_dino_5scale_r50_1x_coco, whose 80 classes go to COCO's 91 ids.
    """
    flags = {'dino': True, 'num_feature_levels': 5, 'co_aux_heads': ['faster_rcnn', 'atss']}
    return build(flags, None, pretrained, num_classes, return_postprocessor)
