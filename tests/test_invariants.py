"""What must hold for any weights and images, whatever the official code does."""

import argparse
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import ops

from engine import build_optimizer, train_one_epoch
from main import get_args_parser
from models.structures import Assignment, QueryGroup, attention_blocks
from models.training.criterion import Supervision, weighted_sum
from models.training.matcher import from_host
from models.units import list_units
from tests.conftest import REASON
from tests.models import (
    DENSE,
    FAMILIES,
    SCHEMES,
    SMALL,
    TWO_STAGE,
    CountSyncs,
    GivenFeatures,
    build,
    random_targets,
    with_masks,
)
from tests.parity import float64
from tests.runs import ROOT
from tools.benchmarks.official import under_one_mask
from util.config.flags import FLAGS
from util.config.settle import settle
from util.logger import Meter
from util.nested_tensor import NestedTensor, collate_fn, nested_tensor_from_tensor_list
from util.optim import WeightAverage
from util.precision import Precision

QUICK_FAMILIES = ('detr', 'two stages with tricks', 'all, conditional')
REPEATED_FAMILIES = ('deformable', 'two stages')  # 'box refinement' has one stage too
family = pytest.mark.parametrize(
    'flags',
    [
        pytest.param(
            flags,
            id=name,
            marks=()
            if name in QUICK_FAMILIES
            else pytest.mark.exhaustive
            if name in REPEATED_FAMILIES
            else pytest.mark.slow,
        )
        for name, flags in FAMILIES.items()
    ],
)
dense = pytest.mark.parametrize('flags', DENSE.values(), ids=DENSE)


@pytest.mark.parametrize('cells', [[(7, 5), (4, 6)], [(14, 10), (9, 13)]], ids=['stride 32', 'DC5'])
@pytest.mark.parametrize(
    'flags',
    [*DENSE.values(), {'num_feature_levels': 1}, {'num_feature_levels': 1, 'with_box_refine': True}],
    ids=[*DENSE, 'deformable', 'box refinement'],
)
def test_padding_does_not_reach_the_transformer(flags: dict, cells: list[tuple[int, int]]) -> None:
    """A padded batch equals single runs without padding, whatever stands in the padded cells of the feature
    map.

    (The convolutions in front of it see zeros beyond an image's edge, and what their biases make of them
    behind the padding: that part of the official model depends on the batch, slightly.)
    """
    with float64():
        model, _, _ = build(flags | {'backbone_stages': 4})
        deformable = 'num_feature_levels' in flags
        model.backbone = GivenFeatures(512, 32, offset=-0.5 if deformable else 0.0)
        if deformable:  # its group norm averages over the padding too
            model.input_proj[0][1] = nn.Identity()
        model.eval()
        features = [torch.randn(512, *size) for size in cells]
        batch = nested_tensor_from_tensor_list(features)
        batch.tensors.masked_fill_(batch.mask[:, None], 50.0)
        with torch.no_grad():
            together = model(batch)
            for index, feature in enumerate(features):
                alone = model([feature])
                # Deformable DETR's valid ratios are float32 in any model (as in the official code).
                close = 1e-5 if deformable else 1e-10
                for key in ('pred_logits', 'pred_boxes'):
                    torch.testing.assert_close(together[key][index], alone[key][0], rtol=close, atol=close)


@family
def test_a_batch_of_two_equals_two_single_runs(flags: dict) -> None:
    batch_equals_single_runs(flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags',
    [{}, pytest.param({'conditional': True}, marks=pytest.mark.exhaustive), {'deformable': True}],
    ids=['detr', 'conditional', 'deformable'],
)
def test_a_batch_of_two_equals_two_single_runs_with_dilation(flags: dict) -> None:
    batch_equals_single_runs(flags | {'dilation': True, 'backbone': 'resnet50', 'backbone_stages': 4})


def batch_equals_single_runs(flags: dict) -> None:
    """From pixels on: images padded to the same size, together and one at a time."""
    with float64():
        model, _, _ = build(flags)
        model.eval()
        batch = nested_tensor_from_tensor_list([torch.randn(3, 64, 32), torch.randn(3, 32, 96)])
        with torch.no_grad():
            together = model(batch)
            for index in range(2):
                alone = model(NestedTensor(batch.tensors[index, None], batch.mask[index, None]))
                for key in ('pred_logits', 'pred_boxes'):
                    torch.testing.assert_close(together[key][index], alone[key][0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    'num_objects',
    [
        (3, 5, 1, 2),
        pytest.param((0, 4, 0, 3), marks=pytest.mark.exhaustive),
        pytest.param((0, 0, 0, 1), marks=pytest.mark.slow),
    ],
)
@family
def test_accumulation_2x2_equals_a_batch_of_4(
    flags: dict, num_objects: tuple[int, ...], exhaustive: bool
) -> None:
    if sum(num_objects) == 1 and flags not in [FAMILIES[name] for name in QUICK_FAMILIES] and not exhaustive:
        pytest.skip(REASON)
    with float64():
        items = list(zip(torch.randn(4, 3, 64, 64), random_targets(*num_objects), strict=True))
        gradients = []
        for size in (4, 2):
            model, criterion, _ = build(flags | {'dropout': 0.0})
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            batches = [collate_fn(items[i : i + size]) for i in range(0, 4, size)]
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            train_one_epoch(model, criterion, batches, optimizer, accum_steps=len(batches))
            gradients.append({name: before[name] - p.detach() for name, p in model.named_parameters()})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize('num_objects', [(3, 2), (0, 4), (0, 0)])
@family
def test_every_trainable_parameter_gets_a_finite_gradient(flags: dict, num_objects: tuple[int, int]) -> None:
    model, criterion, _ = build(flags)
    targets = random_targets(*num_objects)
    losses = criterion(model.train()([torch.randn(3, 64, 64), torch.randn(3, 64, 96)], targets), targets)
    weighted_sum(losses, criterion.weight_dict).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize('num_objects', [0, 9])
def test_softmax_loss_is_a_weighted_mean_however_few_the_queries(num_objects: int) -> None:
    """Its divisor is a sum of class weights, which may be below 1. Only numbers of objects are at least 1."""
    with float64():
        model, criterion, _ = build({'num_queries': 4, 'dropout': 0.0})
        targets = random_targets(num_objects)
        targets[0]['labels'].fill_(2)
        outputs = model.train()(torch.randn(1, 3, 64, 64), targets)
        logits = outputs['pred_logits'].flatten(0, 1)
        mean = nn.functional.cross_entropy(
            logits, torch.full((4,), 2 if num_objects else logits.shape[-1] - 1)
        )
        torch.testing.assert_close(criterion(outputs, targets)['loss_ce'], mean)


@family
def test_order_of_objects_does_not_change_the_loss(flags: dict) -> None:
    with float64():
        # With MS-DETR objects of one class may tie far from a query. Here none do.
        model, criterion, _ = build(flags | {'dropout': 0.0, 'backbone_stages': 4})
        (target,) = random_targets(6)
        outputs = model.train()([torch.randn(3, 128, 128)], [target])
        order = torch.randperm(6)
        shuffled = {key: value[order] for key, value in target.items()}
        losses, others = criterion(outputs, [target]), criterion(outputs, [shuffled])
        for name, value in losses.items():
            torch.testing.assert_close(others[name], value, msg=name)


@family
def test_uint8_images_are_normalised_by_the_model(flags: dict) -> None:
    model, _, _ = build(flags)
    model.eval()
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (image / 255 - mean[:, None, None]) / std[:, None, None]
    small = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = model([normalised, (small / 255 - mean[:, None, None]) / std[:, None, None]])
        torch.testing.assert_close(
            model([image, small])['pred_logits'], expected['pred_logits'], rtol=1e-4, atol=1e-4
        )


HOST_WAITS = {
    'scalar': lambda x: x.sum().item(),
    'truth': lambda x: bool(x.sum() > 1),
    'list': lambda x: x.tolist(),
    'copy': lambda x: x.cpu(),
    'mask': lambda x: x[x > 1],
    'masked write': lambda x: x.__setitem__(x > 1, x[:2] + 1),
    'nonzero': lambda x: x.nonzero(),
    'where': lambda x: torch.where(x > 1),
    'masked_select': lambda x: x.masked_select(x > 1),
    'unique': lambda x: x.unique(),
    'bincount': lambda x: x.long().bincount(),
    'repeats': lambda x: x.repeat_interleave(x.long()),
    'nms': lambda x: ops.nms(x.expand(4, 4), x, 0.5),
    'new_tensor': lambda x: x.new_tensor([1]),
    'tensor': lambda x: torch.tensor([1], device=x.device),
    'to device': lambda x: torch.randperm(4).to(x.device),
    'to tensor': lambda x: torch.tensor(1).to(x),
    'index': lambda x: x[torch.randperm(4)],
    'index after a copy': lambda x: x[x.long().cpu()],  # two
}
NO_WAITS = {
    'host alone': lambda x: (
        torch.tensor([0, 1, 1]).bincount().nonzero()[torch.tensor([True, False])].tolist()
    ),
    'array': lambda x: torch.from_numpy(np.ones(3)).nonzero().tolist(),
    'from_host': lambda x: x[from_host([2, 1], x.long())],
    'kernels': lambda x: (
        torch.where(x > 1, x, 0.0) + x.new_full((4,), 1.0) + torch.arange(4, device=x.device)
    ),
    'to dtype': lambda x: x.to(torch.float64).to(x),
}


@pytest.mark.parametrize('name', [*HOST_WAITS, *NO_WAITS])
def test_the_counter_of_waits(name: str) -> None:
    x = torch.arange(4.0)
    with CountSyncs() as syncs:
        (HOST_WAITS | NO_WAITS)[name](x)
    assert len(syncs.found) == (0 if name in NO_WAITS else 2 if name == 'index after a copy' else 1), (
        syncs.found
    )


def waits_of_a_step(flags: dict, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what a GPU's host would wait for in a training step of two images."""
    # As on a GPU, where it is for more boxes.
    monkeypatch.setattr(ops.boxes, '_batched_nms_vanilla', ops.boxes._batched_nms_coordinate_trick)
    model, criterion, _ = build(flags)
    optimizer, precision = build_optimizer(model, 1e-4, 1e-5, 1e-4), Precision('off', torch.device('cpu'))
    targets = with_masks(random_targets(3, 0), (64, 96))
    with CountSyncs() as syncs:
        losses = criterion(model.train()([torch.randn(3, 64, 64), torch.randn(3, 64, 96)], targets), targets)
        total = weighted_sum(losses, criterion.weight_dict)
        precision.backward(total)
        precision.step(optimizer, model.parameters(), 0.1, [total])
    return syncs.found


@family
def test_a_training_step_waits_twice(flags: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the matching costs of all layers and images, and for whether losses and gradients are finite."""
    assert waits_of_a_step(flags, monkeypatch) == ['cpu', 'tolist']


FIVE_LEVELS = {'num_feature_levels': 5}


@pytest.mark.parametrize(
    ('flags', 'most'),
    [
        (SCHEMES['denoising'], 3),
        (SCHEMES['co_deformable'], 24),
        (SCHEMES['co_dino'] | FIVE_LEVELS, 25),
        (SCHEMES['co_dino'] | FIVE_LEVELS | {'co_masks': True}, 32),
    ],
    ids=['denoising', 'Co-Deformable-DETR', 'Co-DINO', 'Co-DINO with masks'],
)
def test_steps_with_samples_wait_seldom(flags: dict, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of noise and of samples of the dense heads depend on values; levels and layers add no waits."""
    found = waits_of_a_step(flags, monkeypatch)
    assert 2 < len(found) <= most, found


ODD_OBJECTS = {
    'none': [[], []],
    'no area': [[[0.5, 0.5, 0, 0], [0.3, 0.3, 0, 0.2]], [[0, 0, 0, 0], [1, 1, 0, 0]]],
    'slivers': [[[0.5, 0.5, 1e-8, 0.3]], [[0.2, 0.2, 1e-5, 1e-5]]],
    'equal': [[[0.5, 0.5, 0.2, 0.2]] * 3, [[0.5, 0.5, 1, 1]] * 2],
}


@pytest.mark.parametrize('objects', ODD_OBJECTS)
@pytest.mark.parametrize(
    'flags',
    [{'eos_coef': 0.0}, SCHEMES['co_dino'] | {'co_masks': True}],
    ids=['softmax without background', 'Co-DINO with masks'],
)
def test_odd_objects_have_finite_losses_and_gradients(flags: dict, objects: str) -> None:
    model, criterion, _ = build(flags)
    boxes = [torch.tensor(each, dtype=torch.float32).view(-1, 4) for each in ODD_OBJECTS[objects]]
    targets = with_masks([{'labels': torch.arange(len(x)), 'boxes': x} for x in boxes], (64, 64))
    losses = criterion(model.train()(torch.randn(2, 3, 64, 64), targets), targets)
    weighted_sum(losses, criterion.weight_dict).backward()
    assert all(value.isfinite() for value in losses.values()), losses
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_targets_cross_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels, boxes and masks, of each batch of a step; what only evaluation reads does not."""
    model, criterion, _ = build({})
    items = [
        (torch.randn(3, 64, 64), target | {'image_id': torch.tensor([1])})
        for target in with_masks(random_targets(3, 2, 1, 0), (64, 64))
    ]
    batches = [collate_fn(items[:2]), collate_fn(items[2:])]
    names = {id(x): name for _, targets in batches for target in targets for name, x in target.items()}
    copies: Counter[str] = Counter()
    original = Tensor.to

    def to(self: Tensor, *args: object, **options: object) -> Tensor:
        copies[names.get(id(self), 'other')] += 1
        return original(self, *args, **options)

    monkeypatch.setattr(Tensor, 'to', to)
    train_one_epoch(model, criterion, batches, build_optimizer(model, 1e-4, 1e-5, 1e-4), accum_steps=2)
    del copies['other']
    assert copies == dict.fromkeys(('labels', 'boxes', 'masks'), 4)


def test_a_step_walks_through_no_tree_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of parameters, buffers and norms are made once an epoch, or once."""
    model, criterion, _ = build({'conditional': True, 'backbone_norm': 'batch'})
    average, walked = WeightAverage(model, 0.9), Counter()
    original = nn.Module.named_modules

    def named_modules(self: nn.Module, *args: object, **options: object) -> Iterator:
        for each in original(self, *args, **options):
            walked[steps] += 1
            yield each

    def end_step(made: bool) -> None:
        nonlocal steps
        average.update(model)
        steps += 1

    monkeypatch.setattr(nn.Module, 'named_modules', named_modules)
    steps, batch = 0, collate_fn(list(zip(torch.randn(2, 3, 64, 64), random_targets(3, 0), strict=True)))
    optimizer = build_optimizer(model, 1e-4, 1e-5, 1e-4)
    train_one_epoch(model, criterion, [batch] * 3, optimizer, max_norm=0.1, end_step=end_step)
    assert walked[0] > 500 and max(walked[1], walked[2]) < 50, walked


@pytest.mark.gpu
@family
def test_a_training_step_waits_for_the_gpu_once(flags: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.training import criterion as module

    def allowed(call: Callable) -> Callable:
        def wrapped(*arguments: object) -> object:
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode('default')
            try:
                return call(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return wrapped

    monkeypatch.setattr(module, 'to_host', allowed(module.to_host))
    monkeypatch.setattr(Meter, 'read_window', allowed(Meter.read_window))  # once in --print_freq steps
    model, criterion, _ = build(flags)
    model.cuda()
    optimizer = build_optimizer(model, 1e-4, 1e-5, 1e-4)
    batch = collate_fn(list(zip(torch.randn(2, 3, 64, 64), random_targets(3, 0), strict=True)))
    train_one_epoch(model, criterion, [batch], optimizer)
    torch.cuda.set_sync_debug_mode('error')
    try:
        train_one_epoch(model, criterion, [batch] * 2, optimizer, max_norm=0.1, print_freq=100)
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_a_row_of_known_assignments_needs_no_matcher() -> None:
    """As those of denoising and of Co-DETR's heads."""
    with float64():
        model, criterion, _ = build({'conditional': True, 'dropout': 0.0})
        targets = random_targets(2, 1)
        outputs = model.train()(torch.randn(2, 3, 64, 64), targets)
        plain = criterion(outputs, targets)
        row = criterion.table['one2one']
        criterion.table['dn'] = Supervision(None, row.coef, row.class_loss)
        pairs = Assignment(torch.tensor([0, 0, 1, 1]), torch.tensor([3, 4, 5, 6]), torch.tensor([0, 1, 2, 2]))
        noised = {'dn': replace(outputs['predictions']['one2one'], assignment=pairs)}
        losses = criterion(outputs | {'predictions': outputs['predictions'] | noised}, targets)
        for name, value in plain.items():
            torch.testing.assert_close(losses[name], value)
        boxes = torch.cat([target['boxes'] for target in targets])[pairs.target]
        expected = (outputs['pred_boxes'][pairs.batch, pairs.query] - boxes).abs().sum() / 4
        torch.testing.assert_close(losses['loss_bbox_dn'], expected)
        assert 'loss_ce_0_dn' in losses and 'class_error_dn' in losses


def group(name: str, num: int, **fields: object) -> QueryGroup:
    return QueryGroup(name, torch.zeros(1, num, 4), **fields)


def test_groups_see_themselves_and_whom_they_name() -> None:
    groups = [group('one2one', 2), group('dn', 4, sees=('one2one',), block=2)]
    blocks = attention_blocks(groups)
    assert under_one_mask(blocks).hidden.int().tolist() == [
        [0, 0, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0, 0],
    ]
    assert [block.hidden is None for block in blocks] == [True, False]
    assert [len(attention_blocks([group('one2one', 2), group('dn', 0)]))] == [1], 'empty groups do not attend'


@dense
def test_groups_apart_attend_as_under_one_mask(flags: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    from models import conditional_detr
    from models import transformer as dense_transformer
    from models.build import build_transformer

    with float64():
        transformer = build_transformer(settle(Namespace(**SMALL | flags))).eval()
        memory = transformer.encode(
            torch.randn(2, 32, 3, 4), torch.zeros(2, 3, 4, dtype=torch.bool), torch.randn(2, 32, 3, 4)
        )
        groups = [
            QueryGroup(name, torch.randn(2, num, 32), torch.randn(2, num, 32))
            for name, num in (('one2one', 5), ('one2many', 9), ('dn', 6))
        ]
        groups[2] = replace(groups[2], sees=('one2one',), block=2)
        apart = transformer.decoder(groups, memory)
        alone = transformer.decoder(groups[:1], memory)
        for module in (dense_transformer, conditional_detr):
            monkeypatch.setattr(
                module, 'attention_blocks', lambda groups: [under_one_mask(attention_blocks(groups))]
            )
        joined = transformer.decoder(groups, memory)
        for layer in range(3):
            torch.testing.assert_close(apart[layer].hs, joined[layer].hs)
            torch.testing.assert_close(apart[layer].hs[:, :5], alone[layer].hs)


@pytest.mark.parametrize('flags', [{'deformable': True}, {}], ids=['deformable', 'detr'])
def test_groups_of_queries_are_each_matched_alone(flags: dict) -> None:
    """Group DETR: the losses are the mean over groups of what each would have alone."""
    with float64():
        model, criterion, _ = build(flags | {'group_detr': 3, 'dropout': 0.0})
        targets = random_targets(3, 2)
        outputs = model.train()([torch.randn(3, 64, 64), torch.randn(3, 64, 96)], targets)
        losses = criterion(outputs, targets)
        total = weighted_sum(losses, criterion.weight_dict)
        _, plain, _ = build(flags)
        alone = 0.0
        for name in ('one2one', 'group1', 'group2'):
            group = {'one2one': outputs['predictions'][name]}
            alone += weighted_sum(plain({'predictions': group}, targets), plain.weight_dict)
        torch.testing.assert_close(total, alone / 3)


def test_every_flag_is_read() -> None:
    folders = ('models', 'datasets', 'util')
    files = [*ROOT.glob('*.py'), *(path for folder in folders for path in (ROOT / folder).rglob('*.py'))]
    files = [path for path in files if path.name != 'flags.py']
    words = set(re.findall(r'\w+', '\n'.join(path.read_text() for path in files)))
    coefficients = {name for name in FLAGS if name.endswith('_loss_coef')}  # put together of kind and term
    unread = FLAGS.keys() - words - coefficients
    assert not unread, f'declared and not read: {unread}'


def test_help_is_grouped_and_explains_every_flag() -> None:
    parser = get_args_parser()
    text = parser.format_help()
    assert all(f'--{name}' in text for name in ('coco_path', 'conditional', 'total_batch_size'))
    for action in parser._actions:
        assert action.help, action.dest
        if action.default not in (None, False, True, '', argparse.SUPPRESS):
            assert 'default' in action.help, action.dest


def test_initial_values_are_the_official_ones() -> None:
    model, _, _ = build({'conditional': True})
    assert torch.allclose(model.class_embed.bias, torch.tensor(-4.59512))
    assert not model.bbox_embed.layers[-1].weight.any() and not model.bbox_embed.layers[-1].bias.any()
    first, second = model.transformer.decoder.layers[:2]
    assert torch.equal(first.linear1.bias, second.linear1.bias), 'layers are copies: their biases are equal'
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    assert not first.self_attn.out_proj.bias.any() and first.sa_v_proj.bias.any()
    assert second.ca_qpos_proj is None
    bound = (6 / (32 + 32)) ** 0.5  # Xavier
    assert 0.9 * bound < first.sa_v_proj.weight.abs().max() <= bound
    outputs = model.eval()(torch.randn(1, 3, 64, 64))
    torch.testing.assert_close(outputs['pred_boxes'][..., 2:], torch.full((1, 12, 2), 0.5))
    plain, _, _ = build({})
    assert plain.class_embed.bias.abs().max() < 1 and plain.bbox_embed.layers[-1].weight.any()


def test_decoder_groups_do_not_see_each_other() -> None:
    """Queries of other groups leave the inference group of a deformable decoder as it is."""
    with float64():
        model, _, _ = build(TWO_STAGE)
        transformer = model.eval().transformer
        samples = nested_tensor_from_tensor_list(torch.randn(2, 3, 64, 64))
        memory = transformer.encode(*model.levels(samples, *model.backbone(samples)))
        one, many = (
            QueryGroup(
                name, torch.randn(2, num, 32), torch.randn(2, num, 32), torch.rand(2, num, 4) * 0.5 + 0.2
            )
            for name, num in (('one2one', 5), ('one2many', 9))
        )
        together = transformer.decoder([one, many], memory, model.bbox_embed)
        alone = transformer.decoder([one], memory, model.bbox_embed)
        for ours, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(ours.hs[:, :5], expected.hs)
            torch.testing.assert_close(ours.reference[:, :5], expected.reference)


def test_inference_reads_only_the_chosen_proposals_and_gets_the_same() -> None:
    """Evaluation computes boxes of the selected tokens alone; the numbers are those of a training pass."""
    with float64():
        model, _, _ = build(TWO_STAGE | {'dropout': 0.0})
        images = torch.randn(2, 3, 64, 96)
        with torch.no_grad():
            training, inference = model.train()(images), model.eval()(images)
        for key in ('pred_logits', 'pred_boxes'):
            torch.testing.assert_close(inference[key], training[key])


def test_looking_forward_twice_changes_gradients_only() -> None:
    with float64():
        totals, gradients = [], []
        for flags in (TWO_STAGE, TWO_STAGE | {'look_forward_twice': True}):
            model, criterion, _ = build(flags | {'dropout': 0.0})
            torch.manual_seed(1)
            nn.init.normal_(model.bbox_embed[0].layers[-1].weight, std=0.1)
            targets = random_targets(4)
            outputs = model.train()(torch.randn(1, 3, 128, 128), targets)
            totals.append(weighted_sum(criterion(outputs, targets), criterion.weight_dict))
            totals[-1].backward()
            gradients.append(model.bbox_embed[0].layers[-1].weight.grad.norm())
        torch.testing.assert_close(totals[0], totals[1])
        assert (gradients[0] - gradients[1]).abs() > 1e-6


def gradients_of_a_step(flags: dict) -> dict[str, Tensor]:
    """With dropout, which must be the same when it is computed again."""
    model, criterion, _ = build(flags)
    torch.manual_seed(1)
    targets = random_targets(3, 1)
    outputs = model.train()(torch.randn(2, 3, 64, 64), targets)
    weighted_sum(criterion(outputs, targets), criterion.weight_dict).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@family
def test_recomputed_activations_give_the_same_gradients(flags: dict, exhaustive: bool) -> None:
    with float64():
        expected = gradients_of_a_step(flags | {'use_checkpoint': False})
        for parts in (['backbone'], ['encoder'], ['decoder'], True) if exhaustive else (True,):
            gradients = gradients_of_a_step(flags | {'use_checkpoint': parts})
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[name], msg=f'{name}, {parts}')


@pytest.mark.parametrize(
    ('line', 'parts'),
    [
        ('', None),
        ('--use_checkpoint', ['backbone', 'encoder', 'decoder']),
        ('--use_checkpoint --lr 1', ['backbone', 'encoder', 'decoder']),
        ('--use_checkpoint decoder backbone --lr 1', ['decoder', 'backbone']),
        ('--use_checkpoint --backbone timm/resnet18', ['encoder', 'decoder']),
    ],
)
def test_parts_that_are_recomputed(line: str, parts: list[str] | None) -> None:
    """Resolved flags, which a checkpoint keeps, mean the same when they are read again."""
    args = settle(get_args_parser().parse_args(line.split()))
    assert args.use_checkpoint == parts
    assert settle(args).use_checkpoint == parts
    if parts is None or len(parts) == 3:  # what older namespaces and official ones hold
        assert settle(Namespace(use_checkpoint=parts is not None)).use_checkpoint == parts


def test_flags_say_which_parts_are_recomputed() -> None:
    for places in ([], ['backbone'], ['encoder'], ['decoder', 'encoder']):
        for flags in ({}, {'conditional': True}, {'deformable': True}, {'dino': True}):
            model, _, _ = build(flags | {'use_checkpoint': places or False})
            for place, each in list_units(model).items():
                assert {part.recompute for part in each} == {place in places}


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ({'two_stage': True}, '--two_stage needs --with_box_refine'),
        ({'mixed_selection': True, 'with_box_refine': True}, '--mixed_selection needs --two_stage'),
        ({'look_forward_twice': True}, '--look_forward_twice needs --with_box_refine'),
        ({'num_feature_levels': 2, 'backbone_stages': 4}, 'must be 1, or at least the 3 maps'),
        ({'deformable': True, 'conditional': True}, 'leave one of them out'),
        ({'deformable': True, 'hidden_dim': 48}, 'multiple of 32'),
        ({'deformable': True, 'pre_norm': True}, 'is for DETR, and the other flags choose deformable'),
        ({'deformable': True, 'enc_n_points': 0}, 'at least 1'),
        (
            {'nms_iou_threshold': 0.5},
            'is for Conditional DETR and Deformable DETR, and the other flags choose detr',
        ),
        ({'hybrid_k': 0, 'hybrid_queries': 10}, 'would be trained by nothing'),
        ({'hybrid_k': 6, 'hybrid_lambda': -1.0}, '--hybrid_lambda must be at least 0, not -1'),
        ({'use_aux_ffn': True}, '--use_aux_ffn needs --use_ms_detr'),
        ({'use_indices_merge': True, 'conditional': True}, 'needs --use_ms_detr'),
        ({'ms_variant': 'a'}, '--ms_variant a needs --use_ms_detr'),
        ({'use_ms_detr': True, 'use_aux_ffn': True, 'ms_variant': 'a'}, 'leave it out'),
        ({'use_ms_detr': True, 'o2m_matcher_k': 0}, 'at least 1'),
        ({'group_detr': 0}, 'at least 1'),
        ({'deformable': True, 'nms_iou_threshold': 1.5}, 'at most 1, not 1.5'),
        ({'use_checkpoint': ['neck']}, 'must be one of backbone, encoder, decoder, not .neck'),
        ({'use_checkpoint': ['backbone'], 'backbone': 'timm/resnet18'}, 'name encoder and decoder'),
    ],
)
def test_impossible_flags_are_refused_in_one_sentence(flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build(flags)
    assert '\n' not in str(error.value)


def test_fewer_tokens_than_proposals_are_explained() -> None:
    model, _, _ = build(TWO_STAGE | {'num_queries': 400})
    with pytest.raises(ValueError, match=r'400 proposals, but the feature maps .* have 340 cells'):
        model(torch.randn(1, 3, 128, 128))


def test_names_of_parameter_groups_must_not_overlap() -> None:
    model, _, _ = build({'deformable': True})
    with pytest.raises(ValueError, match='fits --lr_backbone_names backbone and --lr_linear_proj_names body'):
        build_optimizer(model, 1e-4, 1e-5, 1e-4, ['backbone'], ['body'])
    sizes = [
        len(g['params'])
        for g in build_optimizer(model, 1e-4, 1e-5, 0, ['backbone.0'], [], optimizer='sgd').param_groups
    ]
    assert len(sizes) == 2 and sum(sizes) == sum(p.requires_grad for p in model.parameters())


def test_overlapping_detections_of_a_class_are_suppressed() -> None:
    """The same box three times, once with another class; a fourth box elsewhere."""
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2]] * 3 + [[0.1, 0.1, 0.1, 0.1]]])
    logits = torch.full((1, 4, 2), -9.0)
    logits[0, [0, 1, 2, 3], [0, 0, 1, 0]] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    outputs, size = {'pred_logits': logits, 'pred_boxes': boxes}, torch.tensor([[100, 200]])
    _, _, postprocessors = build({'deformable': True, 'topk_eval': 3, 'nms_iou_threshold': 0.7})
    (result,) = postprocessors['bbox'](outputs, size)
    assert result['labels'].tolist() == [0, 1, 0]
    torch.testing.assert_close(result['scores'], torch.tensor([3.0, 1.0, 0.0]).sigmoid())
    _, _, postprocessors = build({'deformable': True, 'topk_eval': 3})
    assert postprocessors['bbox'](outputs, size)[0]['labels'].tolist() == [0, 0, 1]
