"""
Detectors through torch.hub; an entry for each row of docs/zoo.md.

  detect = torch.hub.load(REPO, 'detector', 'detr_resnet50')
  objects = detect('image.jpg')                  # [{'name': 'dog', 'score': 0.98, 'box': [x0, y0, x1, y1]}, ...]

  model, postprocess = torch.hub.load(REPO, 'detr_resnet50', pretrained=True, return_postprocessor=True)
  detections = postprocess(model.eval()(images), target_sizes)

Each entry takes the arguments of `_build`.
"""

import functools as _functools
from collections.abc import Callable as _Callable
from pathlib import Path as _Path

from torch import nn as _nn

import models as _models
import models.zoo as _zoo
from models.detector import load_detector as _load_detector
from util import checkpoint as _checkpoint

dependencies = ['torch', 'torchvision', 'numpy', 'PIL', 'pycocotools']


def _build(
    row: _zoo.Row,
    pretrained: bool = False,
    num_classes: int | None = None,
    return_postprocessor: bool = False,
    weights: str | _Path = '',
) -> _nn.Module | tuple[_nn.Module, _nn.Module]:
    """Build the detector of a row for inference.

    Args:
        pretrained: load the published weights.
        num_classes: class indices, 'no object' not counted; None: those of the published weights (91 for COCO's ids, 1203
            for LVIS). For another number their class heads start from random values, and a printed line says so.
        return_postprocessor: return what turns outputs into detections too.
        weights: path or address of weights to load instead, in any layout that `main.py --resume` reads.

    Raises:
        UserError: the weights do not fit, or are asked for and have no direct address.
    """
    source = weights or (row.source() if pretrained else '')
    model, args = _zoo.build_row(row, num_classes, 'none' if source else 'imagenet')
    if source:
        resize = num_classes not in (None, row.num_classes)
        report = _checkpoint.load_checkpoint(model, str(source), resize=resize)
        if report.reinitialised:
            print(f'{row.name} with {num_classes} classes: {report}')
    return (model, _models.build_postprocessors(args)['bbox']) if return_postprocessor else model


def detector(model: str, weights: str | _Path = '', device: str = 'auto') -> object:
    """Return a `models.detector.Detector` of an entry: image or file in, named boxes out.

    Args:
        model: name of an entry; '': the flags in `weights` tell the model, as those of a run of main.py do.
        weights: path or address of weights (default: the published ones).
        device: cuda, mps or cpu; auto takes the first there is.
    """
    return _load_detector(model, weights, device)


def _entry(row: _zoo.Row) -> _Callable:
    entry = _functools.partial(_build, row)
    _functools.update_wrapper(entry, _build)
    ap = f'{row.ap} AP on {row.data}' if row.ap else 'AP not published'
    entry.__name__ = entry.__qualname__ = row.name
    entry.__doc__ = f'{row.title}: {ap} ({row.epochs} epochs).\n\n{_build.__doc__}'
    return entry


globals().update({row.name: _entry(row) for row in _zoo.ZOO if row.name})
