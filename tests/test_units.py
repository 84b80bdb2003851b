"""Compiled stages and layers compute what they did, for images of any size, with few programs."""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from models import build_model
from models.ops.modules import MSDeformAttn
from models.swin import SwinSize, SwinTransformer
from models.training.criterion import weighted_sum
from models.units import all_units, compile_units
from models.vit import VIT_SIZES, VisionTransformer
from tests.models import SMALL, TWO_STAGE, random_targets
from tests.ops_check import RecordGraphs

# Few stages, which take the compiler longest.
TINY = SMALL | {
    'backbone': 'resnet10',
    'backbone_stages': 2,
    'enc_layers': 2,
    'dec_layers': 2,
    'dropout': 0.0,
}
SIZES = [(128, 160), (160, 224), (192, 128)]


def build(flags: dict) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model, criterion, _ = build_model(Namespace(**TINY | flags))
    for module in model.modules():
        if isinstance(module, MSDeformAttn):  # they begin at whole pixels, where the gradient has a kink
            nn.init.normal_(module.sampling_offsets.weight, std=0.2)
    return model, criterion


def step(model: nn.Module, criterion: nn.Module, size: tuple[int, int]) -> dict[str, Tensor]:
    """Outputs, and gradients by name, of two images of which one is padded."""
    torch.manual_seed(1)
    images, targets = [torch.randn(3, *size), torch.randn(3, size[0] - 20, size[1])], random_targets(3, 2)
    model.zero_grad(set_to_none=True)
    outputs = model.train()(images, targets)
    weighted_sum(criterion(outputs, targets), criterion.weight_dict).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {name: outputs[name] for name in ('pred_logits', 'pred_boxes')}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('flags', 'backend'),
    [
        pytest.param({}, 'inductor', marks=pytest.mark.exhaustive),
        pytest.param(TWO_STAGE, 'inductor', marks=pytest.mark.exhaustive),
        (TWO_STAGE, 'eager'),
        pytest.param(TWO_STAGE | {'use_checkpoint': True}, 'aot_eager', marks=pytest.mark.exhaustive),
    ],
    ids=['detr', 'two stages', 'two stages, eager', 'two stages, recomputed'],
)
def test_equals_eager_with_few_programs(flags: dict, backend: str) -> None:
    """To 1e-5 of each tensor. Layers that are alike share a program, and the third size needs no new one.

    Deformable attention is our operator in all of them.
    """
    torch.compiler.reset()
    counters.clear()
    (model, criterion), (eager, _) = build(flags), build(flags)
    names = list(model.state_dict())
    compiler = RecordGraphs(backend)
    compile_units(model, backend=compiler)
    assert list(model.state_dict()) == names
    programs = []
    for size in SIZES:
        ours, expected = step(model, criterion, size), step(eager, criterion, size)
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            assert (ours[name] - value).norm() <= 1e-5 * value.norm() + 1e-6, (name, size)
        programs.append(counters['stats']['unique_graphs'])
    assert programs[0] <= len(all_units(model)) + 2
    assert programs[1] <= programs[0] + 2 and programs[2] == programs[1]
    assert not counters['graph_break']
    assert compiler.count('detr.ms_deform_attn') >= (2 if flags else 0), 'in layers of encoder and decoder'
    assert not compiler.count('grid_sample')


@pytest.mark.parametrize(
    'body',
    [
        SwinTransformer(SwinSize(16, (2,), (1,), 5), range(1, 2)),
        VisionTransformer(replace(VIT_SIZES['vit_mini'], depth=2, global_blocks=(1,))),
    ],
    ids=['swin', 'vit'],
)
def test_windows_do_not_break_the_graph(body: nn.Module) -> None:
    """Blocks with and without a shift, within windows and over the whole map."""
    torch.compiler.reset()
    counters.clear()
    nothing = Namespace(layers=[])
    model = Namespace(
        backbone=[Namespace(body=body)], transformer=Namespace(encoder=nothing, decoder=nothing)
    )
    compile_units(model, backend='eager')
    body(torch.randn(2, 3, 96, 128))
    assert counters['stats']['unique_graphs'] == 2 and not counters['graph_break']


@pytest.mark.parametrize(
    ('flags', 'number'),
    [
        ({}, 2 + 2 + 2),
        ({'backbone': 'mobilenet_v2', 'backbone_stages': 3}, 14 + 2 + 2),
        ({'backbone': 'swin_tiny', 'conditional': True}, 4 + 2 + 2),
        ({'dino': True}, 2 + 2 + 2),
    ],
)
def test_parts_are_stages_and_layers(flags: dict, number: int) -> None:
    model, _ = build(flags)
    assert len(all_units(model)) == number


def test_recomputed_batch_norms_are_refused() -> None:
    model, _ = build({'backbone_norm': 'batch', 'use_checkpoint': ['backbone']})
    with pytest.raises(ValueError, match='leave backbone out of --use_checkpoint'):
        compile_units(model)
