"""Recorded cases of the official implementations: rebuild one with our model and compare everything that it
holds.
"""

import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models import build_model
from models.training.criterion import weighted_sum
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
class Case:
    """A recorded case, and our model built and filled as its file says. Use under `float64()`."""

    path: Path
    flags: dict = field(default_factory=dict)

    @cached_property
    def record(self) -> dict:
        return json.loads(self.path.read_text())

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path.with_suffix('.npz')) as archive:
            return dict(archive)

    @cached_property
    def built(self) -> tuple[nn.Module, nn.Module, dict]:
        args = self.record['args'] | {'backbone_weights': 'none'} | self.flags
        model, criterion, postprocessors = build_model(Namespace(**args))
        self.fill(model)
        return model, criterion.double(), postprocessors

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        rule.fill(model, self.record['rule']['salt'])
        parameters = dict(model.named_parameters())
        for step in self.record['rule']['after_fill']:
            parameters[step['parameter']] *= step['multiply_in_place_by']

    @property
    def samples(self) -> NestedTensor:
        salt = self.record['rule']['salt']
        images = [rule.image(salt + p['name'], p['height'], p['width']) for p in self.record['pictures']]
        return nested_tensor_from_tensor_list(images)

    @property
    def targets(self) -> list[dict[str, Tensor]]:
        return to_targets(self.record['targets'])

    def train_losses(self) -> tuple[dict[str, Tensor], Tensor]:
        """Loss terms and total of a training pass."""
        model, criterion, _ = self.built
        losses = criterion(model.train()(self.samples, self.targets), self.targets)
        return losses, weighted_sum(losses, criterion.weight_dict)


def check_losses(losses: dict[str, Tensor], weight_dict: dict[str, float], recorded: dict) -> Tensor:
    """The same terms with the same values as `recorded`, and the same total, which is returned."""
    assert set(losses) == set(recorded['losses'])
    for name, value in recorded['losses'].items():
        assert_close(losses[name], value, name)
    total = weighted_sum(losses, weight_dict)
    assert_close(total, recorded['total'], 'total')
    return total


def assert_close(ours: object, official: object, what: str, rtol: float = 1e-6, atol: float = 1e-9) -> None:
    ours = ours.detach().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
    np.testing.assert_allclose(ours, np.asarray(official), rtol=rtol, atol=atol, err_msg=what)
