"""
Everything that only training needs, and the table that says how each kind of prediction is supervised.

No module of `models/` imports this package at module level. `build_model` imports it inside the function.
"""

import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from models.deformable_transformer import DeformableDecoder
from models.dino import DinoDecoder
from util.config.networks import level_strides

from .collaborative import CollaborativeHeads
from .criterion import SetCriterion, loss_suffix
from .denoising import Denoising
from .dense_heads import EPS
from .losses import BOX_LOSSES, MASK_LOSSES, FocalLoss, QualityFocalLoss, SoftmaxLoss
from .mask_losses import MaskTraining
from .matcher import HungarianMatcher, OneToManyMatcher, focal_cost, softmax_cost
from .structures import Supervision

# Ends of loss names of kinds that schemes add. H-DETR's official dictionary has a one2many copy of all other losses.
ADDED_KINDS = ('_one2many', '_o2m', '_dn', '_rcnn', '_atss')


def build_supervision(args: Namespace) -> tuple[SetCriterion, dict[str, int], nn.ModuleDict]:
    """Build the table of supervision, and what goes with it.

    Args:
        args: settled flags.

    Returns:
        The criterion with the table, the number of learned queries of each group (the inference group first), and the
        query sources.
    """
    focal = args.family != 'detr'
    cost = args.set_cost_class, args.set_cost_bbox, args.set_cost_giou
    co_detr = args.dino or bool(args.co_aux_heads)
    class_cost = partial(focal_cost, eps=1e-12 if co_detr else 1e-8) if focal else softmax_cost
    plain = one2one = Supervision(
        HungarianMatcher(*cost, class_cost),
        coefficients(args),
        class_loss(args),
    )
    table = {'one2one': one2one}
    num_queries = {'one2one': args.num_queries}
    sources = nn.ModuleDict()
    own_losses: dict[str, float] = {}  # coefficients of losses that query sources compute themselves

    if args.family == 'deformable':
        table['enc'] = proposal_supervision(args, one2one)
    if args.hybrid_queries:
        num_queries['one2many'] = args.hybrid_queries
        matcher = HungarianMatcher(*cost, class_cost, repeats=args.hybrid_k)
        table['one2many'] = replace(one2one, matcher=matcher, scale=args.hybrid_lambda)
    if args.use_ms_detr:
        table['o2m'] = mixed_supervision(args, one2one)
    if args.group_detr > 1:
        coef = {term: value / args.group_detr for term, value in one2one.coef.items()}
        table['one2one'] = replace(one2one, coef=coef)
    for group in range(1, args.group_detr):
        num_queries[f'group{group}'] = args.num_queries
        table[f'group{group}'] = table['one2one']

    if args.dn_number:
        sources['denoising'] = denoising = build_denoising(args)
        table['dn'] = replace(plain, matcher=None, count=denoising.count, source='noised objects')
    if args.co_aux_heads:
        sources['collaborative'] = build_heads(args)
        for name, head in sources['collaborative'].heads.items():
            source = f'positives of {name}'
            table[head.kind] = replace(plain, matcher=None, scale=args.lambda_1, source=source)
            factor = args.lambda_2 * args.dec_layers
            own_losses |= {f'loss_{term}': factor * coef for term, coef in head.coef.items()}

    if args.co_masks:
        sources['masks'] = MaskTraining(args.topk_eval)
        own_losses |= {'loss_comask': args.co_mask_loss_coef, 'loss_comask_iou': args.co_mask_iou_loss_coef}
    if args.masks:
        masks = {term: getattr(args, f'{term}_loss_coef') for term in MASK_LOSSES}
        table['one2one'] = replace(table['one2one'], coef=table['one2one'].coef | masks)
    weight_dict = weights(table, args) | own_losses
    if not args.two_stage:  # there are no proposals, but the official dictionary names their losses
        table.pop('enc', None)
    return SetCriterion(table, weight_dict, EPS if co_detr else 0.0), num_queries, sources


def coefficients(args: Namespace, prefix: str = '') -> dict[str, float]:
    """Return the coefficients of class ('ce') and box losses; a term of coefficient 0 is left out."""
    names = {'ce': 'cls'} | {term: term for term in BOX_LOSSES}
    coef = {term: getattr(args, f'{prefix}{name}_loss_coef') for term, name in names.items()}
    return {term: value for term, value in coef.items() if value}


def mixed_supervision(args: Namespace, one2one: Supervision) -> Supervision:
    """Return the supervision of the second reading of MS-DETR."""
    matcher = OneToManyMatcher(args.o2m_matcher_k, args.o2m_matcher_threshold)
    coef = coefficients(args, 'o2m_')
    merge = 'one2one' if args.use_indices_merge else None
    return replace(one2one, matcher=matcher, coef=coef, source='one2one, read twice', merge=merge)


def build_denoising(args: Namespace) -> Denoising:
    return Denoising(
        args.num_classes,
        args.hidden_dim,
        num_queries=args.dn_number,
        label_noise=args.dn_label_noise_ratio,
        box_noise=args.dn_box_noise_scale,
        eps=DinoDecoder.eps if args.dino else DeformableDecoder.eps,
        positions=not args.dino,
    )


def build_heads(args: Namespace) -> CollaborativeHeads:
    return CollaborativeHeads(
        args.co_aux_heads,
        args.num_classes,
        args.hidden_dim,
        strides=level_strides(args),
        max_queries=args.max_pos_coords,
        with_features=args.with_coord_feat,
        derived_positions=args.dino,
        rcnn_head=args.co_rcnn_head,
        rcnn_masks=args.co_rcnn_masks,
    )


def class_loss(args: Namespace) -> Callable:
    if args.family == 'detr':
        return SoftmaxLoss(args.eos_coef)
    return QualityFocalLoss() if args.class_loss == 'quality_focal' else FocalLoss(args.focal_alpha)


def proposal_supervision(args: Namespace, one2one: Supervision) -> Supervision:
    """Return the supervision of the encoder's proposals; MS-DETR's program matches them by their anchors alone."""
    coef = coefficients(args, 'enc_')
    matcher = one2one.matcher
    if args.enc_match == 'anchors':
        matcher = HungarianMatcher(0, args.set_cost_bbox, args.set_cost_giou, on='anchors')
    source = 'best encoder cells' if args.dino else 'encoder cells'
    return replace(one2one, matcher=matcher, coef=coef, class_agnostic=not args.dino, source=source)


def weights(table: dict[str, Supervision], args: Namespace) -> dict[str, float]:
    """Return the coefficient of every loss by its official name.

    Encoder proposals are an auxiliary output, except in MS-DETR and DINO. Official dictionaries also name terms that
    never exist, such as `loss_ce_enc_one2many`; they are kept, so that dictionaries are equal.
    """
    layers = {kind: [None, *range(args.dec_layers - 1)] if args.aux_loss else [None] for kind in table}
    if 'enc' in table and not args.use_ms_detr:
        layers['enc'] = [None] if args.aux_loss or args.dino else []
    names = {
        f'loss_{term}{loss_suffix(kind, layer)}': coef
        for kind, row in table.items()
        for layer in layers[kind]
        for term, coef in row.coef.items()
    }
    if 'enc' in table and args.use_ms_detr:  # in the official dictionary the layer comes last
        names = {re.sub(r'_(\d+)_enc$', r'_enc_\1', name): coef for name, coef in names.items()}
    if args.hybrid_k is not None and args.family == 'deformable':
        usual = [name for name in names if not name.endswith(ADDED_KINDS)]
        names = {f'{name}_one2many': names[name] for name in usual} | names
    return names
