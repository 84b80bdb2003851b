"""Evaluation as a CUDA graph, and what makes that possible."""

import pytest
import torch
from torch import nn

from models.cuda_graph import GraphedDetector
from tests.models import FAMILIES, CountSyncs, build
from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from util.precision import Precision

families = pytest.mark.parametrize('flags', FAMILIES.values(), ids=FAMILIES)


def uint8_batch(*sizes: tuple[int, int]) -> NestedTensor:
    return nested_tensor_from_tensor_list(
        [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    )


def eval_model(flags: dict) -> nn.Module:
    return build(flags)[0].eval()


@families
def test_evaluation_does_not_synchronise(flags: dict) -> None:
    """No scalar is read, no shape depends on values."""
    model, samples = eval_model(flags), uint8_batch((64, 96), (80, 64))
    with torch.no_grad(), CountSyncs() as syncs:
        model(samples)
    assert syncs.found == []


def test_only_evaluations_on_a_gpu_are_recorded() -> None:
    model = eval_model({})
    for mode in (True, False):
        with pytest.raises(ValueError, match=r'call model.eval\(\)'):
            GraphedDetector(model.train(mode), uint8_batch((64, 64)))


@pytest.mark.gpu
@pytest.mark.parametrize('mode', ['off', 'bf16'])
@families
def test_replayed_equals_eager(flags: dict, mode: str) -> None:
    """Also for images and padding that the recording has not seen."""
    device = torch.device('cuda')
    model, context = eval_model(flags).to(device), Precision(mode, device).autocast
    graphed = GraphedDetector(model, uint8_batch((96, 128), (96, 128)).to(device), context)
    for sizes in (((96, 128), (64, 96)), ((80, 128), (96, 100)), ((96, 128), (96, 128))):
        for buffer in model.backbone.buffers():
            buffer.mul_(1.1)  # frozen norms, too: a recording reads what stands there
        samples = uint8_batch(*sizes).to(device)
        outputs = graphed(samples)
        with torch.no_grad(), context():
            expected = model(samples)
        for name, value in expected.items():
            torch.testing.assert_close(outputs[name], value, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='pad to that size'):
        graphed(uint8_batch((64, 64), (64, 64)).to(device))
