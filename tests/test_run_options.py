"""Averaged weights, batches of one size, the rehearsal of the worst batch, which checkpoints stay."""

import csv
import errno
import json
import math
import re
import time
from argparse import Namespace
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn

import engine
from datasets.augmentations import AUGMENTATIONS
from datasets.copy_paste import LargeScaleJitter
from datasets.loaders import worst_batch
from datasets.samplers import EvalBatches, SizeBatches
from datasets.shapes import ShapesDetection
from models import build_model
from models.weights.load import load_checkpoint
from models.weights.read import read_checkpoint
from models.weights.records import extract_flags
from tests.models import SMALLER, TRICKS
from tests.runs import assert_same, load, run
from tools.convert_checkpoint import convert
from util import trackers
from util.config.recorded import adopt
from util.config.settle import settle
from util.distributed.parallel import load_optimizer_state
from util.logger import RunLog
from util.optim import Schedule, WeightAverage
from util.precision import Precision


def shapes(number: int, aug: str = 'detr') -> ShapesDetection:
    data = ShapesDetection(number, image_size=96)
    data.transforms = AUGMENTATIONS[aug](96).transforms('train')
    return data


@pytest.mark.parametrize('aug', ['detr', 'flip', 'co_detr'])
def test_the_size_of_a_image_is_known_before_it_is_read(aug: str) -> None:
    data = shapes(12, aug)
    sizes = data.image_sizes()
    for epoch in (0, 3):
        data.set_epoch(epoch)
        for idx in range(len(data)):
            assert data.drawn_size(idx, epoch, sizes[idx]) == tuple(data[idx][0].shape[1:])


def padding(data: ShapesDetection, batches: list[list[int]]) -> float:
    """Share of the batches' pixels that belongs to no image."""
    sizes, real, padded = data.image_sizes(), 0, 0
    for batch in batches:
        drawn = [data.drawn_size(idx, 0, sizes[idx]) for idx in batch]
        real += sum(height * width for height, width in drawn)
        padded += len(batch) * max(height for height, _ in drawn) * max(width for _, width in drawn)
    return 1 - real / padded


def test_batches_of_one_size_have_little_padding_and_every_image_once() -> None:
    data = shapes(300)
    ranks = [SizeBatches(data, 4, 3, rank, seed=1) for rank in range(3)]
    batches = [list(sampler) for sampler in ranks]
    assert [len(part) for part in batches] == [len(sampler) for sampler in ranks] == [25] * 3
    seen = [idx for part in batches for batch in part for idx in batch]
    assert sorted(seen) == list(range(300))
    random_order = torch.randperm(300).view(-1, 4).tolist()
    assert padding(data, list(chain(*batches))) < 0.5 * padding(data, random_order)
    steps = [list(chain(*(part[step] for part in batches))) for step in range(25)]
    assert padding(data, steps) < 0.6 * padding(data, torch.tensor(random_order).view(-1, 12).tolist()), (
        'nobody waits'
    )
    for sampler, part in zip(ranks, batches, strict=True):
        for first in (1, 24, 25):
            sampler.set_epoch(0, first)
            assert list(sampler) == part[first:]
        sampler.set_epoch(1)
        assert list(sampler) != part


def test_evaluation_batches_do_not_depend_on_the_number_of_processes() -> None:
    for total, size, world in ((7, 2, 2), (5, 2, 3), (8, 3, 4), (3, 4, 2)):
        single = list(EvalBatches(total, size, 1, 0))
        parts = [list(EvalBatches(total, size, world, rank)) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        assert all(batch in single for part in parts for batch in part)
        assert {idx for part in parts for batch in part for idx in batch} == set(range(total))


def test_the_average_follows_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, 0.9)
    expected = model[0].weight.detach().clone()
    for number in range(1, 30):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 3))
            model[1].num_batches_tracked += 1
        average.update(model)
        decay = min(0.9, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * model[0].weight
        torch.testing.assert_close(average.module[0].weight, expected)
    assert average.module[1].num_batches_tracked == 29
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def test_the_average_follows_tensors_that_are_replaced() -> None:
    """Whole networks in another type or with other tensors, and weights that two modules share."""
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.BatchNorm1d(3), shared)
    average = WeightAverage(model, 0.5)
    for change in (
        lambda: model.load_state_dict({name: x + 1 for name, x in model.state_dict().items()}, assign=True),
        lambda: [each.double() for each in (model, average.module)],
    ):
        change()
        before = {name: x.clone() for name, x in average.module.state_dict().items()}
        average.update(model)
        step = average.step_size()
        for name, x in average.module.state_dict().items():
            theirs = model.state_dict()[name]
            expected = before[name].lerp(theirs, step) if x.is_floating_point() else theirs
            torch.testing.assert_close(x, expected)


def test_averaged_weights_are_what_is_evaluated_and_loaded(tmp_path: Path) -> None:
    run(tmp_path / 'run', '--epochs', '1', '--ema', '0.5')
    checkpoint = load(tmp_path / 'run')
    name = 'query_embed.weight'
    assert not torch.equal(checkpoint['model'][name], checkpoint['model_ema'][name])
    run(tmp_path / 'eval', '--eval', '--resume', str(tmp_path / 'run/checkpoint.pth'))
    with (tmp_path / 'run/metrics.csv').open() as file:
        ap = float(next(csv.DictReader(file))['test_AP'])
    assert json.loads((tmp_path / 'eval/eval.json').read_text())['test_coco_eval_bbox'][0] == ap
    model, _, _ = build_model(
        Namespace(**checkpoint['args'] | {'num_classes': len(checkpoint['class_map']['category_ids'])})
    )
    for resume, part in ((False, 'model_ema'), (True, 'model')):
        load_checkpoint(model, checkpoint, resume=resume)
        assert torch.equal(model.state_dict()[name], checkpoint[part][name])
    for more, message in ((['--ema', '0'], 'its average would be lost'), (['--sgd'], 'leave --sgd out')):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / 'run', '--epochs', '2', '--resume', 'auto', *more)
    assert_same(load(tmp_path / 'run'), checkpoint)


def test_converting_keeps_the_average_beside_the_weights_and_stripping_keeps_it_alone(tmp_path: Path) -> None:
    weights, average = ({'query_embed.weight': torch.full((4, 8), value)} for value in (1.0, 2.0))
    torch.save({'model': weights, 'model_ema': average, 'optimizer': {}}, tmp_path / 'run.pth')
    for stripped, expected in ((False, {'model': 1.0, 'model_ema': 2.0}), (True, {'model': 2.0})):
        out = tmp_path / f'{stripped}.pth'
        convert(str(tmp_path / 'run.pth'), out, stripped, 'ours')
        converted = torch.load(out, weights_only=True)
        found = {
            name: float(converted[name]['query_embed.weight'][0, 0])
            for name in ('model', 'model_ema')
            if name in converted
        }
        assert found == expected
    said = convert(str(tmp_path / 'run.pth'), tmp_path / 'run.safetensors', False, 'ours')
    assert said.endswith('the averaged weights alone, without the state of the run')
    assert read_checkpoint(tmp_path / 'run.safetensors')['model']['query_embed.weight'][0, 0] == 2


def test_the_newest_and_the_best_checkpoints_stay(tmp_path: Path) -> None:
    mine = tmp_path / 'checkpoint0000_mine.pth'
    mine.touch()
    run(tmp_path, '--epochs', '4', '--save_every', '1', '--keep_checkpoints', '2')
    names = {path.name for path in tmp_path.glob('*.pth')}
    assert names - {mine.name} == {
        'checkpoint.pth',
        'checkpoint0002.pth',
        'checkpoint0003.pth',
        'checkpoint_best.pth',
    }
    with (tmp_path / 'metrics.csv').open() as file:
        aps = [float(row['test_AP']) for row in csv.DictReader(file)]
    assert mine.is_file()
    best = torch.load(tmp_path / 'checkpoint_best.pth', weights_only=True)
    assert best['epoch'] == aps.index(max(aps))


def test_a_run_stops_when_its_ap_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    still = [
        '--epochs',
        '9',
        '--patience',
        '2',
        '--lr',
        '0',
        '--lr_backbone',
        '0',
        '--backbone_norm',
        'frozen',
    ]
    for more in ((), ('--resume', 'auto')):
        run(tmp_path, *still, *more)
        assert 'no better AP in 2 evaluations: stopping after 3 epochs' in capsys.readouterr().out
        with (tmp_path / 'metrics.csv').open() as file:
            assert [row['epoch'] for row in csv.DictReader(file)] == ['1', '2', '3']
    with pytest.raises(ValueError, match='--eval_every 0 measures none'):
        run(tmp_path / 'other', '--patience', '2', '--eval_every', '0')


def test_frozen_parts_stay_as_they_are(tmp_path: Path) -> None:
    parts = ('--freeze', 'backbone', 'decoder.layers.0', '--backbone_norm', 'frozen')
    run(tmp_path, '--epochs', '2', '--save_every', '1', '--eval_every', '0', *parts)
    first, second = (
        torch.load(tmp_path / f'checkpoint000{epoch}.pth', weights_only=True)['model'] for epoch in (0, 1)
    )
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert same == {name for name in first if 'backbone.' in name or 'decoder.layers.0.' in name}
    for names, more, message in (
        ('neck', [], '--freeze neck: no parameter has this in its name; there are .*encoder'),
        ('transformer backbone class_embed bbox_embed input_proj query_embed', [], 'nothing to train'),
        ('backbone', ['--backbone_norm', 'batch'], 'statistics of batch norms would still change'),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / 'other', '--backbone_norm', 'frozen', '--freeze', *names.split(), *more)


def test_another_choice_of_frozen_parts_is_no_continuation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, '--epochs', '1', '--eval_every', '0', '--freeze', 'encoder')
    with pytest.raises(ValueError, match='give the --freeze, --lr_backbone'):
        run(tmp_path, '--epochs', '2', '--eval_every', '0', '--resume', 'auto', '--freeze', 'decoder')
    assert load(tmp_path)['epoch'] == 0
    trainable = set()
    for more in ([], ['--freeze', 'encoder']):
        run(tmp_path / 'dry', '--dry_run', *more)
        trainable.add(re.search(r'parameters +[\d,]+, ([\d,]+) trainable', capsys.readouterr().out)[1])
    assert len(trainable) == 2, 'the dry run knows of --freeze'


def test_trackers_get_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Recorder:
        module = package = 'json'

        def __init__(self, folder: Path, flags: dict) -> None:
            seen.append((folder, flags['wandb']))

        def add(self, epoch: int, numbers: dict[str, float]) -> None:
            seen.append((epoch, numbers['epoch'], 'test_AP' in numbers))

    monkeypatch.setitem(trackers.TRACKERS, 'wandb', Recorder)
    run(tmp_path, '--epochs', '2', '--eval_every', '2', '--wandb', 'mine')
    assert seen == [(tmp_path, 'mine'), (1, 1, False), (2, 2, True)]


def test_a_tracker_that_cannot_write_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip('tensorboard')
    from torch.utils.tensorboard import SummaryWriter

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(SummaryWriter, 'add_scalar', full)
    run(tmp_path, '--epochs', '2', '--eval_every', '0', '--shapes_train', '4', '--tensorboard')
    said = capsys.readouterr().out
    assert said.count('warning: [Errno 28] No space left on device') == 2 and 'epoch 2/2: loss' in said
    assert load(tmp_path)['epoch'] == 1


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    tracker = trackers.WandB(tmp_path, {'wandb': 'mine', 'lr': 0.5})
    tracker.add(1, {'epoch': 1, 'train_loss': 2.5})
    tracker.run.finish()
    (file,) = tmp_path.glob('wandb/offline-run-*/run-*.wandb')
    end = time.monotonic() + 60  # another process writes it
    while b'train_loss' not in file.read_bytes() and time.monotonic() < end:
        time.sleep(0.2)
    assert b'train_loss' in file.read_bytes()

    def refuse(**options: object) -> None:
        raise wandb.errors.UsageError('No API key configured.')

    monkeypatch.setattr(wandb, 'init', refuse)
    with pytest.raises(ValueError, match=r'--wandb mine: No API key configured\. Or set WANDB_MODE=offline'):
        trackers.WandB(tmp_path, {'wandb': 'mine'})


@pytest.mark.draws
def test_training_alone_reads_no_validation_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import loaders

    original, asked = loaders.build_dataset, []
    monkeypatch.setattr(
        loaders, 'build_dataset', lambda split, *rest: asked.append(split) or original(split, *rest)
    )
    run(tmp_path, '--epochs', '1', '--eval_every', '0')
    assert asked == ['train'] and not (tmp_path / 'predictions.png').exists()
    with (tmp_path / 'metrics.csv').open() as file:
        assert 'test_AP' not in next(csv.DictReader(file))


def test_the_rehearsal_changes_nothing(tmp_path: Path) -> None:
    for name, flag in (('with', '--worst_batch_first'), ('without', '--no-worst_batch_first')):
        run(tmp_path / name, '--epochs', '1', flag)
    ours, theirs = load(tmp_path / 'with'), load(tmp_path / 'without')
    assert ours['args'].pop('worst_batch_first') != theirs['args'].pop('worst_batch_first')
    assert_same(ours, theirs)


def test_the_worst_batch_is_as_large_as_any_that_comes() -> None:
    data = shapes(40)
    (height, width), most = worst_batch(data, 2, one_size=False)
    drawn = [data[idx] for idx in range(len(data))]
    assert height >= max(image.shape[1] for image, _ in drawn)
    assert width >= max(image.shape[2] for image, _ in drawn)
    assert most >= max(len(target['labels']) for _, target in drawn)
    (height, width), _ = worst_batch(data, 2, one_size=True)
    assert height * width == max(
        math.prod(data.drawn_size(i, e, data.image_sizes()[i])) for e in range(4) for i in range(40)
    )


def test_the_worst_batch_has_the_objects_that_copy_paste_adds() -> None:
    for masks, expected in ((True, 20 + 20), (False, 20)):
        data = ShapesDetection(6, image_size=96, return_masks=masks)
        data.mix, data.most_objects = LargeScaleJitter(64, keep_masks=masks), 20
        assert worst_batch(data, 2, one_size=False) == ((64, 64), expected)
    data.return_masks, data.most_objects = True, 150
    assert worst_batch(data, 2, one_size=False)[1] == 150 + 99


def test_a_lack_of_memory_is_explained_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, criterion, _ = build_model(Namespace(**SMALLER | TRICKS))

    def lack(*args: object) -> None:
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(model.transformer, 'encode', lack)
    with pytest.raises(
        ValueError, match=r'4 images of 96 x 64 pixels with 7 objects each.*lower --batch_size'
    ):
        engine.try_largest_batch(model, criterion, Precision('off', torch.device('cpu')), 4, (96, 64), 7)


@pytest.mark.slow
@pytest.mark.parametrize('amp', [pytest.param('bf16', marks=pytest.mark.exhaustive), 'fp16'])
def test_a_run_in_16_bits_resumes(tmp_path: Path, amp: str) -> None:
    """The scale of fp16's gradients, too."""
    flags = ['--amp', amp, '--lr_drop', '2', '--eval_every', '2', '--shapes_train', '4', '--batch_size', '2']
    run(tmp_path / 'whole', *flags, '--epochs', '2')
    run(tmp_path / 'parts', *flags, '--epochs', '1')
    run(tmp_path / 'parts', *flags, '--epochs', '2', '--resume', 'auto')
    whole = load(tmp_path / 'whole')
    assert_same(whole, load(tmp_path / 'parts'))
    assert ('scaler' in whole) == (amp == 'fp16')
    assert all(value.dtype != torch.bfloat16 for value in whole['model'].values())


def test_a_metric_of_zero_counts_before_and_after_a_restart(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for epoch, numbers in enumerate(({'test_AP': 0.0}, {}, {'test_AP': 0.0}), start=1):
        log.append({'epoch': epoch} | numbers, {'epoch': epoch})
    for each in (log, RunLog(tmp_path, epochs_done=3)):
        assert each.best('test_AP') == 0 and each.evaluations_since_best('test_AP') == 1
    assert RunLog(tmp_path, epochs_done=2).evaluations_since_best('test_AP') == 0


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--batches size --dataset_file coco --train_ann shards.json', 'tar shards are streamed'),
        ('--batches size --aug lsj', 'this --aug mixes them'),
        ('--ema 1', '--ema must be less than 1, not 1'),
        ('--fsdp', '--fsdp shares a model among processes, and there is one'),
        ('--keep_checkpoints 0', '--keep_checkpoints must be at least 1'),
        ('--checkpoint_steps 0', '--checkpoint_steps must be at least 1'),
    ],
)
def test_impossible_options_get_one_clear_error(tmp_path: Path, flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *flags.split())


def test_states_of_the_optimizer_lie_in_memory_as_their_weights() -> None:
    """Wherever they come from: fused steps read both side by side, whatever their strides say."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    optimizer = engine.build_optimizer(conv, 1e-3, 1e-3, 0.0)
    optimizer.zero_grad()
    conv(torch.randn(1, 8, 6, 6)).square().mean().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    for state in saved['state'].values():
        state.update({name: state[name].contiguous() for name in ('exp_avg', 'exp_avg_sq')})
    load_optimizer_state(optimizer, saved)
    state = optimizer.state[conv.weight]
    assert state['exp_avg'].stride() == state['exp_avg_sq'].stride() == conv.weight.stride()
    assert torch.equal(state['exp_avg'], saved['state'][0]['exp_avg'])


@pytest.mark.parametrize(
    'flags', ['--lr_schedule cosine --warmup_steps 5', '--lr_drop_epochs 1 2 --warmup_steps 2']
)
def test_a_schedule_goes_on_in_the_middle(
    tmp_path: Path, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as a run that nobody interrupts, and the rates that the flags ask for."""
    rates = []
    original = engine.Precision.step

    def step(self: Precision, optimizer: torch.optim.Optimizer, *rest: object) -> tuple[bool, bool]:
        rates.append(optimizer.param_groups[0]['lr'])
        if len(rates) == 8 and stop:
            raise KeyboardInterrupt
        return original(self, optimizer, *rest)

    monkeypatch.setattr(engine.Precision, 'step', step)
    stop, given = False, ['--shapes_train', '6', '--batch_size', '2', *flags.split()]
    run(tmp_path / 'whole', *given)
    whole, stop = list(rates), True
    rates.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / 'parts', *given, '--checkpoint_steps', '1')
    stop = False
    run(tmp_path / 'parts', *given, '--checkpoint_steps', '1', '--resume', 'auto')
    ours, theirs = load(tmp_path / 'whole'), load(tmp_path / 'parts')
    for name in ('model', 'optimizer', 'lr_scheduler', 'rng'):
        assert_same(ours[name], theirs[name])
    texts = [(tmp_path / name / 'metrics.csv').read_text() for name in ('whole', 'parts')]
    assert texts[0] == texts[1]
    steps = 3  # of an epoch: 6 images in batches of 2
    warm, cosine = (5, True) if 'cosine' in flags else (2, False)
    for number, rate in enumerate(whole):
        shape = 0.5 * (1 + math.cos(math.pi * number / 9)) if cosine else 0.1 ** min(number // steps, 2)
        assert rate == pytest.approx(1e-3 * min(1, (number + 1) / warm) * shape)


def test_a_step_that_the_optimizer_did_not_make_counts_for_its_epoch_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when fp16 overflows. Warm-up and average wait for steps that are made, also over an interruption."""
    flags = '--epochs 2 --ema 0.5 --warmup_steps 3 --lr_drop 1 --checkpoint_steps 1 --eval_every 0'
    rates: list[float] = []
    original = engine.Precision.step

    def step(self: Precision, optimizer: torch.optim.Optimizer, *rest: object) -> tuple[bool, bool]:
        if len(rates) == stop:
            raise KeyboardInterrupt
        rates.append(optimizer.param_groups[0]['lr'])
        return (False, True) if len(rates) in (2, 3, 5) else original(self, optimizer, *rest)

    monkeypatch.setattr(engine.Precision, 'step', step)
    stop = 99
    run(tmp_path / 'whole', *flags.split())
    shape = [1 / 3, 2 / 3, 2 / 3, 0.2 / 3, 0.1, 0.1]  # three steps an epoch
    assert rates == pytest.approx([1e-3 * factor for factor in shape])
    rates.clear()
    stop = 5
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / 'parts', *flags.split())
    stop = 99
    run(tmp_path / 'parts', *flags.split(), '--resume', 'auto')
    assert rates == pytest.approx([1e-3 * factor for factor in shape])
    ours, theirs = load(tmp_path / 'whole'), load(tmp_path / 'parts')
    assert_same(ours, theirs)
    assert ours['ema_updates'] == 3 and ours['lr_scheduler'] == {'skipped': [1, 2, 4]}
    texts = [(tmp_path / name / 'metrics.csv').read_text() for name in ('whole', 'parts')]
    assert texts[0] == texts[1]


def test_official_schedules_go_on() -> None:
    """StepLR's and MultiStepLR's states, as official checkpoints hold them."""
    conv = nn.Conv2d(1, 1, 1)
    for official, expected in (
        (lambda x: torch.optim.lr_scheduler.StepLR(x, 3), [1, 1, 1, 0.1, 0.1, 0.1, 0.01]),
        (lambda x: torch.optim.lr_scheduler.MultiStepLR(x, [2, 5]), [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]),
    ):
        theirs = torch.optim.SGD(conv.parameters(), lr=0.5)
        checkpoint = {'lr_scheduler': official(theirs).state_dict(), 'args': {'lr': 0.5, 'lr_drop': 4}}
        args = settle(
            adopt(Namespace(lr=7.0, lr_drop=9), set(), extract_flags(checkpoint, resume=True), resume=True)
        )
        optimizer = torch.optim.SGD(conv.parameters(), lr=args.lr)
        drops = args.lr_drop_epochs or ()
        schedule = Schedule(optimizer, args.lr_schedule, args.epochs, args.lr_drop, drops, steps_per_epoch=2)
        for epoch, factor in enumerate(expected):
            schedule.move_to(2 * epoch + 1)
            assert optimizer.param_groups[0]['lr'] == pytest.approx(0.5 * factor), epoch
