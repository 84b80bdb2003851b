"""Entries of torch.hub: one for each row of docs/zoo.md, and `detector`. `hubconf.py` exports them."""

import functools
from collections.abc import Callable
from pathlib import Path

from torch import nn

from models import build_postprocessors
from models.detector import Detector, build_network, load_detector
from models.weights.load import load_checkpoint
from util.config.recipes import ZOO, Row
from util.config.settle import Settled


def build_row(
    row: Row, num_classes: int | None = None, backbone_weights: str = 'none'
) -> tuple[nn.Module, Settled]:
    """Build the detector of a row for inference; return it with its settled flags."""
    return build_network(vars(row.recipe.flags), num_classes or row.classes, backbone_weights)


def build(
    row: Row,
    pretrained: bool = False,
    num_classes: int | None = None,
    return_postprocessor: bool = False,
    weights: str | Path = '',
) -> nn.Module | tuple[nn.Module, nn.Module]:
    """Build the detector of a row for inference.

    Args:
        pretrained: load the published weights.
        num_classes: number of class indices without 'no object'; None: that of the published weights (91 for
            COCO's ids, 1203 for LVIS). For another number the class heads start from random values, and a
            printed line says so.
        return_postprocessor: also return the module that turns outputs into detections.
        weights: path or URL of weights to load instead, in any layout that `main.py --resume` reads.

    Raises:
        UserError: the weights do not fit, or have no direct URL.
    """
    source = weights or (row.source() if pretrained else '')
    model, args = build_row(row, num_classes, 'none' if source else 'imagenet')
    if source:
        resize = num_classes not in (None, row.classes)
        report = load_checkpoint(model, str(source), resize=resize)
        if report.reinitialised:
            print(f'{row.name} with {num_classes} classes: {report}')
    return (model, build_postprocessors(args)['bbox']) if return_postprocessor else model


def detector(model: str, weights: str | Path = '', device: str = 'auto') -> Detector:
    """Return a `models.detector.Detector` of an entry: image or file in, named boxes out.

    Args:
        model: name of an entry; '': the model of the flags in `weights`, a file of main.py for instance.
        weights: path or URL of weights (default: the published ones).
        device: cuda, mps or cpu; auto takes the first that is available.
    """
    return load_detector(model, weights, device)


def entry(row: Row) -> Callable:
    """Return `build` of a row, with the name and the result of the row."""
    built = functools.partial(build, row)
    functools.update_wrapper(built, build)
    recipe, ap = row.recipe, row.ap or row.recipe.ap
    result = f'{ap} AP on {recipe.data}' if ap else 'AP not published'
    built.__name__ = built.__qualname__ = row.name
    built.__doc__ = f'{recipe.title}: {result} ({recipe.epochs} epochs).\n\n{build.__doc__}'
    return built


def entries() -> dict[str, Callable]:
    """Return all entries by name."""
    return {'detector': detector} | {row.name: entry(row) for row in ZOO if row.name}
