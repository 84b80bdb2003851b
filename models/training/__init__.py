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

    table = {'one2one': Supervision(HungarianMatcher(*cost, class_cost), coef, class_loss)}
    num_queries = {'one2one': args.num_queries}
    sources = nn.ModuleDict()

    layers = [None, *range(args.dec_layers - 1)] if args.aux_loss else [None]
    return SetCriterion(table, weights(table, layers)), num_queries, sources


def weights(table: dict[str, Supervision], layers: list[int | None]) -> dict[str, float]:
    """Coefficient of every loss, by official name."""
    return {
        f'loss_{term}{loss_suffix(kind, layer)}': coef
        for kind, row in table.items()
        for layer in layers
        for term, coef in row.coef.items()
    }
