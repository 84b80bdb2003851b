"""
Train and evaluate detectors.

  python main.py --dataset_file shapes --output_dir output/first     built-in images, no download of data
  python main.py --coco_path DATA --conditional --output_dir OUT     any data in COCO form
  python main.py --coco_path DATA --eval --resume FILE               evaluate a checkpoint
  python main.py --coco_path DATA --eval --model detr_resnet50       evaluate published weights
"""

from util.config.parser import make_parser

# Before PyTorch is imported, which takes seconds: --help and mistyped flags are answered at once.
if __name__ == '__main__':
    make_parser(__doc__).parse_args()

import json
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Dataset

from datasets.augmentations import build_augmentation
from datasets.class_map import PANOPTIC_CLASSES, ClassMap
from datasets.coco_eval import LVIS_NAMES, STAT_NAMES, CocoEvaluator, Summary, record_of, tables
from datasets.inventory import check_data, print_inventory
from datasets.loaders import begin_epoch, build_datasets, build_loader, check_steps, worst_batch
from engine import (
    build_scheduler,
    describe_rates,
    draw_predictions,
    evaluate,
    optimizer_of,
    rates_at,
    rehearse,
    train_one_epoch,
)
from models import build_model, check_backbone, level_strides
from models.detector import class_map_of, shared_classes
from models.ops.functions import describe as describe_kernels
from models.parts import all_parts, compile_parts
from models.segmentation import freeze_all_but_masks
from models.structures import Prediction
from models.training import coefficients
from models.training.report import statistics_text, supervision_table
from util.black_box import BlackBox
from util.checkpoint import check_frozen, flags_of_run, load_checkpoint
from util.config.declare import RUN
from util.config.recipes import with_named_flags
from util.config.recorded import adopt, as_json, changes_text, data_of
from util.config.settle import EVERYTHING, Settled, check_processes, settle
from util.distributed.collectives import (
    all_gather_object,
    check_agreement,
    choose_device,
    fail_together,
    get_rank,
    get_world_size,
    init_distributed,
    is_main_process,
    leave_distributed,
)
from util.distributed.heartbeat import Heartbeat
from util.distributed.parallel import broadcast_from_main, replicate, shard
from util.distributed.preemption import Interrupted, StopRequests, was_restarted
from util.ema import WeightAverage
from util.errors import FileError, UserError
from util.files import (
    code_checksum,
    lock_folder,
    make_folder,
    or_warn,
    remove_partial_files,
    save_atomically,
    unlock,
)
from util.flags import HTTP_ALLOWED, FlagParser, given_of, run_command
from util.logger import RunLog, format_time, print_main
from util.plan import COCO_TRAIN_IMAGES, FLOPS_SIZE, LVIS_TRAIN_IMAGES, flops_text, print_dry_run, print_plan
from util.precision import Precision, avoid_plans_per_shape, set_tf32
from util.run_entries import check_entries
from util.run_state import (
    EpochState,
    Run,
    find_checkpoint,
    keep_copy,
    keep_numbered,
    restore,
    save,
    set_step,
)
from util.seeding import seed_everything
from util.trackers import Tracker, check_trackers, trackers_of
from util.visualize import plot_curves
from util.weight_files import read_checkpoint


def get_args_parser() -> FlagParser:
    """Return the parser of all flags; `--help TOPIC` shows them by topic."""
    return make_parser(__doc__)


def main(args: Namespace) -> None:
    args = with_named_flags(args)
    HTTP_ALLOWED.set(args.allow_http)
    if args.dry_run or args.check_data:
        init_distributed(torch.device('cpu'), args.dist_url)
        with fail_together():
            args, _ = configure(args)
            if is_main_process():
                dry_run(args, check_data(args, level_strides(args)[0]) if args.check_data else None)
        leave_distributed()
        return
    device = choose_device(args.device)
    avoid_plans_per_shape()
    init_distributed(device, args.dist_url)
    heartbeat, stops = Heartbeat(), StopRequests(device)
    try:
        with one_run_a_folder(args):
            args, checkpoint, datasets = read_data(args)
            set_tf32(args.tf32)
            heartbeat.start()  # not before: while a large annotation file is read, no other thread runs
            run, first_epoch, state = set_up(args, device, stops, checkpoint, datasets)
            if args.eval:
                evaluate_alone(run)
            else:
                train(run, first_epoch, state, checkpoint)
    except Interrupted as stop:
        heartbeat.stop()
        stops.leave(*stop.args)
    except BaseException as error:
        heartbeat.fail(error)
        raise
    finally:
        stops.close()
    heartbeat.stop()
    leave_distributed()


def configure(args: Namespace, restarted: bool = False) -> tuple[Settled, dict]:
    """Settle all flags, those of the checkpoint in use included; return them and the checkpoint ({} if there is none).

    restarted: this process takes the place of one that was preempted.

    Raises:
        UserError: flags contradict each other or the checkpoint, or it cannot be read.
    """
    given = given_of(args)
    settle(args, (RUN,))  # what is wrong already, before a large file is read
    found, source = find_checkpoint(args, restarted)
    if args.dry_run and not Path(source).is_file():
        source = ''  # nothing is fetched
    checkpoint = read_checkpoint(source) if source else {}
    resume = bool(found) and not args.eval
    check_entries(checkpoint, source, resume)
    args = Namespace(**vars(args) | {'resume': found})
    if recorded := flags_of_run(checkpoint, resume):
        try:
            args = adopt(args, given, recorded, resume, strict=resume or args.eval)
        except UserError as error:
            raise UserError(f'{source}: {error}') from error
        if args.eval and 'class_map' in checkpoint:  # a run of this program
            args = Namespace(**vars(args) | data_of(args, given, recorded))
    settled = settle(args, EVERYTHING)
    check_trackers(settled)
    settled = settled.but(accum_steps=check_processes(settled, get_world_size()))
    if resume and (text := changes_text(settled, recorded)):
        print_main(f'{settled.resume} goes on with other flags: {text}')
    return settled, checkpoint


@contextmanager
def one_run_a_folder(args: Namespace) -> Iterator[None]:
    """Lock --output_dir for this run.

    Raises:
        UserError: another run holds it.
    """
    with fail_together():
        lock = None
        if args.output_dir and not args.eval and is_main_process():
            make_folder(args.output_dir)
            lock = lock_folder(args.output_dir)
            remove_partial_files(args.output_dir)
    try:
        yield
    finally:
        unlock(lock)


def read_data(args: Namespace) -> tuple[Settled, dict, dict[str, Dataset]]:
    """Return settled flags, the checkpoint in use ({} if there is none) and the data sets.

    Raises:
        UserError: flags, checkpoint or data are wrong, or the processes disagree about them.
    """
    check_agreement(facts_of(args))
    restarted = any(all_gather_object(was_restarted()))
    with fail_together():
        args, checkpoint = configure(args, restarted)
        check_backbone(args)
        seed_everything(args.seed + get_rank())
        class_map = ClassMap.from_dict(checkpoint['class_map']) if 'class_map' in checkpoint else None
        if args.eval and class_map is None and checkpoint:
            found = class_map_of(checkpoint, args.resume or args.pretrained)
            class_map = found if found.num_classes == PANOPTIC_CLASSES else None
        datasets = build_datasets(args, class_map)
        if is_main_process():
            print_inventory(datasets, args, level_strides(args)[0])
    facts = {f'{split} data': dataset.summary for split, dataset in datasets.items()}
    images = checkpoint.get('within_epoch', {}).get('images', 0)
    found = f'epoch {checkpoint.get("epoch")}, {images} images further' if checkpoint else 'none'
    check_agreement(facts | {'the checkpoint': found})  # a folder that is not shared, for instance
    num_classes = list(datasets.values())[-1].class_map.num_classes
    # A checkpoint holds the backbone.
    args = args.but(num_classes=num_classes, **({'backbone_weights': 'none'} if checkpoint else {}))
    return args, checkpoint, datasets


def set_up(
    args: Settled, device: torch.device, stops: StopRequests, checkpoint: dict, datasets: dict[str, Dataset]
) -> tuple[Run, int, EpochState]:
    """Build everything that a run needs; return it, the epoch to begin with, and how far that epoch has come."""
    model, criterion, postprocessors = build_model(args)
    if checkpoint:
        name, fresh = args.resume or args.pretrained or args.frozen_weights, not (args.resume or args.eval)
        shared = shared_classes(checkpoint, list(datasets.values())[-1].class_map) if fresh else None
        resume = bool(args.resume) and not args.eval
        report = load_checkpoint(model, checkpoint, resize=fresh, resume=resume, name=name, classes=shared)
        print_main(f'{name}: {report}')
        if args.frozen_weights and not (args.resume or args.eval):
            check_frozen(report)
    if args.frozen_weights:
        freeze_all_but_masks(model)
    model.to(device)
    broadcast_from_main([*model.parameters(), *model.buffers()])
    average = WeightAverage(model, args.ema, args.ema_warmup) if args.ema and not args.eval else None
    flops = flops_text(model, list(datasets.values())[-1]) if is_main_process() else ''
    if args.compile:
        compile_parts(model)
    if args.fsdp:
        shard(model, all_parts(model), [Prediction])
        if average:
            shard(average.module, all_parts(average.module))
    loading = (args.batch_size, args.num_workers, args.batches, args.seed)
    loaders = {part: build_loader(dataset, part, *loading) for part, dataset in datasets.items()}
    if not args.eval:
        check_steps(loaders['train'], len(datasets['train']), args.batch_size, args.accum_steps)
    precision = Precision(args.amp, device)
    if not args.eval and (
        device.type == 'cuda' if args.worst_batch_first is None else args.worst_batch_first
    ):
        worst = worst_batch(datasets['train'], args.batch_size, args.batches == 'size')
        rehearse(model, criterion, precision, args.batch_size, *worst)
    optimizer = optimizer_of(model, args)
    steps_per_epoch = 1 if args.eval else len(loaders['train']) // args.accum_steps
    scheduler = build_scheduler(optimizer, args, steps_per_epoch)
    if get_world_size() > 1 and not args.fsdp:
        model = replicate(model, [Prediction], args.accum_steps)
    run = Run(
        args=args,
        model=model,
        criterion=criterion,
        postprocessors=postprocessors,
        datasets=datasets,
        loaders=loaders,
        optimizer=optimizer,
        scheduler=scheduler,
        precision=precision,
        average=average,
        stops=stops,
    )
    first_epoch, state = restore(run, checkpoint) if args.resume and not args.eval else (0, EpochState())
    if is_main_process():
        notes = {'FLOPs': flops} | plan_notes(run, device)
        print_plan(args, run.bare_model, datasets, loaders, describe_rates(args, scheduler), notes)
    return run, first_epoch, state


def facts_of(args: Namespace) -> dict[str, object]:
    """Return what all processes must agree on before they begin."""
    own = ('device', 'num_workers')
    facts = {f'--{flag}': value for flag, value in vars(args).items() if flag not in own}
    return facts | {'PyTorch': torch.__version__, 'the code': code_checksum(Path(__file__).parent)}


def plan_notes(run: Run, device: torch.device) -> dict[str, str]:
    args = run.args
    notes = {'kernels': describe_kernels(device.type)} if args.family == 'deformable' else {}
    if not args.eval:
        if run.datasets['train'].mix is not None and not run.datasets['train'].return_masks:
            notes['copy-paste'] = 'none, since there are objects without a segmentation'
        notes['supervision'] = supervision_table(
            run.criterion.table, run.bare_model.num_queries, run.criterion.weight_dict
        )
    return notes


def train(run: Run, first_epoch: int, state: EpochState, checkpoint: dict) -> None:
    """Run the epoch loop.

    Args:
        state: how far the first epoch has come.
        checkpoint: the resumed checkpoint, {} for a new run.
    """
    args, folder = run.args, Path(run.args.output_dir) if run.args.output_dir else None
    log = RunLog(folder, first_epoch) if folder else None
    trackers = trackers_of(folder, args) if folder and is_main_process() else []
    if log and first_epoch > 0 and 'metrics' in checkpoint and not log.has_epoch(first_epoch):
        # The run stopped between saving this epoch and logging it, or goes on in another folder.
        if Path(args.resume).resolve() != (folder / 'checkpoint.pth').resolve():
            save(run, folder, first_epoch - 1, checkpoint['metrics'])
        keep_numbered(run, folder, first_epoch - 1)
        finish_epoch(run, first_epoch - 1, checkpoint['metrics'], log, trackers)
    if first_epoch >= args.epochs:
        print_main(f'all {args.epochs} epochs are done; raise --epochs to train longer')
    if state.step:
        print_main(f'epoch {first_epoch + 1} goes on after step {state.step} of {run.steps_an_epoch}')
    if folder and is_main_process():
        with or_warn():
            save_atomically(folder / 'flags.json', lambda path: path.write_text(as_json(args)))
    black_box, saved = BlackBox(folder, args.bad_steps, args), True
    for epoch in range(first_epoch, args.epochs):
        if log and args.patience and log.evaluations_since_best('test_AP') >= args.patience:
            print_main(f'no better AP in {args.patience} evaluations: stopping after {epoch} epochs')
            break
        start = time.perf_counter()
        begin_epoch(run.loaders['train'], epoch, state.step * args.accum_steps)
        lr, lr_backbone, *_ = rates_at(run.scheduler, epoch * run.steps_an_epoch)
        averages = train_one_epoch(
            run.model,
            run.criterion,
            run.loaders['train'],
            run.optimizer,
            title=f'epoch {epoch + 1}/{args.epochs}',
            max_norm=args.clip_max_norm,
            accum_steps=args.accum_steps,
            print_freq=args.print_freq,
            precision=run.precision,
            state=state,
            after_step=partial(after_step, run, folder, epoch),
            black_box=black_box,
        )
        metrics = {'epoch': epoch + 1, 'lr': lr, 'lr_backbone': lr_backbone}
        metrics |= {f'train_{name}': value for name, value in averages.items()}
        saved = folder is None or save(run, folder, epoch, metrics)
        if folder and saved:
            keep_numbered(run, folder, epoch)
        finish_epoch(run, epoch, metrics, log, trackers, time.perf_counter() - start, saved)
        state = EpochState()
    if not saved:
        raise FileError(
            f'{folder}/checkpoint.pth is not that of the last epoch: free some space, and go on with --resume auto'
        )


def after_step(run: Run, folder: Path | None, epoch: int, state: EpochState, made: bool) -> None:
    """Move the schedule, update the EMA, save every --checkpoint_steps, and stop if a signal asked for it.

    made: the optimizer made this step; EMA and warm-up do not count others, while epochs count their images.
    """
    schedule, steps_done = run.scheduler.lr_lambdas[0], epoch * run.steps_an_epoch + state.step
    if not made:
        schedule.left_out.append(steps_done - 1)
    elif run.average is not None:
        run.average.update(run.bare_model)
    set_step(run.scheduler, steps_done)
    steps = run.args.checkpoint_steps
    due = folder is not None and steps is not None and state.step % steps == 0
    if due and state.step < run.steps_an_epoch:
        save(run, folder, epoch - 1, within=state)
    try:
        run.stops.check()
    except Interrupted:
        if folder and save(run, folder, epoch - 1, within=state):
            print_main(f'asked to stop: saved after step {state.step} of epoch {epoch + 1}')
        raise


def finish_epoch(
    run: Run,
    epoch: int,
    metrics: dict,
    log: RunLog | None,
    trackers: list[Tracker],
    seconds: float = 0.0,
    saved: bool = True,
) -> None:
    """Evaluate if an evaluation is due, and log the epoch. saved: `checkpoint.pth` is that of this epoch."""
    args, row, record = run.args, dict(metrics), dict(metrics)
    due = (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs
    due = due and not args.no_validate
    summaries = evaluate_once(run, f'epoch {epoch + 1}/{args.epochs} evaluate') if due else {}
    summary = summaries.get('bbox')
    for kind, prefix in (
        ('bbox', 'test'),
        *((('segm', 'test_segm'),) if 'segm' in run.postprocessors else ()),
    ):
        names = LVIS_NAMES if 'val' in run.datasets and run.datasets['val'].federated else STAT_NAMES
        stats = summaries[kind].stats if summaries else [None] * len(names)
        row |= {f'{prefix}_{name}': value for name, value in zip(names, stats, strict=True)}
    record |= record_of(summaries)
    images = run.steps_an_epoch * run.images_a_step
    record |= {'images': images, 'train_seconds': round(seconds, 2), 'coefficients': coefficients(args)}
    if log:
        if summary and saved and is_main_process() and summary.stats[0] > log.best('test_AP'):
            keep_copy(log.csv_path.parent, 'checkpoint_best.pth')
        with or_warn():
            log.append(row, record)
            if is_main_process() and summary:
                plot_curves(log.csv_path.with_name('curves.png'), log.csv_path)
    for tracker in trackers:
        with or_warn():
            tracker.add(epoch + 1, {name: value for name, value in row.items() if value is not None})
    ap = f'  AP {summary.stats[0]:.3f}  AP50 {summary.stats[1]:.3f}' if summary else ''
    if 'segm' in summaries:
        stats = summaries['segm'].stats
        ap += f'  mask AP {stats[0]:.3f}  AP50 {stats[1]:.3f}'
    print_main(f'epoch {epoch + 1}/{args.epochs}: loss {row["train_loss"]:.4g}{ap}  {format_time(seconds)}')
    if text := statistics_text(metrics):
        print_main(f'  {text}')


def evaluate_once(run: Run, title: str = 'evaluate') -> dict[str, Summary]:
    """Evaluate the validation images, print the metrics, and draw predictions into the output folder.

    Returns:
        The metrics of boxes, `bbox`, and with --masks those of masks, `segm`.
    """
    dataset, model = run.datasets['val'], run.best_model
    kinds = ('bbox', 'segm') if 'segm' in run.postprocessors else ('bbox',)
    backend, federated = run.args.coco_eval, dataset.federated
    evaluator = CocoEvaluator(dataset.ground_truth, dataset.class_map, kinds, backend, federated)
    loader, precision, check = run.loaders['val'], run.precision, run.stops.check
    broadcast_from_main(model.buffers())
    summaries = evaluate(model, run.postprocessors, loader, evaluator, title, precision, check)
    if is_main_process():
        print(tables(summaries), flush=True)
    if run.args.output_dir and (is_main_process() or run.args.fsdp):  # sharded weights need all processes
        path = Path(run.args.output_dir) / 'predictions.png'
        with or_warn():
            draw_predictions(model, run.postprocessors, dataset, path if is_main_process() else None)
    return summaries


def evaluate_alone(run: Run) -> None:
    """Evaluate for --eval, and write the metrics to `eval.json`."""
    summaries = evaluate_once(run)
    if run.args.output_dir and is_main_process():
        record = record_of(summaries)
        text = json.dumps(record, indent=1)
        save_atomically(Path(run.args.output_dir) / 'eval.json', lambda path: path.write_text(text))


def dry_run(args: Settled, num_images: int | None) -> None:
    """Print what a run would need, from the flags alone. num_images: of the training part; None: those of COCO or LVIS."""
    contiguous = args.dataset_file == 'coco' and args.class_ids == 'contiguous'
    num_classes = {'lvis': 1203}.get(args.dataset_file, 80 if contiguous else args.num_classes)
    args = args.but(num_classes=num_classes, backbone_weights='none')
    with torch.device('meta'):
        model, criterion, _ = build_model(args)
        optimizer = optimizer_of(model, args)
    usual = {'shapes': args.shapes_train, 'lvis': LVIS_TRAIN_IMAGES}.get(args.dataset_file, COCO_TRAIN_IMAGES)
    images = num_images or usual
    schedule = build_scheduler(optimizer, args, max(1, images // (args.batch_size * args.accum_steps)))
    notes = {
        'learning rate': describe_rates(args, schedule),
        'supervision': supervision_table(criterion.table, model.num_queries, criterion.weight_dict),
    }
    augmentation = build_augmentation(args)
    sizes = augmentation.evaluated_size(FLOPS_SIZE), augmentation.largest_size()
    print_dry_run(args, model, optimizer, images, sizes, notes)


if __name__ == '__main__':
    run_command(main, get_args_parser())
