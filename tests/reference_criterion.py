"""Matching and losses the plain way, layer by layer and image by image, as the papers describe them."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from models.structures import Prediction
from models.training.criterion import loss_suffixes
from util.box_ops import box_cxcywh_to_xyxy, generalized_box_iou

Pairs = list[tuple[Tensor, Tensor]]  # queries and objects of each image


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: list[dict]) -> Pairs:
    """Match a layer: 2 class (focal) + 5 L1 - 2 GIoU of every query of the batch with every object."""
    batch, num_queries = logits.shape[:2]
    p, boxes = logits.flatten(0, 1).sigmoid(), boxes.flatten(0, 1)
    labels = torch.cat([target['labels'] for target in targets])
    target_boxes = torch.cat([target['boxes'] for target in targets])
    negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    cost = 2 * (positive[:, labels] - negative[:, labels]) + 5 * torch.cdist(boxes, target_boxes, p=1)
    corners = box_cxcywh_to_xyxy(boxes)[:, None], box_cxcywh_to_xyxy(target_boxes)[None]
    cost = (cost - 2 * generalized_box_iou(*corners)).view(batch, num_queries, -1).cpu()
    parts = cost.split([len(target['boxes']) for target in targets], dim=-1)
    pairs = [linear_sum_assignment(part[image]) for image, part in enumerate(parts)]
    return [(torch.as_tensor(query), torch.as_tensor(target)) for query, target in pairs]


def layer_losses(
    logits: Tensor, boxes: Tensor, targets: list[dict], pairs: Pairs, num_boxes: float
) -> dict[str, Tensor]:
    batch = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(pairs)])
    query = torch.cat([query for query, _ in pairs])
    labels = torch.cat([t['labels'][index] for t, (_, index) in zip(targets, pairs, strict=True)])
    target_boxes = torch.cat([t['boxes'][index] for t, (_, index) in zip(targets, pairs, strict=True)])
    classes = torch.full(logits.shape[:2], logits.shape[2], device=logits.device)
    classes[batch, query] = labels
    onehot = F.one_hot(classes, logits.shape[2] + 1)[..., :-1].to(logits.dtype)
    boxes = boxes[batch, query]
    giou = torch.diag(
        generalized_box_iou(box_cxcywh_to_xyxy(boxes)[:, None], box_cxcywh_to_xyxy(target_boxes)[None])
    )
    return {
        'loss_ce': sigmoid_focal_loss(logits, onehot).sum() / num_boxes,
        'loss_bbox': F.l1_loss(boxes, target_boxes, reduction='none').sum() / num_boxes,
        'loss_giou': (1 - giou).sum() / num_boxes,
    }


def reference_losses(
    predictions: dict[str, Prediction], targets: list[dict], k: int
) -> tuple[dict[str, Tensor], dict[str, Pairs]]:
    """Losses and pairs of one-to-one, one-to-many (every object `k` times) and encoder predictions."""
    losses, matches = {}, {}
    repeated = [{key: value.repeat(k, *[1] * (value.ndim - 1)) for key, value in t.items()} for t in targets]
    agnostic = [t | {'labels': torch.zeros_like(t['labels'])} for t in targets]
    for kind, prediction in predictions.items():
        here = {'one2one': targets, 'one2many': repeated, 'enc': agnostic}[kind]
        num_boxes = max(sum(len(t['boxes']) for t in here), 1)
        suffixes = loss_suffixes(kind, len(prediction.logits))
        for suffix, logits, boxes in zip(suffixes, prediction.logits, prediction.boxes, strict=True):
            matches[suffix] = match(logits, boxes, here)
            terms = layer_losses(logits, boxes, here, matches[suffix], num_boxes)
            losses |= {name + suffix: value for name, value in terms.items()}
    return losses, matches


def hybrid_batch(
    num_objects: tuple[int, ...] = (20, 20),
    num_tokens: int = 22223,
    queries: tuple[int, int] = (300, 1500),
    layers: int = 6,
) -> tuple[dict[str, Prediction], list[dict]]:
    """Draw predictions and objects of H-DETR's training size (91 classes), with low logits as in training."""
    batch, predictions = len(num_objects), {}
    sizes = {'one2one': (layers, queries[0]), 'one2many': (layers, queries[1]), 'enc': (1, num_tokens)}
    for kind, (num_layers, size) in sizes.items():
        shape = num_layers, batch, size
        logits = (torch.randn(*shape, 91) - 4).requires_grad_()
        boxes = torch.cat([torch.rand(*shape, 2), 0.05 + 0.3 * torch.rand(*shape, 2)], dim=-1)
        predictions[kind] = Prediction(logits, boxes.requires_grad_())
    targets = [
        {
            'labels': torch.randint(1, 91, (num,)),
            'boxes': torch.cat([torch.rand(num, 2), 0.05 + 0.3 * torch.rand(num, 2)], dim=-1),
        }
        for num in num_objects
    ]
    return predictions, targets
