"""The table that says how each kind of prediction is supervised, and all that training adds to a detector."""

from argparse import Namespace
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from models.decoders import decoder_class
from models.structures import TrainingBranch
from util.config.networks import follows_mmdetection, level_strides

from .collaborative import CollaborativeHeads
from .criterion import SetCriterion, Supervision, loss_suffixes
from .denoising import Denoising
from .dense_heads import EPS
from .losses import BOX_LOSSES, CLASS_LOSSES, MASK_LOSSES
from .masks import MaskTraining
from .matcher import HungarianMatcher, OneToManyMatcher, focal_cost, softmax_cost


@dataclass
class Plan:
    """What a run trains. The functions of `SCHEMES` add to it one after the other."""

    decoder: type[nn.Module]
    one2one: Supervision  # other rows are variants of this one
    table: dict[str, Supervision]
    num_queries: dict[str, int]  # learned queries of each group, the inference group first
    branches: dict[str, TrainingBranch] = field(default_factory=dict)
    coef: dict[str, float] = field(default_factory=dict)  # of losses that branches compute, by their names


def build_supervision(args: Namespace) -> tuple[SetCriterion, dict[str, int], nn.ModuleDict]:
    """Build the table of supervision, and all that training adds to a detector.

    Args:
        args: settled flags.

    Returns:
        The criterion with the table, the number of learned queries of each group (the inference group first),
        and the training branches by their names.
    """
    class_loss = CLASS_LOSSES['softmax' if args.family == 'detr' else args.class_loss](args)
    one2one = Supervision(build_hungarian(args), coefficients(args), class_loss)
    plan = Plan(decoder_class(args), one2one, {'one2one': one2one}, {'one2one': args.num_queries})
    for scheme in SCHEMES:
        scheme(plan, args)
    weight_dict = loss_coefficients(plan, args) | plan.coef
    eps = EPS if follows_mmdetection(args) else 0.0
    return SetCriterion(plan.table, weight_dict, eps), plan.num_queries, nn.ModuleDict(plan.branches)


def build_hungarian(args: Namespace, repeats: int = 1) -> HungarianMatcher:
    class_cost = partial(focal_cost, eps=1e-12 if follows_mmdetection(args) else 1e-8)
    if args.family == 'detr':
        class_cost = softmax_cost
    return HungarianMatcher(args.set_cost_class, args.set_cost_bbox, args.set_cost_giou, class_cost, repeats)


def coefficients(args: Namespace, prefix: str = '') -> dict[str, float]:
    """Return the coefficients of class ('ce') and box losses; a term of coefficient 0 is left out."""
    names = {'ce': 'cls'} | {term: term for term in BOX_LOSSES}
    coef = {term: getattr(args, f'{prefix}{name}_loss_coef') for term, name in names.items()}
    return {term: value for term, value in coef.items() if value}


def loss_coefficients(plan: Plan, args: Namespace) -> dict[str, float]:
    """Return the coefficient of every loss of the table by its official name.

    The official programs count proposals among the auxiliary outputs: with --no_aux_loss the proposals have
    no coefficient, except in MS-DETR and DINO.
    """
    weight_dict = {}
    for kind, row in plan.table.items():
        if kind == 'enc' and not (args.aux_loss or plan.decoder.proposals_by_class or args.use_ms_detr):
            continue
        suffixes = loss_suffixes(kind, args.dec_layers if args.aux_loss and kind != 'enc' else 1)
        for term, coef in row.coef.items():
            layers = suffixes[-1:] if term in MASK_LOSSES else suffixes
            weight_dict |= {f'loss_{term}{suffix}': coef for suffix in layers}
    return weight_dict


def add_proposals(plan: Plan, args: Namespace) -> None:
    """Supervise the encoder's proposals; MS-DETR's program matches them by their anchors alone."""
    if not args.two_stage:
        return
    matcher = plan.one2one.matcher
    if args.enc_match == 'anchors':
        matcher = HungarianMatcher(0, args.set_cost_bbox, args.set_cost_giou, on='anchors')
    plan.table['enc'] = replace(
        plan.one2one,
        matcher=matcher,
        coef=coefficients(args, 'enc_'),
        class_agnostic=not plan.decoder.proposals_by_class,
        description='best encoder cells' if plan.decoder.proposals_by_class else 'encoder cells',
    )


def add_hybrid(plan: Plan, args: Namespace) -> None:
    """Add learned queries, several of which match each object (H-DETR, arXiv:2207.13080, Sec. 3.2)."""
    if args.hybrid_queries:
        plan.num_queries['one2many'] = args.hybrid_queries
        matcher = build_hungarian(args, repeats=args.hybrid_k)
        plan.table['one2many'] = replace(plan.one2one, matcher=matcher, scale=args.hybrid_lambda)


def add_one_to_many(plan: Plan, args: Namespace) -> None:
    """Supervise the inference group one-to-many too (MS-DETR, arXiv:2401.03989)."""
    if args.use_ms_detr:
        matcher = OneToManyMatcher(args.o2m_matcher_k, args.o2m_matcher_threshold)
        plan.table['o2m'] = replace(
            plan.one2one,
            matcher=matcher,
            coef=coefficients(args, 'o2m_'),
            description='one2one, read twice',
            merge_pairs_from='one2one' if args.use_indices_merge else None,
        )


def add_groups(plan: Plan, args: Namespace) -> None:
    """Add groups of learned queries with the supervision of the first (Group DETR, arXiv:2207.13085)."""
    if args.group_detr > 1:
        coef = {term: value / args.group_detr for term, value in plan.one2one.coef.items()}
        names = ['one2one', *(f'group{index}' for index in range(1, args.group_detr))]
        plan.table |= dict.fromkeys(names, replace(plan.one2one, coef=coef))
        plan.num_queries |= dict.fromkeys(names, args.num_queries)


def add_denoising(plan: Plan, args: Namespace) -> None:
    if args.dn_number:
        plan.branches['denoising'] = branch = Denoising(
            args.num_classes,
            args.hidden_dim,
            num_queries=args.dn_number,
            label_noise=args.dn_label_noise_ratio,
            box_noise=args.dn_box_noise_scale,
            box_code=plan.decoder.box_code,
            positions=not plan.decoder.positions_from_boxes,
        )
        plan.table['dn'] = replace(
            plan.one2one, matcher=None, count=branch.count, description='noised objects'
        )


def add_auxiliary_heads(plan: Plan, args: Namespace) -> None:
    """Train Co-DETR's auxiliary heads, and queries made from their positives."""
    if not args.co_aux_heads:
        return
    plan.branches['collaborative'] = branch = CollaborativeHeads(
        args.co_aux_heads,
        args.num_classes,
        args.hidden_dim,
        strides=level_strides(args),
        max_queries=args.max_pos_coords,
        with_features=args.with_coord_feat,
        derived_positions=plan.decoder.positions_from_boxes,
        rcnn_head=args.co_rcnn_head,
        rcnn_masks=args.co_rcnn_masks,
    )
    for name, head in branch.heads.items():
        plan.table[head.kind] = replace(
            plan.one2one, matcher=None, scale=args.lambda_1, description=f'positives of {name}'
        )
        factor = args.lambda_2 * args.dec_layers
        plan.coef |= {f'loss_{term}': factor * coef for term, coef in head.coef.items()}


def add_masks(plan: Plan, args: Namespace) -> None:
    """Train masks of the queries (DETR), or of detections (Co-DETR)."""
    if args.co_masks:
        plan.branches['masks'] = MaskTraining(args.topk_eval)
        plan.coef |= {'loss_comask': args.co_mask_loss_coef, 'loss_comask_iou': args.co_mask_iou_loss_coef}
    if args.masks:
        row = plan.table['one2one']
        mask_coef = {term: getattr(args, f'{term}_loss_coef') for term in MASK_LOSSES}
        plan.table['one2one'] = replace(row, coef=row.coef | mask_coef)


SCHEMES = (
    add_proposals,
    add_hybrid,
    add_one_to_many,
    add_groups,
    add_denoising,
    add_auxiliary_heads,
    add_masks,
)
