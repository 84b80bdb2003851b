"""Co-Deformable-DETR and Co-DINO equal the official implementation, loaded by its own names."""

import os
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import Tensor, nn

from models import build_postprocessors
from models.training import atss, dense_heads, faster_rcnn
from models.training.collaborative import CollaborativeHeads
from models.training.criterion import weighted_sum
from models.training.dense_heads import BACKGROUND
from models.weights.layouts import from_mmdetection, to_mmdetection
from models.weights.load import load_checkpoint
from tests import rule
from tests.conftest import REASON
from tests.models import HEADS, TRICKS
from tests.parity import (
    Case,
    assert_close,
    assignments,
    case_params,
    check_pairs,
    float64,
    optimizer_of,
)
from tests.shared_data import SHARED, needs_shared
from util.config.settle import settle
from util.nested_tensor import NestedTensor

STEPPED = ('r50_tiny_none', 'r50_5scale_normal_crowd')  # cases whose first optimizer step is always compared
CASES = sorted(
    path for folder in ('co_deformable_detr', 'co_dino') for path in SHARED.glob(f'parity/{folder}/r50*.json')
)
QUICK = ('co_deformable_detr-r50_tiny_none',)
# Their flags are those of the other two, apart from boxes that are not looked at twice: tests/test_invariants.py.
EXHAUSTIVE = (
    'co_deformable_detr-r50_cap_flags',
    'co_deformable_detr-r50_normal_crowd',
    'co_dino-r50_5scale_9enc_lsj_tiny_none',
)
# Proposals are float32 logarithms, whose last bit depends on the processor and on MKL. With this setting MKL
# gives the recorded ones.
TIGHT = os.environ.get('MKL_CBWR') == 'COMPATIBLE'
CLOSE = {'rtol': 1e-9, 'atol': 1e-9} if TIGHT else {'rtol': 1e-6, 'atol': 1e-6}
GRADIENT = {'rtol': 1e-8, 'atol': 1e-9} if TIGHT else {'rtol': 1e-5, 'atol': 1e-6}
STEP = 1e-8 if TIGHT else 1e-4
PIXELS = {'rtol': 1e-8, 'atol': 1e-8} if TIGHT else {'rtol': 1e-6, 'atol': 1e-5}
# Official name -> ours; the rest of a name is the layer or the auxiliary head.
TERMS = {'loss_cls': 'loss_ce', 'loss_bbox': 'loss_bbox', 'loss_iou': 'loss_giou'}
HEAD_TERMS = {
    'loss_rpn_cls': 'loss_rpn_cls',
    'loss_rpn_bbox': 'loss_rpn_bbox',
    'loss_cls0': 'loss_rcnn_cls',
    'loss_bbox0': 'loss_rcnn_bbox',
    'loss_cls1': 'loss_atss_cls',
    'loss_bbox1': 'loss_atss_bbox',
    'loss_centerness1': 'loss_atss_centerness',
}


def our_name(official: str) -> str:
    if official in HEAD_TERMS:
        return HEAD_TERMS[official]
    layer, name = re.fullmatch(r'(?:d(\d)\.)?(.*)', official).groups()
    kind = ''
    for mark, suffix in (('enc_', 'enc'), ('dn_', 'dn'), ('_aux0', 'rcnn'), ('_aux1', 'atss')):
        if mark in name:
            name, kind = name.replace(mark, ''), f'_{suffix}'
    return TERMS[name] + (f'_{layer}' if layer else '') + kind


def our_flags(arguments: dict) -> dict:
    """Our flags for an official configuration."""
    head, transformer = 'query_head.', 'query_head.transformer.'
    dino = arguments['query_head.type'] == 'CoDINOHead'
    flags = {
        **HEADS,
        'dino': dino,
        'num_queries': arguments[f'{head}num_query'],
        'num_feature_levels': 5 if dino else 4,
        'max_pos_coords': arguments.get(f'{head}max_pos_coords', 300),
        'lambda_1': arguments.get(f'{head}lambda_1', 1),
        'with_coord_feat': arguments.get(f'{transformer}with_coord_feat', True),
        'enc_layers': arguments[f'{transformer}encoder.num_layers'],
        'topk_eval': arguments['test_cfg.0.max_per_img'],
        'num_classes': arguments[f'{head}num_classes'],
        'backbone_weights': 'none',
    }
    if dino:
        return flags | {'dn_number': arguments[f'{head}dn_cfg.group_cfg.num_dn_queries']}
    twice = arguments[f'{transformer}decoder.look_forward_twice']
    return flags | TRICKS | {'look_forward_twice': twice}


class CollaborativeCase(Case):
    """Our model is filled by official names."""

    @cached_property
    def flags(self) -> dict:
        return our_flags(self.record['arguments'])

    @cached_property
    def args(self) -> Namespace:
        return settle(Namespace(**self.flags))

    @cached_property
    def outputs(self) -> dict:
        """Denoising and heads see the targets."""
        return self.built[0].train()(self.samples, self.targets)

    @property
    def masked(self) -> bool:
        """Padding is hidden from attention."""
        arguments = self.record['arguments']
        masked = arguments.get('query_head.transformer.with_attn_mask', True)
        return arguments.get('with_attn_mask', masked)

    def official_state(self) -> dict[str, Tensor]:
        return {
            name: torch.from_numpy(rule.parameter(name, tuple(shape)))
            if shape
            else torch.tensor(0 if name.endswith('tracked') else 1.0)
            for name, shape in self.record['state_dict']
        }

    def fill(self, model: nn.Module) -> None:
        load_checkpoint(model, {'state_dict': self.official_state(), 'meta': {}})

    @property
    def samples(self) -> NestedTensor:
        images, (height, width) = self.images, self.record['batch_input_shape']
        tensors = torch.zeros(len(images), 3, height, width)
        mask = torch.full((len(tensors), height, width), self.masked)
        for index, image in enumerate(images):
            _, h, w = image.shape
            tensors[index, :, :h, :w] = image
            mask[index, :h, :w] = False
        return NestedTensor(tensors, mask)

    @property
    def sizes(self) -> list[Tensor]:
        """Width and height that boxes are relative to."""
        if not self.masked:
            return [torch.tensor(self.record['batch_input_shape'][::-1]) for _ in self.record['metas']]
        return [torch.tensor(meta['img_shape'][1::-1]) for meta in self.record['metas']]

    @property
    def original_sizes(self) -> Tensor:
        """[B, 2] height and width of the images that detections are scaled to."""
        factors = [torch.tensor(meta['scale_factor'][1::-1]) for meta in self.record['metas']]
        return torch.stack([size.flip(0) / factor for size, factor in zip(self.sizes, factors, strict=True)])

    @property
    def targets(self) -> list[dict[str, Tensor]]:
        targets = []
        for target, size in zip(self.record['targets'], self.sizes, strict=True):
            x0, y0, x1, y1 = torch.tensor(target['boxes'], dtype=torch.float64).reshape(-1, 4).unbind(-1)
            boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1) / size.repeat(2)
            targets.append({'labels': torch.tensor(target['labels'], dtype=torch.int64), 'boxes': boxes})
        return targets


@pytest.fixture(autouse=True)
def precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, 'randperm', lambda num, **_: torch.arange(num))
    with float64():
        yield


def draw_by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule's numbers in place of the denoising noise, and no shuffling of samples."""

    def unit(name: str, like: Tensor) -> Tensor:
        return torch.from_numpy(rule.uniform(name, tuple(like.shape)) + 1) / 2

    def rand_like(like: Tensor, **_: object) -> Tensor:
        return unit('dn/label_p' if like.dim() == 1 else 'dn/box_part', like)

    def randint_like(like: Tensor, low: int, high: int, **_: object) -> Tensor:
        name = 'dn/new_label' if like.dim() == 1 else 'dn/box_sign'
        drawn = (unit(name, like) * high).floor()
        return drawn.long() if like.dim() == 1 else drawn

    monkeypatch.setattr(torch, 'randperm', lambda num, **_: torch.arange(num))
    monkeypatch.setattr(torch, 'rand_like', rand_like)
    monkeypatch.setattr(torch, 'randint_like', randint_like)


@pytest.fixture(scope='module', params=case_params(CASES, QUICK, EXHAUSTIVE, folder=True))
def case(request: pytest.FixtureRequest) -> Iterator[CollaborativeCase]:
    with float64():
        yield CollaborativeCase(request.param)


class Spy:
    """Calls of a function go through, and what they return stays here."""

    def __init__(self, owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.returned = []
        original = getattr(owner, name)

        def spied(*args: object, **kwargs: object) -> object:
            self.returned.append((args, original(*args, **kwargs)))
            return self.returned[-1][1]

        monkeypatch.setattr(owner, name, spied)


@dataclass
class Choices:
    """Calls of the heads' functions in the first training pass, and what they returned."""

    anchors: list
    regions: list
    adaptive: list
    queries: list


@pytest.fixture(scope='module')
def choices(case: CollaborativeCase) -> Choices:
    with float64(), pytest.MonkeyPatch.context() as monkeypatch:
        draw_by_rule(monkeypatch)
        spies = (
            Spy(faster_rcnn, 'sample', monkeypatch),
            Spy(dense_heads, 'sample', monkeypatch),
            Spy(atss, 'assign_adaptively', monkeypatch),
            Spy(CollaborativeHeads, 'query_group', monkeypatch),
        )
        _ = case.first_pass
        return Choices(*(spy.returned for spy in spies))


@needs_shared
def test_training_equals_official(case: CollaborativeCase, choices: Choices) -> None:
    """Losses, gradients, and who was matched and sampled."""
    model, criterion, _ = case.built
    check_losses(case, case.first_pass.losses, criterion.weight_dict)
    check_gradients(case, model)
    recorded = case.record['assignments']
    check_samples(choices.anchors, recorded['rpn'])
    check_samples(choices.regions, recorded['rcnn'])
    for (_, found), expected in zip(choices.adaptive, recorded['atss'], strict=True):
        places = (found != BACKGROUND).nonzero()[:, 0]
        assert places.tolist() == expected['anchor_index_among_valid']
        assert found[places].tolist() == expected['gt'] and len(found) == expected['num_valid_anchors']
    check_queries(case, [group for _, group in choices.queries])
    check_matches(case, criterion, case.outputs['predictions'])


def check_losses(case: CollaborativeCase, losses: dict[str, Tensor], weight_dict: dict[str, float]) -> None:
    recorded = case.record
    named = {our_name(name): value for name, value in recorded['losses'].items() if name != 'acc0'}
    assert named.keys() == {name for name in losses if name in weight_dict}
    for name, value in named.items():
        assert_close(losses[name] * weight_dict[name], value, name, **CLOSE)
    assert_close(losses['rcnn_accuracy'], recorded['losses']['acc0'], 'accuracy')
    assert_close(weighted_sum(losses, weight_dict), recorded['total'], 'total', **CLOSE)


def check_gradients(case: CollaborativeCase, model: nn.Module) -> None:
    norms = case.first_pass.norms
    official = {
        name: torch.tensor(value) for name, value in case.record['grad_norm'].items() if value is not None
    }
    expected = from_mmdetection(official)
    assert set(norms) == set(expected) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, norm in norms.items():
        assert_close(norm, expected[name], f'gradient of {name}', **GRADIENT)


def check_samples(samples: list, recorded: list[dict]) -> None:
    """What `sample` got and gave, against recorded assignments of one head."""
    for ((assigned, *_), (positives, negatives)), expected in zip(samples, recorded, strict=True):
        assert positives.tolist() == expected['pos_index']
        assert assigned[positives].tolist() == expected['pos_gt']
        assert len(negatives) == expected['num_neg'] and int(negatives.sum()) == expected['neg_index_sum']
        assert negatives[:8].tolist() == expected['neg_index_first']
        assert int((assigned < BACKGROUND).sum()) == expected['num_ignored']


def check_queries(case: CollaborativeCase, groups: list) -> None:
    """Positives of the auxiliary heads, as decoder queries."""
    labels, boxes = (torch.cat([target[key] for target in case.targets]) for key in ('labels', 'boxes'))
    for index, group in enumerate(groups):
        recorded = {
            key: torch.from_numpy(case.arrays[f'aux{index}_{key}'])
            for key in ('labels', 'targets', 'box_weight')
        }
        assert_close(group.reference_points, case.arrays[f'aux{index}_coords'], 'coordinates', **CLOSE)
        pairs = group.assignment
        assert recorded['box_weight'].sum() == len(pairs.target) == pairs.count
        assert torch.equal(recorded['labels'][pairs.batch, pairs.query], labels[pairs.target])
        assert_close(recorded['targets'][pairs.batch, pairs.query], boxes[pairs.target], 'targets')


def check_matches(case: CollaborativeCase, criterion: nn.Module, predictions: dict) -> None:
    (proposals,), decoder = (
        assignments(criterion, kind, predictions, case.targets) for kind in ('enc', 'one2one')
    )
    for name, images in case.record['assignments']['query_head'].items():
        recorded = [(expected['query'], expected['gt']) for expected in images]
        check_pairs(proposals if name == 'enc' else decoder[int(name[1:])], recorded, case.targets, name)


@pytest.mark.slow
@needs_shared
def test_optimizer_steps_equal_official(
    case: CollaborativeCase, choices: Choices, monkeypatch: pytest.MonkeyPatch, exhaustive: bool
) -> None:
    """The first goes on from the pass that the test above looks at."""
    if not exhaustive and case.path.stem not in STEPPED:
        pytest.skip(REASON)
    draw_by_rule(monkeypatch)
    model, criterion, _ = case.built
    args, recorded = case.args, case.record['optimizer_steps']
    optimizer = optimizer_of(model, args)
    official = {}  # learning rate -> parameters
    for name, (_, numbers) in recorded['param_groups'].items():
        if 'requires_grad=True' in name:
            official[float(re.search(r'lr=(\S+)', name)[1])] = numbers
    ours = Counter()
    for group in optimizer.param_groups:
        ours[round(group['lr'], 9)] += sum(p.numel() for p in group['params'])
    if not (args.dino or args.with_coord_feat):  # official: a parameter that nothing reads
        ours[args.lr] += 2
    assert ours == official
    model.train()
    steps = [*recorded['steps'], {'total': recorded['total_after_three_steps']}]
    losses = case.first_pass.losses
    for index, entry in enumerate(steps):
        if index:
            losses = criterion(model(case.samples, case.targets), case.targets)
        total = weighted_sum(losses, criterion.weight_dict)
        assert_close(total, entry['total'], 'total', rtol=STEP)
        if index and not exhaustive:
            break
        if 'losses' in entry:
            if index:
                optimizer.zero_grad()
                total.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            assert_close(norm, entry['grad_norm_before_clip'], 'gradient', rtol=STEP)
            for name, value in entry['losses'].items():
                if name != 'acc0':
                    found = losses[our_name(name)] * criterion.weight_dict[our_name(name)]
                    assert_close(found, value, name, rtol=STEP)
            optimizer.step()
    case.fill(model)


@needs_shared
def test_checkpoints_go_to_mmdetection_and_back(case: CollaborativeCase) -> None:
    """Every official entry is read, and written again under its name."""
    model, _, _ = case.built
    state = case.official_state()
    written = to_mmdetection(model.state_dict())
    lost = {name for name in state if name not in written and not name.endswith('num_batches_tracked')}
    unread = not (case.flags['dino'] or case.flags['with_coord_feat'])
    assert lost == ({'query_head.transformer.head_pos_embed.weight'} if unread else set())
    for name, value in written.items():
        assert torch.equal(value, state[name]), name


@needs_shared
def test_detections_of_every_module_equal_official(case: CollaborativeCase) -> None:
    model, _, postprocessors = case.built
    model.eval()
    with torch.no_grad():
        outputs = model(case.samples)
    every = case.record['eval']['k']
    assert_close(outputs['pred_logits'][:, ::every], case.arrays['pred_logits'], 'logits', **CLOSE)
    assert_close(outputs['pred_boxes'], case.arrays['pred_boxes'], 'boxes', **CLOSE)
    for index, found in enumerate(postprocessors['bbox'](outputs, case.original_sizes)):
        for key, value in found.items():
            assert_close(value, case.arrays[f'det{index}_{key}'], key, **PIXELS)


@needs_shared
@pytest.mark.parametrize('name', ['faster_rcnn', 'atss'])
def test_auxiliary_heads_detect_as_official(
    case: CollaborativeCase, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, _ = case.built
    monkeypatch.setattr(model, 'eval_module', name)
    postprocessors = build_postprocessors(settle(Namespace(**case.flags, eval_module=name)))
    with torch.no_grad():
        results = postprocessors['bbox'](model.eval()(case.samples), case.original_sizes)
    stage = {'faster_rcnn': 'two', 'atss': 'one'}[name]
    for index, found in enumerate(results):
        recorded = case.arrays[f'{stage}_stage_det{index}']
        assert_close(found['boxes'], recorded[:, :4], 'boxes', **PIXELS)
        assert_close(found['scores'], recorded[:, 4], 'scores')
        assert found['labels'].tolist() == case.arrays[f'{stage}_stage_det{index}_labels'].tolist()
