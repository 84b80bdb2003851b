"""
Train and evaluate detectors.

  python main.py --dataset_file shapes --output_dir output/first     built-in images, no download of data
  python main.py --coco_path DATA --conditional --output_dir OUT     any data in COCO form
  python main.py --coco_path DATA --eval --resume FILE               evaluate a checkpoint
  python main.py --coco_path DATA --eval --model detr_resnet50       evaluate published weights
"""

from util.config.parser import build_parser

# PyTorch takes seconds to import: answer --help and mistyped flags before.
if __name__ == '__main__':
    build_parser(__doc__).parse_args()

import json
import time
from argparse import Namespace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from datasets.build import build_evaluator, data_limits, main_column
from datasets.check_data import check_data
from datasets.class_map import PANOPTIC_CLASSES, ClassMap
from datasets.evaluation import Evaluation
from datasets.inventory import print_inventory, take_inventories
from datasets.loaders import (
    begin_epoch,
    build_datasets,
    build_loader,
    check_steps,
    count_train_images,
    handle_unreadable,
    settle_reading,
    use_readers,
    worst_batch,
)
from engine import evaluate, sample_detections, train_one_epoch, try_largest_batch
from models import build_model, check_backbone
from models.segmentation import freeze_all_but_masks
from models.structures import Prediction
from models.training import coefficients
from models.training.summary import flops_text, print_dry_run, print_plan, statistics_text
from models.units import all_units, compile_units
from models.weights.load import check_frozen, load_checkpoint
from models.weights.read import read_checkpoint
from models.weights.records import extract_class_map, extract_flags, shared_classes
from util.command_line import HTTP_ALLOWED, FlagParser, given_of, run_command
from util.config.declare import RUN
from util.config.recipes import with_named_flags
from util.config.recorded import adopt, changes_text, data_of
from util.config.settle import EVERYTHING, Settled, check_processes, settle
from util.distributed.collectives import (
    all_gather_object,
    broadcast_object,
    check_agreement,
    choose_device,
    fail_together,
    get_rank,
    get_world_size,
    is_main_process,
)
from util.distributed.parallel import broadcast_from_main, replicate, shard
from util.distributed.preemption import StopRequests, processes, was_restarted
from util.errors import UserError
from util.files import or_warn, save_atomically
from util.logger import format_time, print_main
from util.optim import WeightAverage, build_schedule
from util.precision import Precision, avoid_plans_per_shape, set_tf32
from util.run import Run, check_same_start, find_checkpoint, only_run_of
from util.run_entries import check_entries
from util.seeding import seed_everything
from util.trackers import check_trackers
from util.visualize import contact_sheet

DRAWN_SCORE = 0.3  # focal losses keep scores low


def get_args_parser() -> FlagParser:
    """Return the parser of all flags; `--help TOPIC` shows them by topic."""
    return build_parser(__doc__)


def main(args: Namespace) -> None:
    args = with_named_flags(args)
    HTTP_ALLOWED.set(args.allow_http)
    if args.dry_run or args.check_data:
        with processes(torch.device('cpu'), args.dist_url), fail_together():
            look(configure(args)[0])
        return
    device = choose_device(args.device)
    avoid_plans_per_shape()
    with processes(device, args.dist_url) as stops, only_run_of('' if args.eval else args.output_dir):
        args, checkpoint, datasets = read_data(args)
        set_tf32(args.tf32)
        begin = evaluate_alone if args.eval else train
        begin(build_run(args, checkpoint, datasets, device, stops))  # no name here: see leave_distributed


def look(args: Settled) -> None:
    """Print the size and the cost of a run, for --dry_run; with --check_data, check all data first."""
    if not is_main_process():
        return
    if args.check_data:
        datasets = build_datasets(args, None)
        settle_reading(args, datasets)
        num_images = check_data(datasets, args.num_workers, args.output_dir, **data_limits(args))
    else:
        num_images = None if args.eval else count_train_images(args)
    print_dry_run(args, num_images)


def configure(args: Namespace, restarted: bool = False) -> tuple[Settled, dict]:
    """Settle all flags, with those of the checkpoint in use; return them and the checkpoint ({}: none).

    restarted: a launcher has started this job again.

    Raises:
        UserError: flags contradict each other or the checkpoint, or it cannot be read.
    """
    given = given_of(args)
    settle(args, (RUN,))  # report errors before a large file is read
    resume_file = '' if args.resume == 'auto' else args.resume
    if args.output_dir and not (args.dry_run or args.check_data):
        resume_file = find_checkpoint(args.output_dir, args.resume, args.eval, restarted)
    source = resume_file or args.pretrained or args.frozen_weights or ''
    if args.dry_run and not Path(source).is_file():
        source = ''  # a dry run downloads nothing
    checkpoint = read_checkpoint(source) if source else {}
    resume = bool(resume_file) and not args.eval
    check_entries(checkpoint, source, resume)
    args = Namespace(**vars(args) | {'resume': resume_file})
    if recorded := extract_flags(checkpoint, resume):
        try:
            args = adopt(args, given, recorded, resume, strict=resume or args.eval)
        except UserError as error:
            raise UserError(f'{source}: {error}') from error
        if args.eval and 'class_map' in checkpoint:  # a run of this program
            args = Namespace(**vars(args) | data_of(args, given, recorded))
    settled = settle(args, EVERYTHING)
    check_trackers(settled.output_dir, vars(settled))
    settled = settled.but(accum_steps=check_processes(settled, get_world_size()))
    if resume and (text := changes_text(settled, recorded)):
        print_main(f'{settled.resume} goes on with other flags: {text}')
    return settled, checkpoint


def read_data(args: Namespace) -> tuple[Settled, dict, dict[str, Dataset]]:
    """Return settled flags, the checkpoint in use ({} if there is none) and the datasets.

    Raises:
        UserError: flags, checkpoint or data are wrong, or the processes disagree about them.
    """
    check_same_start(args)
    restarted = any(all_gather_object(was_restarted()))
    with fail_together():
        args, checkpoint = configure(args, restarted)
        check_backbone(args)
        seed_everything(args.seed + get_rank())
        class_map = ClassMap.from_dict(checkpoint['class_map']) if 'class_map' in checkpoint else None
        if args.eval and class_map is None and checkpoint:
            file_map = extract_class_map(checkpoint, args.resume or args.pretrained)
            class_map = file_map if file_map.num_classes == PANOPTIC_CLASSES else None
        datasets = build_datasets(args, class_map)
        if is_main_process():
            names = list(datasets.values())[-1].class_map.names
            print_inventory(take_inventories(datasets), names, **data_limits(args))
    handle_unreadable(datasets, args.skip_unreadable, args.output_dir)
    with fail_together():
        found = settle_reading(args, datasets) if is_main_process() else {}
    args = args.but(**broadcast_object(found))
    use_readers(args, datasets.values())
    facts = {f'{split} data': dataset.summary for split, dataset in datasets.items()}
    num_images = checkpoint.get('within_epoch', {}).get('images', 0)
    progress = f'epoch {checkpoint.get("epoch")}, {num_images} images further' if checkpoint else 'none'
    check_agreement(facts | {'the checkpoint': progress})  # a folder may not be shared
    num_classes = list(datasets.values())[-1].class_map.num_classes
    weights = {'backbone_weights': 'none'} if checkpoint else {}  # a checkpoint contains the backbone
    return args.but(num_classes=num_classes, **weights), checkpoint, datasets


def build_run(
    args: Settled, checkpoint: dict, datasets: dict[str, Dataset], device: torch.device, stops: StopRequests
) -> Run:
    """Build all parts of a run, with the weights and the progress of a checkpoint ({}: none)."""
    model, criterion, postprocessors = build_model(args)
    if checkpoint:
        load_weights(model, args, checkpoint, list(datasets.values())[-1].class_map)
    if args.frozen_weights:
        freeze_all_but_masks(model)
    model.to(device)
    broadcast_from_main([*model.parameters(), *model.buffers()])
    average = WeightAverage(model, args.ema, args.ema_warmup) if args.ema and not args.eval else None
    flops = flops_text(model, list(datasets.values())[-1]) if is_main_process() else ''
    if args.compile:
        compile_units(model)
    if args.fsdp:
        shard(model, all_units(model), [Prediction])
        if average:
            shard(average.module, all_units(average.module))
    loading = (args.batch_size, args.num_workers, args.batches, args.seed)
    loaders = {part: build_loader(dataset, part, *loading) for part, dataset in datasets.items()}
    if not args.eval:
        check_steps(loaders['train'], len(datasets['train']), args.batch_size, args.accum_steps)
    precision = Precision(args.amp, device)
    default = device.type == 'cuda'
    if not args.eval and (default if args.worst_batch_first is None else args.worst_batch_first):
        worst = worst_batch(datasets['train'], args.batch_size, args.batches == 'size')
        try_largest_batch(model, criterion, precision, args.batch_size, *worst)
    steps_per_epoch = 1 if args.eval else len(loaders['train']) // args.accum_steps
    schedule = build_schedule(args, model, steps_per_epoch)
    if get_world_size() > 1 and not args.fsdp:
        model = replicate(model, [Prediction], args.accum_steps)
    parts = model, criterion, postprocessors, datasets, loaders, schedule, precision, stops, average
    run = Run(args, *parts)
    if args.resume and not args.eval:
        run.restore(checkpoint)
    if is_main_process():
        print_plan(args, run.bare_model, criterion, datasets, schedule, flops)
    return run


def load_weights(model: nn.Module, args: Settled, checkpoint: dict, class_map: ClassMap) -> None:
    """Load the weights of a checkpoint; class heads of a new run keep the rows of classes that both have."""
    name, is_new = args.resume or args.pretrained or args.frozen_weights, not (args.resume or args.eval)
    resume = bool(args.resume) and not args.eval
    classes = shared_classes(checkpoint, class_map) if is_new else None
    report = load_checkpoint(model, checkpoint, resize=is_new, resume=resume, name=name, classes=classes)
    print_main(f'{name}: {report}')
    if args.frozen_weights and is_new:
        check_frozen(report)


def train(run: Run) -> None:
    """Run the remaining epochs."""
    args = run.args
    if run.open_logs():
        finish_epoch(run, run.metrics)
    if run.epoch >= args.epochs:
        print_main(f'all {args.epochs} epochs are done; raise --epochs to train longer')
    if run.state.step:
        print_main(f'epoch {run.epoch + 1} goes on after step {run.state.step} of {run.steps_per_epoch}')
    while run.epoch < args.epochs and not run.out_of_patience(main_column(args.evaluator)):
        start = time.perf_counter()
        begin_epoch(run.loaders['train'], run.epoch, run.state.step * args.accum_steps)
        lr, lr_backbone, *_ = run.schedule.rates(run.epoch * run.steps_per_epoch)
        averages = train_one_epoch(
            run.model,
            run.criterion,
            run.loaders['train'],
            run.optimizer,
            title=f'epoch {run.epoch + 1}/{args.epochs}',
            max_norm=args.clip_max_norm,
            accum_steps=args.accum_steps,
            print_freq=args.print_freq,
            precision=run.precision,
            state=run.state,
            end_step=run.end_step,
            guard=run.guard,
        )
        metrics = {'epoch': run.epoch + 1, 'lr': lr, 'lr_backbone': lr_backbone}
        metrics |= {f'train_{name}': value for name, value in averages.items()}
        run.end_epoch(metrics)
        finish_epoch(run, metrics, time.perf_counter() - start)
    run.check_saved()


def finish_epoch(run: Run, metrics: dict, seconds: float = 0.0) -> None:
    """Evaluate every --eval_every epochs, and log the last epoch."""
    args, best = run.args, main_column(run.args.evaluator)
    title = f'epoch {run.epoch}/{args.epochs}'
    due = args.eval_every and (run.epoch % args.eval_every == 0 or run.epoch == args.epochs)
    result = evaluate_once(run, f'{title} evaluate') if due else Evaluation({})
    row = metrics | result.columns
    images = run.steps_per_epoch * run.images_per_step
    record = row | result.record | {'main_metric': best, 'images': images}
    record |= {'train_seconds': round(seconds, 2), 'coefficients': coefficients(args)}
    run.log_epoch(row, record, best, result.drawn)
    print_main(f'{title}: loss {row["train_loss"]:.4g}{result.line}  {format_time(seconds)}')
    if text := statistics_text(metrics):
        print_main(f'  {text}')


def evaluate_once(run: Run, title: str = 'evaluate') -> Evaluation:
    """Evaluate the validation images, print the metrics, and draw some predictions."""
    dataset, model, args = run.datasets['val'], run.best_model, run.args
    kinds = ('bbox', 'segm') if 'segm' in run.postprocessors else ('bbox',)
    evaluator = build_evaluator(args.evaluator, dataset, kinds)
    broadcast_from_main(model.buffers())
    result = evaluate(
        model, run.postprocessors, run.loaders['val'], evaluator, title, run.precision, run.stops.check
    )
    if is_main_process():
        print(result.text, flush=True)
    if run.folder and (is_main_process() or args.fsdp):  # sharded weights need all processes
        samples = sample_detections(model, run.postprocessors, dataset)
        if is_main_process():
            with or_warn():
                contact_sheet(run.folder / 'predictions.png', samples, dataset.class_map.names, DRAWN_SCORE)
    return result


def evaluate_alone(run: Run) -> None:
    """Evaluate for --eval, and write the metrics to `eval.json`."""
    result = evaluate_once(run)
    text = json.dumps(result.columns | result.record, indent=1)
    if run.folder and is_main_process():
        save_atomically(run.folder / 'eval.json', lambda path: path.write_text(text))


if __name__ == '__main__':
    run_command(main, get_args_parser())
