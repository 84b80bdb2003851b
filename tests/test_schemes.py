"""Supervision beyond one-to-one: matchers, any combination of schemes, and what none of them may touch."""

import json
import re
import sys
from argparse import Namespace
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine import build_optimizer, train_one_epoch
from main import get_args_parser
from models import build_detector, build_model
from models.deformable_detr import FirstStage
from models.ms_detr import BranchB
from models.structures import Assignment, Memory, Prediction
from models.training import atss, build_supervision, faster_rcnn
from models.training.criterion import weighted_sum
from models.training.matcher import OneToManyMatcher, Targets, match, merge_pairs
from models.training.summary import statistics_text, supervision_table
from models.weights.load import load_checkpoint
from tests.models import HEADS, SMALL, TRICKS, TWO_STAGE, CountSyncs, random_targets
from tests.parity import assignments, check_coefficients, check_pairs, float64, optimizer_of, to_targets
from tests.reference_criterion import hybrid_batch, reference_losses
from tests.runs import ROOT
from tests.shared_data import SHARED, build_data, needs_shared, read_shared
from util.box_ops import box_cxcywh_to_xyxy
from util.config.settle import settle
from util.nested_tensor import collate_fn

MATCHER = read_shared('parity/ms_detr/matcher_one_to_many.json').get('cases', {})
BASES = {
    'one stage': {'deformable': True},
    'two stages': TWO_STAGE,
    'two stages with tricks': TRICKS,
    'conditional': {'conditional': True},
    'dino': {'dino': True},
}
SCHEMES = {
    'hybrid': {'hybrid_k': 3, 'hybrid_queries': 24},
    'mixed': {'use_ms_detr': True, 'use_aux_ffn': True},
    'groups': {'group_detr': 2},
    'heads': HEADS,
    'one head': {'co_aux_heads': ['atss']},
    'denoising': {'dn_number': 10},
}
KINDS = {
    'hybrid': {'one2many'},
    'mixed': {'o2m'},
    'groups': {'group1'},
    'heads': {'rcnn', 'atss'},
    'one head': {'atss'},
    'denoising': {'dn'},
}
LEARNED = ('hybrid', 'mixed', 'groups')  # of any base; the others need two stages
EVERYTHING = (*LEARNED, 'heads', 'denoising')
WITH_HEADS = [('heads',), ('hybrid', 'heads'), ('mixed', 'heads'), ('heads', 'denoising'), EVERYTHING]
OF_LEARNED = [*combinations(LEARNED, 1), *combinations(LEARNED, 2), LEARNED]
COMBINATIONS = {
    'one stage': OF_LEARNED,
    'conditional': OF_LEARNED,
    'two stages': [LEARNED, EVERYTHING],
    'two stages with tricks': [*WITH_HEADS, ('denoising',), ('hybrid', 'denoising'), ('mixed', 'denoising')],
    'dino': [*WITH_HEADS, ('denoising',), ('one head',)],
}


def mixes(*quick: tuple[str, tuple[str, ...]], alone: bool = True) -> list:
    """Every base with its combinations, as parameters `base` and `names`.

    Those that are not `quick` are slow, and of them only the largest of a base is run by default, and if `alone` each
    scheme alone. One head alone is in no other combination.
    """
    return [
        pytest.param(
            base,
            names,
            id=f'{base}-{"+".join(names)}',
            marks=()
            if (base, names) in quick
            else pytest.mark.slow
            if len(names) == max(map(len, combined))
            or (len(names) == 1 and (alone or names == ('one head',)))
            else pytest.mark.exhaustive,
        )
        for base, combined in COMBINATIONS.items()
        for names in combined
    ]


def flags_of(base: str, names: tuple[str, ...]) -> dict:
    flags = SMALL | BASES[base]
    for name in names:
        flags |= SCHEMES[name]
    return flags


def schemes_of(base: str) -> tuple[str, ...]:
    return LEARNED if base in ('one stage', 'conditional') else EVERYTHING


def parse(text: str) -> Namespace:
    return settle(get_args_parser().parse_args([*text.split(), '--backbone_weights', 'none']))


@needs_shared
@pytest.mark.parametrize('name', MATCHER)
def test_one_to_many_matcher_equals_official(name: str) -> None:
    case = MATCHER[name]
    with np.load(SHARED / 'parity/ms_detr/matcher_one_to_many.npz') as archive:
        arrays = {key: torch.from_numpy(value) for key, value in archive.items()}
    prediction = Prediction(arrays[f'{name}__pred_logits'][None], arrays[f'{name}__pred_boxes'][None])
    targets = to_targets(case['targets'])
    matcher = OneToManyMatcher(case['k'], case['threshold'])
    scores = matcher.cost(prediction, Targets.pack(targets))[0]
    torch.manual_seed(case['torch_manual_seed'])
    (pairs,) = match(matcher, prediction, targets)
    for image, target in enumerate(targets):
        expected = arrays[f'{name}__cost{image}']
        torch.testing.assert_close(scores[image, : len(target['labels'])], expected, rtol=0, atol=1e-12)
    recorded = [(image['matched_query'], image['matched_target']) for image in case['pictures']]
    check_pairs(pairs, recorded, targets)


def test_a_query_of_two_objects_has_the_class_of_the_better_one() -> None:
    """Box terms count both pairs; one class is asked for, that of the pair with the highest score."""
    with float64():
        args = settle(Namespace(**SMALL, use_ms_detr=True))
        criterion, _, _ = build_supervision(args)
        boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.36]])
        targets = [{'labels': torch.tensor([1, 2]), 'boxes': boxes}]
        logits, predicted = torch.zeros(1, 16, 6), torch.full((1, 16, 4), 0.1)
        predicted[0, 3] = boxes[0]
        # Two queries count for the second object, whose ranking query 3 leads.
        predicted[0, 5] = predicted[0, 6] = torch.tensor([0.5, 0.5, 0.4, 0.2])
        o2m = Prediction(logits[None], predicted[None])
        (pairs,) = match(criterion.table['o2m'].matcher, o2m, targets)
        claims = pairs.query == 3
        assert claims.sum() == 2 and pairs.is_class_target[claims].tolist() == [False, True]
        assert pairs.target[claims].tolist() == [1, 0]
        losses = criterion({'predictions': {'o2m': o2m}}, targets)
        asked = torch.zeros(16, 6)
        for query, target in zip(
            pairs.query[pairs.is_class_target], pairs.target[pairs.is_class_target], strict=True
        ):
            asked[query, targets[0]['labels'][target]] = 1
        ce = nn.functional.binary_cross_entropy_with_logits(logits[0], asked, reduction='none')
        focal = (0.25 * asked + 0.75 * (1 - asked)) * 0.5**2 * ce
        torch.testing.assert_close(losses['loss_ce_o2m'], focal.sum() / 2)
        l1 = (predicted[0, pairs.query] - boxes[pairs.target]).abs().sum()
        torch.testing.assert_close(losses['loss_bbox_o2m'], l1 / 2)


def test_merged_pairs_leave_taken_queries_alone() -> None:
    def pairs(*rows: tuple[int, int, int]) -> Assignment:
        return Assignment(*torch.tensor(rows).T)

    many = replace(pairs((0, 4, 0), (0, 4, 1)), is_class_target=torch.tensor([False, True]))
    both = merge_pairs(many, pairs((0, 4, 0), (0, 7, 1), (1, 4, 2)))
    rows = torch.stack([both.batch, both.query, both.target], dim=1)
    assert rows.tolist() == [[0, 4, 0], [0, 4, 1], [0, 7, 1], [1, 4, 2]]
    assert both.is_class_target.tolist() == [False, True, True, True]


def test_merging_adds_the_one_to_one_pairs() -> None:
    """No query reaches the threshold, so each object has its best query and the one that the Hungarian method
    gives it.
    """
    torch.manual_seed(0)
    targets = random_targets(4)
    for merged in (False, True):
        flags = {
            'use_ms_detr': True,
            'use_indices_merge': merged,
            'o2m_matcher_threshold': 2.0,
            'o2m_matcher_k': 1,
        }
        criterion, _, _ = build_supervision(settle(Namespace(**SMALL | flags)))
        torch.manual_seed(1)
        prediction = Prediction(torch.randn(1, 1, 60, 6), torch.rand(1, 1, 60, 4))
        criterion({'predictions': dict.fromkeys(('one2one', 'o2m'), prediction)}, targets)
        queries = [
            set(match(criterion.table[kind].matcher, prediction, targets)[0].query.tolist())
            for kind in ('one2one', 'o2m')
        ]
        assert criterion.pair_counts['o2m'] == len(queries[1] | queries[0] if merged else queries[1])


@pytest.mark.parametrize('num_objects', [(3, 2), (0, 0)], ids=['objects', 'no objects'])
@pytest.mark.parametrize(
    ('base', 'names'),
    mixes(('one stage', LEARNED), ('conditional', LEARNED), ('two stages', EVERYTHING), ('dino', EVERYTHING)),
)
def test_schemes_combine(base: str, names: tuple[str, ...], num_objects: tuple[int, int]) -> None:
    """Every kind of prediction has finite losses, and every parameter a gradient."""
    check_training(flags_of(base, names), names, random_targets(*num_objects))


def check_training(flags: dict, names: tuple[str, ...], targets: list[dict]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, criterion, _ = build_model(Namespace(**flags))
    outputs = model.train()([torch.randn(3, 64, 64), torch.randn(3, 64, 96)], targets)
    losses = criterion(outputs, targets)
    kinds = {'one2one'}.union(*(KINDS[name] for name in names))
    kinds |= {'enc'} if flags.get('two_stage') or flags.get('dino') else set()
    assert set(outputs['predictions']) == kinds == set(criterion.table)
    assert all(value.isfinite() for value in losses.values())
    assert set(losses) >= {f'loss_ce{"" if kind == "one2one" else "_" + kind}' for kind in kinds}
    weighted_sum(losses, criterion.weight_dict).backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name
    return losses


@pytest.mark.parametrize('base', ['two stages', 'dino'])
@pytest.mark.parametrize('num_objects', [(1, 0), (200, 200), (200, 0)], ids=str)
def test_few_and_many_objects(base: str, num_objects: tuple[int, int]) -> None:
    """Also more objects than queries, and than denoising queries."""
    names = ('heads', 'denoising', 'hybrid')
    check_training(flags_of(base, names), names, random_targets(*num_objects))


def test_no_anchor_is_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    """No anchor's centre is in these small objects: of the regions only the objects themselves match."""
    found = []
    original = atss.assign_adaptively
    monkeypatch.setattr(atss, 'assign_adaptively', lambda *args: found.append(original(*args)) or found[-1])
    box = torch.tensor([[0.3, 0.3, 0.01, 0.01]])
    targets = [{'labels': torch.tensor([1]), 'boxes': box}, {'labels': torch.tensor([2]), 'boxes': box}]
    losses = check_training(flags_of('two stages', ('heads',)), ('heads',), targets)
    assert all((assigned < 0).all() for assigned in found) and len(found) == 2
    assert losses['loss_rpn_bbox'] == losses['loss_atss_bbox'] == losses['loss_bbox_atss'] == 0
    assert losses['loss_bbox_rcnn'] > 0


def test_positives_of_denoising_are_counted_and_near_their_objects() -> None:
    criterion, _, sources = build_supervision(settle(Namespace(**flags_of('dino', ('denoising',)))))
    count = criterion.table['dn'].count
    assert count == sources['denoising'].count
    assert (count([3, 2]), count([1, 0]), count([0, 0]), count([30, 1])) == (3 * 5, 10 * 1, 0, 31)
    memory = Memory(torch.zeros(2, 0, 32), torch.zeros(2, 0), [])
    for sizes in ((3, 2), (1, 0), (0, 0), (30, 1)):
        targets = random_targets(*sizes)
        (group,), _ = sources['denoising'].queries(memory, targets)
        pairs, boxes = group.assignment, torch.cat([target['boxes'] for target in targets])
        assert pairs.count == count(list(sizes))
        objects, noised = boxes[pairs.target], group.reference_points[pairs.batch, pairs.query]
        moved = (box_cxcywh_to_xyxy(noised) - box_cxcywh_to_xyxy(objects)).abs()
        assert (moved <= objects[:, 2:].repeat(1, 2) / 2 + 1e-3).all(), 'negatives are moved farther'


def test_images_with_fewer_cells_than_queries_of_a_head() -> None:
    """A head has nothing to fill its queries up with."""
    flags = flags_of('two stages', ('heads',)) | {'num_feature_levels': 1, 'num_queries': 1}
    model, criterion, _ = build_model(Namespace(**flags))
    targets = random_targets(0, 0)
    losses = criterion(model.train()(torch.randn(2, 3, 32, 32), targets), targets)
    assert all(value.isfinite() for value in losses.values())


def test_random_numbers_are_drawn_in_the_official_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Denoising (labels, new labels, signs, sizes), then proposals, regions and queries of the heads."""
    torch.manual_seed(0)
    model, _, _ = build_model(Namespace(**flags_of('dino', ('heads', 'denoising'))))
    drawn = []
    for name in ('rand_like', 'randint_like', 'randperm'):

        def spy(
            *args: object, name: str = name, original: object = getattr(torch, name), **kwargs: object
        ) -> Tensor:
            shape = tuple(args[0].shape) if isinstance(args[0], Tensor) else args[0]
            drawn.append((name, shape))
            return original(*args, **kwargs)

        monkeypatch.setattr(torch, name, spy)
    monkeypatch.setattr(faster_rcnn.RegionProposals, 'num_samples', 20)
    monkeypatch.setattr(faster_rcnn.FasterRCNN, 'num_samples', 12)
    model.train()([torch.randn(3, 64, 64), torch.randn(3, 64, 96)], random_targets(3, 2))
    rows = 2 * 3 * 5  # 10 // 3 groups of a positive and a negative copy of 5 objects
    noise = drawn[:4]
    assert [name for name, _ in noise] == ['rand_like', 'randint_like', 'randint_like', 'rand_like']
    assert noise[0][1] == (rows,) and noise[2][1] == noise[3][1] == (rows, 4)
    permuted = [num for name, num in drawn[4:] if name == 'randperm']
    assert len(drawn) == 4 + len(permuted)
    anchors, regions = permuted[:2], permuted[2:4]
    assert min(anchors) > 500, 'negatives of each image; there are fewer than ten positives'
    assert all(num < 400 for num in regions) and len(permuted) >= 6


@pytest.mark.parametrize('variant', [{'ms_variant': 'a', 'use_aux_ffn': False}, {'use_checkpoint': True}])
@pytest.mark.parametrize(
    'base',
    ['conditional', *(pytest.param(base, marks=pytest.mark.slow) for base in BASES if base != 'conditional')],
)
def test_schemes_combine_without_auxiliary_losses(base: str, variant: dict) -> None:
    """Only the last layer is supervised, and every parameter has a gradient all the same."""
    torch.manual_seed(0)
    flags = flags_of(base, schemes_of(base)) | variant | {'aux_loss': False}
    model, criterion, _ = build_model(Namespace(**flags))
    targets = random_targets(3, 2)
    losses = criterion(model.train()([torch.randn(3, 64, 64), torch.randn(3, 64, 96)], targets), targets)
    assert not [name for name in losses if re.search(r'_\d', name)]
    weighted_sum(losses, criterion.weight_dict).backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name


@pytest.mark.parametrize(
    ('base', 'names'),
    mixes(
        ('conditional', LEARNED), ('two stages with tricks', EVERYTHING), ('dino', EVERYTHING), alone=False
    ),
)
def test_schemes_leave_inference_alone(
    base: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same weights, the plain model (of the same order of sub-layers) has the same bits."""
    torch.manual_seed(0)
    flags = flags_of(base, names)
    model, _, _ = build_model(Namespace(**flags))
    # These stay, the auxiliary block and what else only trains goes.
    same = {
        'use_ms_detr': 'mixed' in names,
        'input_proj_bias': settle(Namespace(**flags)).input_proj_bias,
    }
    plain = build_detector(settle(Namespace(**SMALL | BASES[base] | same)), {'one2one': 12})
    state = {name: value for name, value in model.state_dict().items() if name in plain.state_dict()}
    if 'query_embed.weight' in state:
        state['query_embed.weight'] = state['query_embed.weight'][:12]
    plain.load_state_dict(state)
    monkeypatch.setattr(BranchB, 'o2m_branch', lambda *_: pytest.fail('training code at inference'))
    images = [torch.randn(3, 64, 64), torch.randn(3, 64, 96)]
    before = deepcopy(plain_state(model.eval()))
    with torch.no_grad():
        ours, theirs = model(images), plain.eval()(images)
    assert set(ours) == {'pred_logits', 'pred_boxes'}
    for name in ours:
        assert torch.equal(ours[name], theirs[name])
    assert before == plain_state(model), 'evaluation writes nothing'


@pytest.mark.parametrize('base', ['two stages with tricks', 'dino'])
def test_inference_calls_no_training_code(base: str) -> None:
    """All functions that an evaluation of a model with all schemes calls are in files of inference."""
    model, _, postprocessors = build_model(Namespace(**flags_of(base, EVERYTHING)))
    images, called = torch.randn(2, 3, 64, 64), set()
    sys.setprofile(lambda frame, event, _: called.add(frame.f_code.co_filename) if event == 'call' else None)
    try:
        with torch.no_grad():
            postprocessors['bbox'](model.eval()(images), torch.tensor([[64, 64], [64, 64]]))
    finally:
        sys.setprofile(None)
    ours = {Path(name).relative_to(ROOT) for name in called if Path(name).is_relative_to(ROOT)}
    assert Path('models/deformable_detr.py') in ours and Path('models/postprocess.py') in ours
    assert not [path for path in ours if 'training' in path.parts]


def plain_state(model: nn.Module) -> dict[str, object]:
    """Every attribute of every module that is no tensor and no module, and the sums of all tensors."""
    attributes = {
        f'{where}.{name}': value
        for where, module in model.named_modules()
        for name, value in vars(module).items()
        if not name.startswith('_') and not isinstance(value, Tensor | nn.Module | FirstStage)
    }
    return attributes | {name: x.double().sum().item() for name, x in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(('base', 'names'), mixes(alone=False))
def test_combinations_train_a_few_steps(base: str, names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    sizes = {'backbone': 'resnet10', 'backbone_norm': 'batch', 'enc_layers': 1, 'dec_layers': 2}
    model, criterion, _ = build_model(Namespace(**flags_of(base, names) | sizes))
    data = build_data(
        'train', parse('--dataset_file shapes --shapes_train 24 --img_size 64 --max_size 64 --aug flip')
    )
    batches = [collate_fn([data[2 * i], data[2 * i + 1]]) for i in range(12)]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(model, 1e-3, 1e-3, 0.0)
    averages = train_one_epoch(model, criterion, batches, optimizer, max_norm=0.1)
    assert all(np.isfinite(value) for value in averages.values())
    assert 0.9 < averages['positives_one2one'] <= 1, 'images may have more objects than queries'
    assert sum(v for name, v in averages.items() if name.startswith('share_')) == pytest.approx(1)
    if 'hybrid' in names:
        assert averages['positives_one2many'] > 2
    if 'denoising' in names:
        assert averages['positives_dn'] >= 1 and averages['share_dn'] > 0
    if 'heads' in names:
        assert averages['positives_rcnn'] >= 1 and averages['share_rcnn'] > averages['share_atss'] / 10 > 0
    stuck = [name for name, p in model.named_parameters() if p.requires_grad and p.equal(before[name])]
    # Conditional DETR's content begins as zero, so the first layer's weights for it get no gradient. Few
    # objects are large enough for a coarse map. The norm of a map of one cell does not depend on its input.
    expected = r'decoder\.layers\.0\.(sa_|ca_qcontent)|atss\.scales\.[1-9]|collaborative\.downsample'
    assert not [name for name in stuck if not re.search(expected, name)]


def test_the_one_to_one_group_does_not_notice_the_others_while_training() -> None:
    torch.manual_seed(0)
    flags = flags_of('two stages with tricks', EVERYTHING) | {'dropout': 0.0}
    model, _, _ = build_model(Namespace(**flags))
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        training = model.train()(images, random_targets(3, 2))
        evaluated = model.eval()(images)
    for name in ('pred_logits', 'pred_boxes'):
        torch.testing.assert_close(training[name], evaluated[name], rtol=1e-4, atol=1e-5)


def test_numbers_that_are_not_given_follow_from_those_that_are() -> None:
    plain, off = parse('--two_stage --with_box_refine'), parse('--k_one2many 0 --num_queries_one2many 0')
    assert (plain.hybrid_queries, plain.dim_feedforward) == (None, 1024)
    assert (off.family, off.hybrid_queries, off.dim_feedforward) == ('deformable', 0, 2048)
    only_k, only_queries = parse('--hybrid_k 6'), parse('--hybrid_queries 1500')
    assert (only_k.hybrid_queries, only_k.hybrid_lambda, only_queries.hybrid_k) == (1500, 1.0, 5)
    assert parse('--conditional --hybrid_k 6').family == 'conditional'
    official = settle(Namespace(num_queries_one2one=7, k_one2many=6, num_queries_one2many=20, topk=50))
    assert (official.num_queries, official.hybrid_k, official.hybrid_queries, official.topk_eval) == (
        7,
        6,
        20,
        50,
    )


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize('name', ['ms_detr_300', 'ms_detr_pp_300', 'ms_detr_pp_900', 'ms_detr_a_300'])
def test_official_command_lines_of_ms_detr_build_the_official_model(name: str) -> None:
    """Variant a is a program of its own there, with the flags of the other: here it has to be named."""
    record = json.loads((SHARED / f'parity/ms_detr/{name}.json').read_text())
    args = parse(record['command_line'] + (' --ms_variant a' if '_a_' in name else ''))
    differing = {key for key, value in record['arguments'].items() if vars(args).get(key, value) != value}
    assert differing <= {'device', 'output_dir', 'num_workers', 'coco_path', 'dataset_file', 'dist_url'}
    model, criterion, _ = build_model(args)
    check_coefficients(criterion, record['weight_dict'])
    assert sum(p.numel() for p in model.parameters()) == record['num_params_total']
    named = {official for _, _, official in record['state_dict']}
    assert sum(1 for _ in model.parameters()) == len(record['parameter_order'])
    assert {n for n, _ in model.named_parameters() if not re.match('(class|bbox)_embed[.]', n)} <= named
    groups = optimizer_of(model, args).param_groups
    found = [[len(g['params']), sum(p.numel() for p in g['params']), g['lr']] for g in groups]
    np.testing.assert_allclose(found, record['optimizer']['groups_tensors_elements_lr'])


def test_the_table_of_supervision_names_every_kind() -> None:
    flags = flags_of('two stages', LEARNED) | {'hybrid_lambda': 0.5}
    criterion, num_queries, _ = build_supervision(settle(Namespace(**flags)))
    text = supervision_table(criterion.table, num_queries, criterion.weight_dict)
    lines = [line.split() for line in text.splitlines()]
    assert [line[0] for line in lines] == ['one2one', 'enc', 'one2many', 'o2m', 'group1']
    assert '24 queries' in text and 'every object 3 times' in text and '3 x objects, all x 0.5' in text
    assert 'on anchors' in text and 'one2one, read twice' in text and 'from 0.4' in text
    assert text.count('3 x  ') == 4, 'decoder layers'
    criterion.pair_counts = Counter({'one2one': 4.0, 'o2m': 10.0, 'objects': 4})
    averages = {'loss_ce': 1.0, 'loss_ce_0': 1.0, 'loss_ce_1_o2m': 3.0, 'class_error': 50.0}
    found = criterion.statistics(averages)
    positives = {'positives_one2one': 1.0, 'positives_o2m': 2.5}
    assert found == positives | {'share_one2one': 0.25, 'share_o2m': 0.75}
    assert statistics_text({f'train_{k}': v for k, v in found.items()}).endswith(
        'one2one 1.00, 25 %; o2m 2.50, 75 %'
    )


def test_checkpoints_of_more_queries_fit_the_plain_model() -> None:
    """The inference group comes first; the flags of the run, official or ours, say how large it is."""
    model, _, _ = build_model(Namespace(**flags_of('two stages with tricks', ('hybrid',))))
    plain, _, _ = build_model(Namespace(**SMALL | TRICKS))
    for args in (Namespace(num_queries_one2one=12), {'num_queries': 12}):
        load_checkpoint(plain, {'model': model.state_dict(), 'args': args})
        assert torch.equal(plain.query_embed.weight, model.query_embed.weight[:12])
    refused = pytest.raises(ValueError, match=r'query_embed\.weight: \(36, 32\) there, \(12, 32\) here')
    with refused:
        load_checkpoint(plain, model.state_dict())
    with refused:  # the optimizer's state would not fit
        load_checkpoint(plain, {'model': model.state_dict(), 'args': {'num_queries': 12}}, resume=True)


def test_the_order_of_sub_layers_is_not_lost_in_a_checkpoint() -> None:
    """Without the auxiliary block no name tells it, so the flags of the run do."""
    flags = SMALL | BASES['two stages']
    mixed, plain = (build_model(Namespace(**flags, use_ms_detr=on))[0] for on in (True, False))
    helped = build_model(Namespace(**flags, use_ms_detr=True, use_aux_ffn=True))[0]
    for checkpoint in ({'model': mixed.state_dict(), 'args': {'use_ms_detr': True}}, helped.state_dict()):
        with pytest.raises(ValueError, match=r'trained with --use_ms_detr.* add it'):
            load_checkpoint(plain, checkpoint)
        load_checkpoint(mixed, checkpoint)  # the auxiliary block is for training only
    for args in (Namespace(use_ms_detr=False), {'num_queries': 12}):
        with pytest.raises(ValueError, match=r'trained without --use_ms_detr.* leave it out'):
            load_checkpoint(mixed, {'model': plain.state_dict(), 'args': args})


def test_second_class_heads_come_and_go() -> None:
    flags = SMALL | BASES['two stages']
    plain, second = (
        build_model(Namespace(**flags, **more))[0] for more in ({}, {'use_ms_detr': True, 'ms_variant': 'a'})
    )
    load_checkpoint(plain, {'model': second.state_dict(), 'args': {'use_ms_detr': True}})
    assert torch.equal(plain.class_embed[0].weight, second.class_embed[0].weight)
    nn.init.normal_(plain.class_embed[1].weight)
    with pytest.raises(ValueError, match='missing: 6, such as class_embed_o2m'):
        load_checkpoint(second, plain.state_dict())
    load_checkpoint(second, plain.state_dict(), resize=True)
    assert torch.equal(second.class_embed_o2m[1].weight, plain.class_embed[1].weight)


class CountCalls(TorchDispatchMode):
    """Calls of ATen operators, views too."""

    number = 0

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('num_objects', [(20, 20), (7, 0), (40, 3), (0, 0)])
def test_stacked_losses_equal_layer_by_layer_ones(num_objects: tuple[int, int]) -> None:
    torch.manual_seed(0)
    flags = TWO_STAGE | {'hybrid_k': 6}
    criterion, _, _ = build_supervision(settle(Namespace(**flags)))
    predictions, targets = hybrid_batch(num_objects, num_tokens=2000, queries=(300, 600))
    losses = criterion({'predictions': predictions}, targets)
    expected, matches = reference_losses(predictions, targets, k=6)
    leaves = [x for p in predictions.values() for x in (p.logits, p.boxes)]
    gradients = []
    for found in (losses, expected):
        total = weighted_sum(
            {name: losses[name] if found is losses else found[name] for name in expected},
            criterion.weight_dict,
        )
        gradients.append(torch.autograd.grad(total, leaves))
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6, msg=name)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    found = [pairs for kind in predictions for pairs in assignments(criterion, kind, predictions, targets)]
    for pairs, reference in zip(found, matches.values(), strict=True):
        expected = [
            (query.tolist(), (target % max(number, 1)).tolist())
            for (query, target), number in zip(reference, num_objects, strict=True)
        ]
        check_pairs(pairs, expected, targets)


def test_criterion_of_hybrid_training_is_few_calls_and_one_copy() -> None:
    """At H-DETR's training size: calls of matching, losses and their backward pass; copies to the host."""
    torch.manual_seed(0)
    flags = TWO_STAGE | {'hybrid_k': 6}
    criterion, _, _ = build_supervision(settle(Namespace(**flags)))
    predictions, targets = hybrid_batch()
    leaves = [x for p in predictions.values() for x in (p.logits, p.boxes)]
    with CountCalls() as calls, CountSyncs() as syncs:
        losses = criterion({'predictions': predictions}, targets)
        total = weighted_sum(losses, criterion.weight_dict)
        forward = calls.number
        torch.autograd.grad(total, leaves)
    assert calls.number <= 900 and forward < 650, (forward, calls.number)
    assert syncs.found == ['cpu']


def test_proposals_are_matched_by_boxes_or_anchors() -> None:
    """As the flag says; by default as MS-DETR's program and as the others."""
    for flags, on in (
        ({}, 'boxes'),
        ({'enc_match': 'anchors'}, 'anchors'),
        ({'use_ms_detr': True}, 'anchors'),
        ({'use_ms_detr': True, 'enc_match': 'boxes'}, 'boxes'),
    ):
        matcher = build_model(Namespace(**SMALL | TWO_STAGE | flags))[1].table['enc'].matcher
        assert matcher.on == on and matcher.weights == ((0, 5, 2) if on == 'anchors' else (2, 5, 2))
    with pytest.raises(ValueError, match='--enc_match anchors needs --two_stage: add it'):
        settle(Namespace(**SMALL, deformable=True, enc_match='anchors'))
