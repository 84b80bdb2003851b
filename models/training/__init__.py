"""
What only training needs. Nothing in `models/` imports this package at module level; `build_model` does,
inside the function.
"""

from argparse import Namespace

from torch import nn

from models.structures import Supervision

from .criterion import SetCriterion, loss_suffix
from .losses import FocalLoss, SoftmaxLoss
from .matcher import HungarianMatcher, focal_cost, softmax_cost


def build_supervision(args: Namespace) -> tuple[SetCriterion, dict[str, int], nn.ModuleDict]:
    """The table of supervision, the learned queries of each group (inference group first), and the query
    sources.
    """
    focal = args.family != 'detr'
    cost = args.set_cost_class, args.set_cost_bbox, args.set_cost_giou
    coef = {'ce': args.cls_loss_coef, 'bbox': args.bbox_loss_coef, 'giou': args.giou_loss_coef}
    class_loss = FocalLoss(args.focal_alpha) if focal else SoftmaxLoss(args.eos_coef)
    class_cost = focal_cost if focal else softmax_cost

    matcher = HungarianMatcher(*cost, class_cost)
    table = {'one2one': Supervision(matcher, coef, class_loss)}
    if args.family == 'deformable':
        table['enc'] = Supervision(matcher, coef, class_loss, class_agnostic=True)
    num_queries = {'one2one': args.num_queries}
    sources = nn.ModuleDict()

    return SetCriterion(table, weights(table, args.dec_layers, args.aux_loss)), num_queries, sources


def weights(table: dict[str, Supervision], num_layers: int, aux_loss: bool) -> dict[str, float]:
    """Coefficient of every loss, by official name. Encoder proposals count as an auxiliary output."""
    layers = {kind: [None, *range(num_layers - 1)] if aux_loss else [None] for kind in table}
    if 'enc' in table:
        layers['enc'] = [None] if aux_loss else []
    return {
        f'loss_{term}{loss_suffix(kind, layer)}': coef
        for kind, row in table.items()
        for layer in layers[kind]
        for term, coef in row.coef.items()
    }
