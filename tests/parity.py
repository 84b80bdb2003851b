"""Recorded cases of the official implementations: rebuild one with our model and compare everything that it
holds.
"""

import json
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine import build_optimizer
from models import build_model
from models.structures import Assignment, Prediction
from models.training.criterion import weighted_sum
from models.training.matcher import match
from tests import rule
from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def to_targets(recorded: list[dict]) -> list[dict[str, Tensor]]:
    return [
        {
            'labels': torch.tensor(target['labels'], dtype=torch.int64),
            'boxes': torch.tensor(target['boxes'], dtype=torch.float64).reshape(-1, 4),
        }
        for target in recorded
    ]


@dataclass
class Pass:
    losses: dict[str, Tensor]
    norms: dict[str, Tensor]  # of gradients by our names; a parameter without one is absent


class Case:
    """A recorded case, and our model built and filled as its file says. Use under `float64()`.

    Systems override what their files record in another way: the flags, the values of the model, the images.
    """

    images_key, name_key = 'images', 'name'  # where the record lists its images, and the name of each

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = json.loads(path.read_text())

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path.with_suffix('.npz')) as archive:
            return dict(archive)

    @cached_property
    def args(self) -> Namespace:
        """Our flags."""
        raise NotImplementedError

    @cached_property
    def built(self) -> tuple[nn.Module, nn.Module, dict]:
        with rule.Unfilled():
            model, criterion, postprocessors = build_model(self.args)
        self.fill(model)
        return model, criterion, postprocessors

    def fill(self, model: nn.Module) -> None:
        raise NotImplementedError

    @cached_property
    def outputs(self) -> dict:
        """Of the filled model while it trains. They do not depend on targets (with denoising they would)."""
        return self.built[0].train()(self.samples)

    @cached_property
    def first_pass(self) -> Pass:
        """A training pass of the filled model for several tests; gradients stay at the parameters."""
        model, criterion, _ = self.built
        model.zero_grad()
        losses = criterion(self.outputs, self.targets)
        weighted_sum(losses, criterion.weight_dict).backward()
        norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
        return Pass({name: value.detach() for name, value in losses.items()}, norms)

    @property
    def salt(self) -> str:
        return self.record.get('rule', {}).get('salt', '')

    @property
    def images(self) -> list[Tensor]:
        return [
            rule.image(self.salt + image[self.name_key], image['height'], image['width'])
            for image in self.record[self.images_key]
        ]

    @property
    def samples(self) -> NestedTensor:
        return nested_tensor_from_tensor_list(self.images)

    @property
    def targets(self) -> list[dict[str, Tensor]]:
        return to_targets(self.record['targets'])


def case_params(
    paths: Sequence[Path], quick: Sequence[str], exhaustive: Sequence[str] = (), folder: bool = False
) -> list:
    """Return cases as parameters, named after their files (and folders); those that are not `quick` are slow.

    Args:
        exhaustive: cases whose code and kinds of objects are those of other cases.
    """

    def mark(name: str) -> tuple:
        marks = pytest.mark.slow, pytest.mark.exhaustive
        return marks if name in exhaustive else marks[: name not in quick]

    names = {path: f'{path.parent.name}-{path.stem}' if folder else path.stem for path in paths}
    return [pytest.param(path, id=name, marks=mark(name)) for path, name in names.items()]


def optimizer_of(model: nn.Module, args: Namespace) -> torch.optim.Optimizer:
    """As main.py builds it for these flags."""
    names = args.lr_backbone_names, args.lr_linear_proj_names, args.lr_linear_proj_mult
    return build_optimizer(model, args.lr, args.lr_backbone, args.weight_decay, *names)


def without_classes(targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The targets of class-agnostic predictions."""
    return [target | {'labels': torch.zeros_like(target['labels'])} for target in targets]


def assignments(
    criterion: nn.Module, kind: str, predictions: dict[str, Prediction], targets: list[dict[str, Tensor]]
) -> list[Assignment]:
    """The pairs of every layer of a kind, the last layer last."""
    row = criterion.table[kind]
    return match(row.matcher, predictions[kind], without_classes(targets) if row.class_agnostic else targets)


def check_coefficients(criterion: nn.Module, official: dict[str, float]) -> None:
    """Every loss has its official coefficient. Official dictionaries also name losses that never exist."""
    ours = criterion.weight_dict
    assert ours.items() <= official.items()
    never = [
        r'_enc_\d+',
        r'_\d+_enc',
        r'_enc_one2many',
        r'_enc_\d+_one2many',
        r'_\d+_enc_one2many',
        r'_(mask|dice)_\d+',
    ]
    never += [rf'(_\d+)?_{kind}' for kind in ('enc', 'one2many') if kind not in criterion.table]
    expected = re.compile(rf'.*({"|".join(never)})')
    assert not [name for name in official.keys() - ours.keys() if not expected.fullmatch(name)]


def check_pairs(
    pairs: Assignment, recorded: Sequence[tuple[list[int], list[int]]], targets: list[dict], what: str = ''
) -> None:
    """Each image has the recorded queries and objects in their order; objects are numbered by image."""
    offset = 0
    for image, (query, target) in enumerate(recorded):
        here = pairs.batch == image
        assert pairs.query[here].tolist() == query, what
        assert (pairs.target[here] - offset).tolist() == target, what
        offset += len(targets[image]['labels'])


def check_losses(
    losses: dict[str, Tensor], weight_dict: dict[str, float], recorded: dict, total: str = 'total'
) -> Tensor:
    """The same terms with the same values as `recorded`, and the same total, which is returned."""
    assert set(losses) == set(recorded['losses'])
    for name, value in recorded['losses'].items():
        assert_close(losses[name], value, name)
    weighted = weighted_sum(losses, weight_dict)
    assert_close(weighted, recorded[total], 'total')
    return weighted


def check_norms(norms: dict[str, Tensor], recorded: dict[str, float], **close: float) -> None:
    """The same parameters have gradients, of the same norms."""
    assert set(norms) == set(recorded)
    for name, value in recorded.items():
        assert_close(norms[name], value, f'gradient of {name}', **close)


def assert_close(ours: object, official: object, what: str, rtol: float = 1e-6, atol: float = 1e-9) -> None:
    ours = ours.detach().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
    np.testing.assert_allclose(ours, np.asarray(official), rtol=rtol, atol=atol, err_msg=what)
