"""
Train and evaluate detectors.

  python main.py --dataset_file shapes --output_dir output/first     built-in pictures, no download of data
  python main.py --coco_path DATA --conditional --output_dir OUT     any data in COCO form
  python main.py --coco_path DATA --eval --resume FILE               evaluate a checkpoint
"""

import argparse
import json
import random
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from datasets import DATASETS, build_dataset
from datasets.class_map import CLASS_IDS, ClassMap
from datasets.coco_eval import STAT_NAMES, CocoEvaluator, Summary
from datasets.samplers import AspectSampler, ChunkSampler, NodeSampler
from datasets.transforms import AUGMENTATIONS, LSJ_SIZE
from engine import build_optimizer, draw_predictions, evaluate, train_one_epoch
from models import add_model_args, build_model, family_default, resolve_args
from models.ops.functions import describe as describe_kernels
from models.training.ledger import ledger_text, supervision_table
from util.checkpoint import get_rng_state, load_checkpoint, read_checkpoint, save_checkpoint, set_rng_state
from util.dist import (
    all_gather_object,
    choose_device,
    get_local_rank,
    get_local_size,
    get_rank,
    get_world_size,
    init_distributed,
    is_main_process,
    leave_distributed,
)
from util.files import save_atomically
from util.logger import RunLog, format_time, import_summary_writer, say
from util.nested_tensor import collate_fn
from util.plan import print_plan
from util.visualize import plot_curves


def get_args_parser() -> argparse.ArgumentParser:
    """All flags: data, training, evaluation and files here, the model's from `models.add_model_args`."""
    parser = argparse.ArgumentParser(
        usage='python main.py [flags]',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group('data')
    data.add_argument('--dataset_file', default='coco', choices=DATASETS,
                      help='coco: any data in COCO form; shapes: built-in pictures, drawn as they are needed '
                           '(default: %(default)s)')  # fmt: skip
    data.add_argument('--coco_path', metavar='DIR',
                      help='folder with annotations/instances_{train,val}2017.json and {train,val}2017/ or '
                           'images/{train,val}2017/ (2017 may be missing)')  # fmt: skip
    for split in ('train', 'val'):
        data.add_argument(
            f'--{split}_images', metavar='DIR', help=f'{split} pictures, instead of --coco_path'
        )
        data.add_argument(
            f'--{split}_ann', metavar='FILE', help=f'{split} annotations, instead of --coco_path'
        )
    data.add_argument('--class_ids', default='auto', choices=CLASS_IDS,
                      help="class indices of a model. auto: COCO's 91 ids for COCO, 0 to K-1 in order of id for other data; "
                           'contiguous: 0 to K-1 for COCO too, 80 classes (default: %(default)s)')  # fmt: skip
    data.add_argument('--img_size', default=800, type=int,
                      help='shorter side of a picture, pixels, at evaluation; the scales of training shrink and grow with '
                           'it (default: %(default)s)')  # fmt: skip
    data.add_argument('--max_size', type=int,
                      help='longest side of a picture, pixels (default: 1333, in proportion to --img_size)')  # fmt: skip
    data.add_argument('--aug', default='detr', choices=AUGMENTATIONS,
                      help='training pictures. detr: flipped, scaled and cropped; flip: only flipped; none: as at evaluation; '
                           "co_detr: as detr by mmdetection's rules of resizing and its choice of objects, at evaluation "
                           'too; lsj: large-scale jitter in a square and, where objects have masks, copy-paste '
                           '(default: %(default)s)')  # fmt: skip
    data.add_argument('--lsj_size', default=LSJ_SIZE, type=int,
                      help='side of the squares of --aug lsj, pixels, instead of --img_size and --max_size '
                           '(default: %(default)s)')  # fmt: skip
    data.add_argument(
        '--shapes_train', default=4000, type=int, help='built-in training pictures (default: %(default)s)'
    )
    data.add_argument(
        '--shapes_val', default=200, type=int, help='built-in validation pictures (default: %(default)s)'
    )
    data.add_argument('--shapes_size', default=128, type=int,
                      help='longer side of a built-in picture, pixels (default: %(default)s)')  # fmt: skip
    data.add_argument(
        '--num_workers', default=2, type=int, help='loader processes a process (default: %(default)s)'
    )

    data.add_argument('--group_aspect_ratio', action='store_true',
                      help='training batches of pictures that are all wider than high, or all not')  # fmt: skip
    data.add_argument('--cache_mode', action='store_true',
                      help='keep the picture files in memory, compressed; each process of a machine its own share')  # fmt: skip

    train = parser.add_argument_group('training')
    train.add_argument('--lr', type=float, help=f'learning rate (default: {family_default("lr")})')
    train.add_argument('--lr_backbone', type=float,
                       help=f'learning rate of the backbone; 0 freezes it (default: {family_default("lr_backbone")})')  # fmt: skip
    train.add_argument('--lr_backbone_names', nargs='+', metavar='PART',
                       help='parameters that count as the backbone have one of these in their names '
                            f'(default: {family_default("lr_backbone_names")})')  # fmt: skip
    train.add_argument('--lr_linear_proj_names', nargs='*', metavar='PART',
                       help='parameters that learn at --lr times --lr_linear_proj_mult '
                            f'(default: {family_default("lr_linear_proj_names")})')  # fmt: skip
    train.add_argument(
        '--lr_linear_proj_mult', default=0.1, type=float, help='see above (default: %(default)s)'
    )
    train.add_argument('--sgd', action='store_true', help='SGD with momentum 0.9 instead of AdamW')
    train.add_argument(
        '--batch_size', default=2, type=int, help='pictures a process at a time (default: %(default)s)'
    )
    train.add_argument('--accum_steps', default=1, type=int,
                       help='batches whose gradients make one optimizer step, as if they were one batch (but for the averages of '
                            '--co_aux_heads; default: %(default)s)')  # fmt: skip
    train.add_argument('--total_batch_size', type=int,
                       help='pictures an optimizer step, all processes together; sets --accum_steps')  # fmt: skip
    train.add_argument('--weight_decay', default=1e-4, type=float, help='(default: %(default)s)')
    train.add_argument('--epochs', type=int, help=f'(default: {family_default("epochs")})')
    train.add_argument('--lr_drop', type=int,
                       help=f'epochs after which the learning rate is divided by 10 (default: {family_default("lr_drop")})')  # fmt: skip
    train.add_argument('--lr_drop_epochs', nargs='+', type=int, metavar='EPOCH',
                       help='divide the learning rate by 10 after each of these, instead of every --lr_drop')  # fmt: skip
    train.add_argument('--clip_max_norm', default=0.1, type=float,
                       help='largest norm of the gradient, 0 = any (default: %(default)s)')  # fmt: skip

    evaluation = parser.add_argument_group('evaluation')
    evaluation.add_argument(
        '--eval', action='store_true', help='evaluate --resume or --pretrained, then stop'
    )
    evaluation.add_argument('--eval_every', default=1, type=int,
                            help='epochs between evaluations; the last is always evaluated (default: %(default)s)')  # fmt: skip
    evaluation.add_argument('--coco_eval', default='auto', choices=('auto', 'hotcoco', 'pycocotools'),
                            help='who computes COCO metrics; auto: hotcoco if it is there (default: %(default)s)')  # fmt: skip

    run = parser.add_argument_group('run')
    run.add_argument('--output_dir', default='', metavar='DIR',
                     help='checkpoints, metrics.csv, log.jsonl and pictures; nothing is written without it')  # fmt: skip
    run.add_argument('--resume', default='', metavar='FILE',
                     help='go on with this checkpoint (path or address): weights, optimizer, schedule, random numbers; '
                          'auto = the one in --output_dir, if any')  # fmt: skip
    run.add_argument('--pretrained', default='', metavar='FILE',
                     help='start from these weights (path or address); heads of another number of classes start anew')  # fmt: skip
    run.add_argument('--save_every', type=int,
                     help=f'epochs between checkpoints that are kept (default: {family_default("save_every")})')  # fmt: skip
    run.add_argument(
        '--device',
        default='auto',
        help='cuda, mps, cpu; auto takes the first there is (default: %(default)s)',
    )
    run.add_argument('--seed', default=42, type=int, help='of all random numbers (default: %(default)s)')
    run.add_argument(
        '--print_freq', default=10, type=int, help='steps between two progress lines (default: %(default)s)'
    )
    run.add_argument('--tensorboard', action='store_true', help='write TensorBoard events into --output_dir')
    run.add_argument('--dist_url', default='env://', help='where processes meet (default: %(default)s)')

    add_model_args(parser)
    return parser


@dataclass
class Run:
    """What the epoch loop works with."""

    args: Namespace
    model: nn.Module  # possibly wrapped for several processes
    criterion: nn.Module
    postprocessors: dict[str, nn.Module]
    datasets: dict[str, Dataset]
    loaders: dict[str, DataLoader]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    @property
    def bare_model(self) -> nn.Module:
        return getattr(self.model, 'module', self.model)


def main(args: Namespace) -> None:
    args = resolve_args(args)
    device = choose_device(args.device)
    init_distributed(device, args.dist_url)
    check_run_args(args)
    checkpoint = find_checkpoint(args)
    seed_everything(args.seed + get_rank())

    class_map = ClassMap.from_dict(checkpoint['class_map']) if 'class_map' in checkpoint else None
    datasets = build_datasets(args, class_map)
    args.num_classes = datasets['val'].class_map.num_classes
    if checkpoint:
        args.backbone_weights = 'none'  # the checkpoint holds the backbone
    model, criterion, postprocessors = build_model(args)
    if checkpoint:
        report = load_checkpoint(
            model,
            checkpoint,
            resize=not (args.resume or args.eval),
            resume=bool(args.resume) and not args.eval,
        )
        say(f'{args.resume or args.pretrained}: {report}')
    model.to(device)
    loaders = {split: build_loader(dataset, split, args) for split, dataset in datasets.items()}
    optimizer = build_optimizer(
        model,
        args.lr,
        args.lr_backbone,
        args.weight_decay,
        args.lr_backbone_names,
        args.lr_linear_proj_names,
        args.lr_linear_proj_mult,
        args.sgd,
    )
    scheduler = build_scheduler(optimizer, args)
    if get_world_size() > 1:
        model = nn.parallel.DistributedDataParallel(model)
    run = Run(args, model, criterion, postprocessors, datasets, loaders, optimizer, scheduler)
    first_epoch = restore(run, checkpoint) if args.resume and not args.eval else 0
    if is_main_process():
        notes = {'kernels': describe_kernels(device.type)} if args.family == 'deformable' else {}
        if not args.eval:
            if args.aug == 'lsj' and not datasets['train'].return_masks:
                notes['copy-paste'] = 'none, since there are objects without a segmentation'
            table = supervision_table(criterion.table, run.bare_model.num_queries, criterion.weight_dict)
            notes['supervision'] = table
        print_plan(args, run.bare_model, datasets, loaders, optimizer, scheduler, notes)
    if args.eval:
        evaluate_alone(run)
    else:
        train(run, first_epoch, checkpoint)
    leave_distributed()


def train(run: Run, first_epoch: int, checkpoint: dict) -> None:
    """The epoch loop. checkpoint: what is resumed, if first_epoch is not 0."""
    args, folder = run.args, Path(run.args.output_dir) if run.args.output_dir else None
    log = RunLog(folder, first_epoch - 1) if folder else None
    board = import_summary_writer()(folder) if args.tensorboard and is_main_process() else None
    if log and first_epoch > 0 and 'metrics' in checkpoint and not log.has_epoch(first_epoch - 1):
        # The run stopped between saving this epoch and logging it.
        finish_epoch(run, first_epoch - 1, checkpoint['metrics'], log, board)
    if first_epoch >= args.epochs:
        say(f'all {args.epochs} epochs are done; raise --epochs to train longer')
    for epoch in range(first_epoch, args.epochs):
        start = time.perf_counter()
        run.loaders['train'].sampler.set_epoch(epoch)
        run.datasets['train'].set_epoch(epoch)
        lr, lr_backbone = (group['lr'] for group in run.optimizer.param_groups[:2])
        averages = train_one_epoch(
            run.model,
            run.criterion,
            run.loaders['train'],
            run.optimizer,
            title=f'epoch {epoch + 1}/{args.epochs}',
            max_norm=args.clip_max_norm,
            accum_steps=args.accum_steps,
            print_freq=args.print_freq,
        )
        run.scheduler.step()
        metrics = {'epoch': epoch, 'lr': lr, 'lr_backbone': lr_backbone}
        metrics |= {f'train_{name}': value for name, value in averages.items()}
        if folder:
            save(run, folder, epoch, metrics)
        finish_epoch(run, epoch, metrics, log, board, time.perf_counter() - start)


def restore(run: Run, checkpoint: dict) -> int:
    """Optimizer, schedule and random numbers of a checkpoint. Returns the epoch to go on with.

    Files that hold weights only (official ones) start at epoch 0.
    """
    if 'optimizer' not in checkpoint:
        return 0
    run.optimizer.load_state_dict(checkpoint['optimizer'])
    run.scheduler.load_state_dict(checkpoint['lr_scheduler'])
    states = checkpoint.get('rng', [])
    if len(states) == get_world_size():
        set_rng_state(states[get_rank()])
    else:  # another number of processes, or an official file: repeatable, though not as if undisturbed
        seed_everything(run.args.seed + get_rank() + 1000 * (checkpoint['epoch'] + 1))
    return checkpoint['epoch'] + 1


def save(run: Run, folder: Path, epoch: int, metrics: dict) -> None:
    """`checkpoint.pth`, and a copy that stays at learning-rate drops and every --save_every epochs."""
    args, rng = run.args, all_gather_object(get_rng_state())
    if not is_main_process():
        return
    checkpoint = {
        'model': run.bare_model.state_dict(),
        'optimizer': run.optimizer.state_dict(),
        'lr_scheduler': run.scheduler.state_dict(),
        'epoch': epoch,
        'args': vars(args),
        'class_map': run.datasets['train'].class_map.to_dict(),
        'rng': rng,
        'metrics': metrics,
    }
    save_checkpoint(folder / 'checkpoint.pth', checkpoint)
    drops = epoch + 1 in args.lr_drop_epochs if args.lr_drop_epochs else (epoch + 1) % args.lr_drop == 0
    if drops or (epoch + 1) % args.save_every == 0:
        save_checkpoint(folder / f'checkpoint{epoch:04}.pth', checkpoint)


def finish_epoch(
    run: Run, epoch: int, metrics: dict, log: RunLog | None, board: object | None, seconds: float = 0.0
) -> None:
    """Evaluate if it is time, and write what is known about the epoch."""
    args, row, record = run.args, dict(metrics), dict(metrics)
    evaluated = (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs
    summary = evaluate_once(run, f'epoch {epoch + 1}/{args.epochs} evaluate') if evaluated else None
    row |= {f'test_{name}': summary.stats[i] if summary else None for i, name in enumerate(STAT_NAMES)}
    if summary:
        record |= {'test_coco_eval_bbox': summary.stats, 'per_class': summary.per_class}
    record |= {
        'pictures': len(run.loaders['train'].sampler) * get_world_size(),
        'train_seconds': round(seconds, 2),
    }
    if log:
        log.append(row, record)
        if summary and is_main_process():
            plot_curves(log.csv_path.with_name('curves.png'), log.csv_path)
    if board:
        for name, value in row.items():
            if value is not None:
                board.add_scalar(name, value, epoch)
        board.flush()
    ap = f'  AP {summary.stats[0]:.3f}  AP50 {summary.stats[1]:.3f}' if summary else ''
    say(f'epoch {epoch + 1}/{args.epochs}: loss {row["train_loss"]:.4g}{ap}  {format_time(seconds)}')
    if text := ledger_text(metrics):
        say(f'  {text}')


def evaluate_once(run: Run, title: str = 'evaluate') -> Summary:
    """Metrics of the validation pictures, printed; drawn predictions go to the output folder."""
    dataset = run.datasets['val']
    evaluator = CocoEvaluator(dataset.ground_truth, dataset.class_map, backend=run.args.coco_eval)
    summary = evaluate(run.model, run.postprocessors, run.loaders['val'], evaluator, title)['bbox']
    if is_main_process():
        print(summary.table(), flush=True)
        if run.args.output_dir:
            draw_predictions(
                run.bare_model, run.postprocessors, dataset, Path(run.args.output_dir) / 'predictions.png'
            )
    return summary


def evaluate_alone(run: Run) -> None:
    """--eval: the metrics also go to `eval.json`."""
    summary = evaluate_once(run)
    if run.args.output_dir and is_main_process():
        record = {'test_coco_eval_bbox': summary.stats, 'per_class': summary.per_class}
        text = json.dumps(record, indent=1)
        save_atomically(Path(run.args.output_dir) / 'eval.json', lambda path: path.write_text(text))


def build_datasets(args: Namespace, class_map: ClassMap | None) -> dict[str, Dataset]:
    """Training and validation pictures, with the same class indices; validation only for --eval.

    class_map: that of the checkpoint in use, None if it has none. ValueError: --resume of a checkpoint with
    other classes.
    """
    if args.eval:
        datasets = {'val': build_dataset('val', args, class_map)}
    else:
        train = build_dataset('train', args)
        datasets = {'train': train, 'val': build_dataset('val', args, train.class_map)}
    found = datasets['val'].class_map
    if (args.resume or args.eval) and class_map is not None and class_map != found:
        if {*class_map.names, None} == {*found.names, None}:
            raise ValueError(
                f'{args.resume or args.pretrained} numbers its classes otherwise ({class_map.num_classes} class indices, here '
                f'{found.num_classes}): give the --class_ids of its run'
            )
        raise ValueError(
            f'{args.resume or args.pretrained} was trained on {describe(class_map)}, the data has {describe(found)}: evaluate it on its own '
            'data, or fine-tune it on this data with --pretrained'
        )
    return datasets


def describe(class_map: ClassMap) -> str:
    names = [name for name in class_map.names if name is not None]
    return f'{len(names)} classes ({", ".join(names[:5])}{", ..." if len(names) > 5 else ""})'


def build_scheduler(
    optimizer: torch.optim.Optimizer, args: Namespace
) -> torch.optim.lr_scheduler.LRScheduler:
    if args.lr_drop_epochs:
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, args.lr_drop_epochs)
    return torch.optim.lr_scheduler.StepLR(optimizer, args.lr_drop)


def build_loader(dataset: Dataset, split: str, args: Namespace) -> DataLoader:
    """Batches of a data set; this process's share of them."""
    train = split == 'train'
    loader = DataLoader(
        dataset,
        args.batch_size,
        sampler=build_sampler(dataset, train, args),
        drop_last=train,
        num_workers=args.num_workers,
        collate_fn=collate_fn,
        persistent_workers=args.num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, so that loading draws nothing from the run's random numbers
    )
    if train and len(loader) < args.accum_steps:
        pictures = args.batch_size * args.accum_steps * get_world_size()
        raise ValueError(
            f'{len(dataset)} training pictures do not fill one step of {pictures}: lower --batch_size, --accum_steps '
            'or --total_batch_size'
        )
    return loader


def build_sampler(dataset: Dataset, train: bool, args: Namespace) -> Sampler[int]:
    """This process's pictures of an epoch."""
    place, share = (get_world_size(), get_rank()), (0, 1)
    if args.cache_mode:
        share = get_local_rank(), get_local_size()
        dataset.keep_files(*share)
    if train and args.group_aspect_ratio:
        return AspectSampler(dataset.picture_sizes(), args.batch_size, *place, *share, seed=args.seed)
    if args.cache_mode:
        return NodeSampler(dataset, *place, *share, train, args.seed)
    if train:
        drop_last = get_world_size() > 1
        return DistributedSampler(dataset, *place, shuffle=True, seed=args.seed, drop_last=drop_last)
    return ChunkSampler(dataset, *place, shuffle=False)


def check_run_args(args: Namespace) -> None:
    """Refuse impossible combinations, and settle --accum_steps."""
    if args.tensorboard:
        import_summary_writer()
    if args.eval and not (args.resume or args.pretrained):
        raise ValueError('--eval needs weights: add --resume FILE (or --pretrained FILE)')
    if args.resume and args.pretrained and args.resume != 'auto':
        raise ValueError('--resume goes on with a run, --pretrained starts one: give one of them')
    if args.resume == 'auto' and not args.output_dir:
        raise ValueError('--resume auto looks into --output_dir: give it')
    if args.tensorboard and not args.output_dir:
        raise ValueError('--tensorboard writes into --output_dir: give it')
    if args.cache_mode and args.aug == 'lsj' and get_local_size() > 1:
        raise ValueError(
            '--aug lsj mixes any two pictures, but with --cache_mode a process keeps only its share: leave one out'
        )
    if args.cache_mode and args.dataset_file == 'shapes':
        raise ValueError('--cache_mode keeps picture files; built-in pictures have none: leave it out')
    positive = ('batch_size', 'accum_steps', 'epochs', 'lr_drop', 'eval_every', 'save_every', 'img_size')
    for flag in (*positive, 'lsj_size', 'shapes_train', 'shapes_val', 'shapes_size'):
        if getattr(args, flag) < 1:
            raise ValueError(f'--{flag} must be at least 1, not {getattr(args, flag)}')
    if args.total_batch_size is not None:
        at_a_time = args.batch_size * get_world_size()
        if args.total_batch_size < 1 or args.total_batch_size % at_a_time:
            raise ValueError(
                f'--total_batch_size {args.total_batch_size} is not a multiple of --batch_size {args.batch_size} x '
                f'{get_world_size()} processes'
            )
        args.accum_steps = args.total_batch_size // at_a_time


def find_checkpoint(args: Namespace) -> dict:
    """The checkpoint named by --resume or --pretrained, {} if none; creates the output folder.

    ValueError: the output folder holds another run, which would be overwritten.
    """
    if args.output_dir:
        existing = Path(args.output_dir) / 'checkpoint.pth'
        if args.resume == 'auto':
            args.resume = str(existing) if existing.is_file() else ''
            if args.eval and not args.resume:
                raise ValueError(f'there is no checkpoint at {existing} to evaluate')
        elif (
            existing.is_file()
            and not args.eval
            and not (args.resume and Path(args.resume).resolve() == existing.resolve())
        ):
            raise ValueError(
                f'{args.output_dir} holds the checkpoint of a run: add --resume auto to go on with it, or choose another '
                '--output_dir'
            )
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    source = args.resume or args.pretrained
    return read_checkpoint(source) if source else {}


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f'error: {error}')
