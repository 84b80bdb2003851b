"""
What only training needs. Nothing in `models/` imports this package at module level; `build_model` does,
inside the function.
"""

import re
from argparse import Namespace
from dataclasses import replace

from torch import nn

from models.structures import Supervision

from .criterion import SetCriterion, loss_suffix
from .losses import FocalLoss, SoftmaxLoss
from .matcher import HungarianMatcher, OneToManyMatcher, focal_cost, softmax_cost


def build_supervision(args: Namespace) -> tuple[SetCriterion, dict[str, int], nn.ModuleDict]:
    """The table of supervision, the learned queries of each group (inference group first), and the query
    sources.
    """
    focal = args.family != 'detr'
    cost = args.set_cost_class, args.set_cost_bbox, args.set_cost_giou
    class_cost = focal_cost if focal else softmax_cost
    one2one = Supervision(
        HungarianMatcher(*cost, class_cost),
        {'ce': args.cls_loss_coef, 'bbox': args.bbox_loss_coef, 'giou': args.giou_loss_coef},
        FocalLoss(args.focal_alpha) if focal else SoftmaxLoss(args.eos_coef),
    )
    table = {'one2one': one2one}
    num_queries = {'one2one': args.num_queries}
    sources = nn.ModuleDict()

    if args.family == 'deformable':
        table['enc'] = proposal_supervision(args, one2one)
    if args.hybrid_queries:
        num_queries['one2many'] = args.hybrid_queries
        matcher = HungarianMatcher(*cost, class_cost, repeats=args.hybrid_k)
        table['one2many'] = replace(one2one, matcher=matcher, scale=args.hybrid_lambda)
    if args.use_ms_detr:
        matcher = OneToManyMatcher(
            args.o2m_matcher_k, args.o2m_matcher_threshold, args.o2m_iou_weight, args.o2m_score_weight
        )
        coef = {
            'ce': args.o2m_cls_loss_coef,
            'bbox': args.o2m_bbox_loss_coef,
            'giou': args.o2m_giou_loss_coef,
        }
        merge = 'one2one' if args.use_indices_merge else None
        source = 'one2one, read twice'
        table['o2m'] = replace(one2one, matcher=matcher, coef=coef, source=source, merge=merge)
    if args.group_detr > 1:
        coef = {term: value / args.group_detr for term, value in one2one.coef.items()}
        table['one2one'] = replace(one2one, coef=coef)
    for group in range(1, args.group_detr):
        num_queries[f'group{group}'] = args.num_queries
        table[f'group{group}'] = table['one2one']

    weight_dict = weights(table, args)
    if not args.two_stage:
        table.pop(
            'enc', None
        )  # there are no proposals; the official dictionary names their losses all the same
    return SetCriterion(table, weight_dict), num_queries, sources


def proposal_supervision(args: Namespace, one2one: Supervision) -> Supervision:
    """Of the encoder's proposals, which are matched as the queries are, or, in MS-DETR, by their anchors alone."""
    coef = {'ce': args.enc_cls_loss_coef, 'bbox': args.enc_bbox_loss_coef, 'giou': args.enc_giou_loss_coef}
    matcher = one2one.matcher
    if args.use_ms_detr:
        matcher = HungarianMatcher(0, args.set_cost_bbox, args.set_cost_giou, on='anchors')
    return replace(one2one, matcher=matcher, coef=coef, class_agnostic=True, source='encoder cells')


def weights(table: dict[str, Supervision], args: Namespace) -> dict[str, float]:
    """Coefficient of every loss, by official name. Encoder proposals count as an auxiliary output, except in
    MS-DETR.

    Official dictionaries also name terms that never exist, such as `loss_ce_enc_one2many`; they are kept, so that
    dictionaries are equal.
    """
    layers = {kind: [None, *range(args.dec_layers - 1)] if args.aux_loss else [None] for kind in table}
    if 'enc' in table and not args.use_ms_detr:
        layers['enc'] = [None] if args.aux_loss else []
    names = {
        f'loss_{term}{loss_suffix(kind, layer)}': coef
        for kind, row in table.items()
        for layer in layers[kind]
        for term, coef in row.coef.items()
    }
    if 'enc' in table and args.use_ms_detr:  # in the official dictionary the layer comes last
        names = {re.sub(r'_(\d+)_enc$', r'_enc_\1', name): coef for name, coef in names.items()}
    if args.hybrid_k is not None and args.family == 'deformable':
        usual = [name for name in names if not name.endswith(('_one2many', '_o2m'))]
        names = {f'{name}_one2many': names[name] for name in usual} | names
    return names
