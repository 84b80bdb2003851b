"""Two processes do what one does: training of every scheme, sharded weights, evaluation."""

import json
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

import main
from engine import build_optimizer
from models import build_model
from models.postprocess import postprocess_batch
from models.structures import Prediction
from models.training.criterion import weighted_sum
from models.units import all_units
from tests.models import SCHEMES, SMALLER, batch, no_chance, with_masks
from tests.processes import end_group, in_processes, start_group
from tests.runs import TINY, load
from util.distributed.collectives import get_rank, get_world_size
from util.distributed.parallel import gather, local_gradients, replicate, shard
from util.nested_tensor import NestedTensor

EQUAL_COUNTS = (
    'denoising',
    'co_dino',
)  # noised queries are padded to the largest number of objects of a batch


def train_some_steps(rank: int, flags: dict, counts: list[list[int]], accum_steps: int, wrap: str) -> dict:
    """Weights after one optimizer step for each entry of `counts`, objects of all images of the step; and the mean of the
    processes' losses.
    """
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model, criterion, _ = build_model(Namespace(**SMALLER | flags))
    bare, losses = model.train(), []
    if wrap == 'fsdp':
        shard(model, all_units(model), [Prediction])
    optimizer = build_optimizer(model, 1e-3, 1e-3, 1e-4)
    if wrap == 'ddp':
        model = replicate(model, [Prediction], accum_steps)
    for step, per_image in enumerate(counts):
        images, targets = batch(step, per_image)
        size = len(per_image) // get_world_size() // accum_steps
        parts = [slice(i * size, (i + 1) * size) for i in range(len(per_image) // size)]
        mine = parts[rank * accum_steps : (rank + 1) * accum_steps]
        optimizer.zero_grad()
        with no_chance():
            for index, part in enumerate(mine):
                with local_gradients(model) if index + 1 < len(mine) else nullcontext():
                    terms = criterion(
                        model(images[part], targets[part]), targets[part], [targets[p] for p in mine]
                    )
                    loss = weighted_sum(terms, criterion.weight_dict)
                    (loss / len(mine)).backward()
                losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    torch.set_default_dtype(torch.float32)
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in bare.state_dict().items()}
    return {'model': whole, 'loss': torch.stack(losses).view(len(counts), -1).mean(1)}


def assert_equal(ours: dict, theirs: dict, tolerance: float = 1e-6) -> None:
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f'{n}: {text}'
        )


def counts_of(name: str, steps: int = 8) -> list[list[int]]:
    """Objects of four images; in every third step the second process has none, and once nobody has."""
    if name in EQUAL_COUNTS:
        return [[3, 3, 3, 3]] * steps
    rows = [[2, 3, 1, 4] if step % 3 else [2, 1, 0, 0] for step in range(steps)]
    rows[-2] = [0, 0, 0, 0]
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    [
        name if name in ('detr', 'mixed', 'co_dino') else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in SCHEMES
    ],
)
def test_two_processes_equal_one_with_the_whole_batch(name: str) -> None:
    counts = counts_of(name)
    one = train_some_steps(0, SCHEMES[name], counts, 1, 'none')
    two = in_processes(2, train_some_steps, SCHEMES[name], counts, 1, 'ddp')
    torch.testing.assert_close((two[0]['loss'] + two[1]['loss']) / 2, one['loss'], rtol=1e-6, atol=1e-6)
    for result in two:
        assert_equal(result['model'], one['model'])


@pytest.mark.slow
@pytest.mark.parametrize(
    'terms', [['cls'], ['bbox', 'giou'], ['enc_cls'], ['enc_bbox', 'enc_giou']], ids='+'.join
)
def test_nobody_waits_for_heads_without_a_loss(terms: list[str]) -> None:
    """Terms of coefficient 0 do not exist, and heads that no other term reaches ask for no gradient."""
    flags = SCHEMES['two_stage'] | {f'{term}_loss_coef': 0 for term in terms}
    counts = [[2, 3, 1, 4], [2, 1, 0, 0], [1, 1, 1, 1]]
    one = train_some_steps(0, flags, counts, 1, 'none')
    for result in in_processes(2, train_some_steps, flags, counts, 1, 'ddp'):
        assert_equal(result['model'], one['model'])


@pytest.mark.slow
def test_noised_queries_of_a_process_without_objects() -> None:
    """Padding depends on the batch here, so the peer is one process that accumulates the two batches."""
    counts = [[2, 4, 0, 0], [1, 1, 3, 2], [0, 0, 0, 0]] * 3
    one = train_some_steps(0, SCHEMES['denoising'], counts, 2, 'none')
    two = in_processes(2, train_some_steps, SCHEMES['denoising'], counts, 1, 'ddp')
    for result in two:
        assert_equal(result['model'], one['model'])


@pytest.mark.slow
@pytest.mark.parametrize('wrap', ['ddp', 'fsdp'])
def test_accumulation_in_two_processes(wrap: str) -> None:
    counts = [[2, 3, 1, 4], [1, 2, 0, 0]] * 3
    flags = SCHEMES['hybrid'] | {'num_feature_levels': 3}
    one = train_some_steps(0, flags, counts, 1, 'none')
    for result in in_processes(2, train_some_steps, flags, counts, 2, wrap):
        assert_equal(result['model'], one['model'])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['detr', 'mixed', 'co_dino'])
def test_sharded_weights_train_as_whole_ones(name: str) -> None:
    """Second readings, weights without a dimension (the scales of ATSS) and frozen ones too."""
    counts = counts_of(name, 6)
    one = train_some_steps(0, SCHEMES[name], counts, 1, 'none')
    for result in in_processes(2, train_some_steps, SCHEMES[name], counts, 1, 'fsdp'):
        assert_equal(result['model'], one['model'])


def train_and_detect_masks(rank: int, wrap: str) -> dict[str, torch.Tensor]:
    """Weights after a step that trains masks of detections, and then the detections of this process's image."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    flags = SMALLER | SCHEMES['denoising'] | {'co_masks': True, 'num_feature_levels': 3}
    model, criterion, postprocessors = build_model(Namespace(**flags))
    bare = model.train()
    if wrap == 'fsdp':
        shard(model, all_units(model), [Prediction])
    optimizer = build_optimizer(model, 1e-3, 1e-3, 1e-4)
    if wrap == 'ddp':
        model = replicate(model, [Prediction])
    images, targets = batch(0, [3, 3])
    images, targets = images[rank, None], with_masks(targets, (64, 64))[rank : rank + 1]
    with no_chance():
        losses = criterion(model(images, targets), targets)
    weighted_sum(losses, criterion.weight_dict).backward()
    optimizer.step()
    size = torch.tensor([64, 64])
    samples = NestedTensor(images, torch.zeros(1, 64, 64, dtype=torch.bool))
    with torch.no_grad():
        outputs = bare.eval()(samples)
        found = postprocess_batch(bare, postprocessors, outputs, [{'size': size, 'orig_size': size}], samples)
    torch.set_default_dtype(torch.float32)
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in bare.state_dict().items()}
    return whole | {f'detected {name}': x.double() for name, x in found[0].items()}


@pytest.mark.slow
def test_masks_of_detections_are_trained_and_predicted_with_sharded_weights() -> None:
    """Those of detections are predicted after the forward pass, when a process has its part of the weights alone."""
    sharded, replicated = (in_processes(2, train_and_detect_masks, wrap) for wrap in ('fsdp', 'ddp'))
    for ours, theirs in zip(sharded, replicated, strict=True):
        assert ours['detected masks'].any() and 'detected mask_scores' in ours
        assert_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    'backbone', [pytest.param('swin_tiny', marks=pytest.mark.exhaustive), 'mobilenet_v2']
)
def test_the_backbone_is_sharded_block_by_block(backbone: str) -> None:
    """No unit of FSDP holds most of it; and two processes train as one."""
    flags = {'backbone': backbone, 'backbone_norm': 'frozen', 'backbone_stages': 4, 'drop_path_rate': 0.0}
    flags = {key: value for key, value in flags.items() if key != 'drop_path_rate' or 'swin' in backbone}
    counts = counts_of('detr', 3)
    one = train_some_steps(0, flags, counts, 1, 'none')
    for result in in_processes(2, train_some_steps, flags, counts, 1, 'fsdp'):
        assert_equal(result['model'], one['model'])
    model, _, _ = build_model(Namespace(**SMALLER | flags))
    body = model.backbone[0].body
    sizes = [sum(p.numel() for p in part.parameters()) for part in body.units()]
    assert max(sizes) < 0.3 * sum(p.numel() for p in body.parameters())
    assert sum(sizes) > 0.9 * sum(p.numel() for p in body.parameters())


def gather_sharded(rank: int) -> tuple[list[int], bool]:
    """Bytes of the parameters that gathered states of model and optimizer hold on a rank, and whether they are whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    shard(model, [*model])
    optimizer = build_optimizer(model, 1e-3, 1e-3, 1e-4)
    model(torch.randn(3, 16)).sum().backward()
    optimizer.step()
    states = model.state_dict(), optimizer.state_dict()
    gathered = [
        [x for x in tree_leaves(gather(state)) if isinstance(x, torch.Tensor) and x.ndim] for state in states
    ]
    whole = [[x.full_tensor() for x in tree_leaves(state) if isinstance(x, DTensor)] for state in states]
    same = all(
        torch.equal(x, y)
        for xs, ys in zip(gathered, whole, strict=True)
        for x, y in zip(xs, ys, strict=False)
    )
    return [sum(x.nbytes for x in xs) for xs in gathered], same


@pytest.mark.slow
def test_the_main_process_alone_gathers_whole_states() -> None:
    numbers = 16 * 8 + 8 + 8 * 4 + 4
    assert in_processes(2, gather_sharded) == [([4 * numbers, 2 * 4 * numbers], True), ([0, 0], True)]


def run_two(folder: Path, *flags: str) -> None:
    codes = end_group(start_group(folder / 'log', [*TINY.split(), *flags]))
    assert codes == [0, 0], ''.join(path.read_text() for path in sorted(folder.glob('log*')))


def run_one(*flags: str) -> None:
    main.main(main.get_args_parser().parse_args([*TINY.split(), *flags]))


FROZEN = [
    '--backbone_norm',
    'group',
    '--dropout',
    '0',
    '--aug',
    'lsj',
    '--img_size',
    '64',
    '--sgd',
    '--lr',
    '1e-2',
]


@pytest.mark.slow
def test_evaluation_in_two_processes_gives_the_same_numbers(tmp_path: Path) -> None:
    """Seven images of different sizes, two in a batch: the last batch is smaller, and one process has more to do."""
    run_one('--output_dir', str(tmp_path / 'run'), '--epochs', '1')
    flags = [
        '--eval',
        '--resume',
        str(tmp_path / 'run/checkpoint.pth'),
        '--shapes_val',
        '7',
        '--batch_size',
        '2',
    ]
    run_one(*flags, '--output_dir', str(tmp_path / 'one'))
    run_two(tmp_path, *flags, '--output_dir', str(tmp_path / 'two'))
    one, two = (json.loads((tmp_path / name / 'eval.json').read_text()) for name in ('one', 'two'))
    assert one == two and max(one['test_coco_eval_bbox']) > 0


@pytest.mark.slow
def test_sharded_runs_go_on_with_any_number_of_processes(tmp_path: Path) -> None:
    """An epoch of a single process, then two of two, sharded, then one of a single process again: as a single process
    alone. The moving average too, which is evaluated in between.
    """
    flags = [*FROZEN, '--lr_drop', '4', '--ema', '0.9']
    run_one('--output_dir', str(tmp_path / 'one'), *flags, '--epochs', '4')
    mixed = ['--output_dir', str(tmp_path / 'mixed'), *flags, '--resume', 'auto']
    run_one(*mixed, '--epochs', '1')
    run_two(tmp_path, *mixed, '--fsdp', '--batch_size', '2', '--epochs', '3')
    run_one(*mixed, '--epochs', '4')
    one, other = load(tmp_path / 'one'), load(tmp_path / 'mixed')
    for part in ('model', 'model_ema'):
        assert_equal(other[part], one[part], tolerance=1e-4)
    assert other['ema_updates'] == one['ema_updates'] == 12


def disagree(rank: int) -> str:
    from util.distributed.collectives import check_agreement, fail_together

    messages = []
    for facts in ({'--lr': 0.1 + rank}, {'PyTorch': '2.11'} if rank else {}):
        with pytest.raises(ValueError) as error:
            check_agreement(facts)
        messages.append(str(error.value))
    with pytest.raises((ValueError, OSError)) as error, fail_together():
        if rank == 1:
            raise FileNotFoundError('image 7 is missing')
    return [*messages, str(error.value)]


@pytest.mark.slow
def test_processes_that_disagree_say_so() -> None:
    expected = [
        '--lr is 0.1 in process 0 and 1.1 in process 1',
        'PyTorch is None in process 0 and 2.11',
        'image 7',
    ]
    for texts in in_processes(2, disagree):
        assert all(part in text for part, text in zip(expected, texts, strict=True)), texts


def rank_of(rank: int) -> tuple[int, int]:
    return get_rank(), get_world_size()


def test_processes_know_their_place() -> None:
    assert in_processes(3, rank_of) == [(0, 3), (1, 3), (2, 3)]
