"""
Compare how runs of main.py converged: one image and one Markdown table.

  python tools/compare_runs.py output/compare/{plain,hybrid}/seed* --output output/compare

The first run is the reference. Folders NAME/seedN are repetitions of NAME: their mean and range are drawn.

Runs with --save_every 1 also show two numbers from checkpoints and validation images. One is the share of
objects whose query changes from epoch to epoch (the instability of DN-DETR, arXiv:2203.01305, Sec. 3.2; in
two stages a query is a rank among the proposals). The other is the number of duplicate detections.
"""

import argparse
import math
import re
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from datasets.build import build_dataset, data_settings
from models.detector import Detector, load_detector
from models.structures import Prediction
from models.training import build_supervision, coefficients
from models.training.matcher import Matcher, match
from models.weights.read import read_checkpoint
from models.weights.records import extract_flags
from util.box_ops import box_cxcywh_to_xyxy, box_iou
from util.command_line import FlagParser, run_command
from util.config.flags import FLAGS, TRUST
from util.config.settle import settle
from util.distributed.collectives import choose_device
from util.errors import UserError
from util.files import make_folder, save_atomically
from util.logger import read_records
from util.nested_tensor import collate_fn
from util.visualize import build_figure

AXES = {'epoch': 'epoch', 'images': 'images seen', 'minutes': 'minutes of training'}
MIN_SCORE, MIN_IOU = 0.3, 0.5  # of a detection that belongs to an object of its class

# Measurements after an epoch by name; those that were not made are missing. `epoch`; `images` and `minutes`
# of training so far; `loss`, the weighted one of the last layer's one-to-one queries; metrics by their names
# in the log; `changes`, the share of objects whose query differs from the epoch before; `duplicates` per
# object.
Epoch = dict[str, float]


@dataclass
class Scheme:
    name: str
    metric: str  # main metric of its runs
    runs: list[list[Epoch]] = field(default_factory=list)

    def curve(self, x: str, y: str) -> tuple[list[float], list[float], list[float], list[float]]:
        """Return mean x, and mean, lowest and highest y, of the epochs that all runs have."""
        rows = []
        for epochs in zip(*self.runs, strict=False):
            if all(y in epoch for epoch in epochs):
                values = [epoch[y] for epoch in epochs]
                rows.append((mean(epoch[x] for epoch in epochs), mean(values), min(values), max(values)))
        return tuple(map(list, zip(*rows, strict=True))) if rows else ([], [], [], [])


def get_args_parser() -> argparse.ArgumentParser:
    parser = FlagParser('compare_runs.py', description=__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='output folders of main.py')
    parser.add_argument('--output', default='.', help='folder of comparison.{png,md} (default: %(default)s)')
    parser.add_argument('--device', default='auto', help='auto, cuda, mps or cpu (default: %(default)s)')
    text = 'x axes of AP and loss; minutes mean nothing for runs that were paused (default: all)'
    parser.add_argument('--by', nargs='+', choices=AXES, default=list(AXES), help=text)
    parser.add_argument('--logs_only', action='store_true', help='read the logs, not the checkpoints')
    for name in TRUST:
        FLAGS[name].add_to(parser)
    return parser


def scheme_names(folders: list[Path]) -> list[str]:
    """Return the name of each run: NAME of a folder NAME/seedN, else the name of the folder.

    Runs of other folders with the same name have their paths as names.
    """
    names = []
    counts = Counter(folder.resolve().name for folder in folders)
    for folder in folders:
        path = folder.resolve()
        if re.fullmatch(r'seed\d+', path.name):
            names.append(path.parent.name)
        else:
            names.append(path.name if counts[path.name] == 1 else str(folder))
    return names


def read_run(folder: Path) -> tuple[list[Epoch], str]:
    """Read the log of a run; return its epochs and the name of its main metric.

    Raises:
        UserError: the folder has no log; or the log is of an older version, which wrote no coefficients of
            losses, and there is no checkpoint.
    """
    log = folder / 'log.jsonl'
    if not log.is_file():
        raise UserError(f'{folder} is not an output folder of a run: there is no log.jsonl in it')
    epochs, images, minutes, weights, metric = [], 0, 0.0, {}, 'test_AP'
    for record in read_records(log):
        images += record['images']
        minutes += record['train_seconds'] / 60
        weights = record.get('coefficients') or weights or coefficients_in(folder / 'checkpoint.pth')
        loss = sum(weight * record.get(f'train_loss_{term}', 0.0) for term, weight in weights.items())
        metrics = {name: x for name, x in record.items() if name.startswith('test_') and isinstance(x, float)}
        if not metrics:  # older logs have the numbers without their names
            metrics = dict(zip(('test_AP', 'test_AP50'), record.get('test_coco_eval_bbox', ()), strict=False))
        metric = record.get('main_metric', metric)
        progress = {'epoch': record['epoch'], 'images': images, 'minutes': minutes, 'loss': loss}
        epochs.append(progress | metrics)
    if not epochs:
        raise UserError(f'{log} is empty: the run has finished no epoch')
    return epochs, metric


def coefficients_in(checkpoint: Path) -> dict[str, float]:
    """Return the coefficients of class and box losses among the flags in a checkpoint."""
    return coefficients(settle(Namespace(**extract_flags(read_checkpoint(checkpoint)))))


@torch.no_grad()
def read_checkpoints(folder: Path, epochs: list[Epoch], device: torch.device, trust: dict[str, bool]) -> None:
    """Add the measurements of epochs whose checkpoints exist.

    trust: flags of `TRUST`, which are not taken from the checkpoint.
    """
    previous, data = None, None
    for epoch in epochs:
        file = folder / f'checkpoint{epoch["epoch"] - 1:04}.pth'
        if not file.is_file():
            previous = None
            continue
        detector = load_detector(weights=file, device=device)
        if data is None:
            settings = data_settings(Namespace(**vars(detector.args) | trust), masks=False)
            data = build_dataset('val', settings, detector.class_map)
            matcher = build_supervision(detector.args)[0].table['one2one'].matcher
        queries, epoch['duplicates'] = match_dataset(detector, data, matcher)
        if previous is not None:
            epoch['changes'] = (queries != previous).float().mean().item()
        previous = queries


def match_dataset(detector: Detector, data: Dataset, matcher: Matcher) -> tuple[Tensor, float]:
    """Return the query matched to each object (-1: none), and the number of duplicates per object."""
    model, postprocess = detector.model, detector.postprocessors['bbox']
    device = next(model.parameters()).device
    queries, duplicates, num_objects = [], 0, 0
    for samples, targets in DataLoader(data, batch_size=8, collate_fn=collate_fn):
        outputs = {name: x.cpu() for name, x in model(samples.to(device)).items()}
        last = Prediction(outputs['pred_logits'][None], outputs['pred_boxes'][None])
        (pairs,) = match(matcher, last, targets)
        query = torch.full((sum(len(t['labels']) for t in targets),), -1)
        query[pairs.target] = pairs.query
        queries.append(query)
        sizes = torch.stack([target['size'] for target in targets])
        for target, result, size in zip(targets, postprocess(outputs, sizes), sizes, strict=True):
            boxes = box_cxcywh_to_xyxy(target['boxes']) * size.flip(0).repeat(2)
            duplicates += count_duplicates(result, target['labels'], boxes)
            num_objects += len(target['labels'])
    return torch.cat(queries), duplicates / max(num_objects, 1)


def count_duplicates(result: dict[str, Tensor], labels: Tensor, boxes: Tensor) -> int:
    """Count the detections of objects after the first of each.

    A detection belongs to the object of its class that it overlaps most.
    """
    chosen = result['scores'] >= MIN_SCORE
    if not len(labels) or not chosen.any():
        return 0
    iou, _ = box_iou(result['boxes'][chosen][:, None], boxes[None])  # [detections, objects]
    overlap, nearest = (iou * (result['labels'][chosen][:, None] == labels)).max(1)
    objects = nearest[overlap >= MIN_IOU]
    return len(objects) - len(objects.unique())


def plot_schemes(path: Path, schemes: list[Scheme], by: list[str]) -> None:
    metric = schemes[0].metric
    panels = [(metric.removeprefix('test_'), metric, x) for x in by]
    panels += [('one-to-one loss', 'loss', x) for x in by]
    panels += [
        ('objects whose query changed', 'changes', 'epoch'),
        ('duplicate detections per object', 'duplicates', 'epoch'),
    ]
    panels = [panel for panel in panels if any(scheme.curve(panel[2], panel[1])[0] for scheme in schemes)]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = build_figure(4 * columns, 3.3 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (title, y, x) in zip(axes, panels, strict=False):
        for index, scheme in enumerate(schemes):
            xs, means, lows, highs = scheme.curve(x, y)
            panel.plot(xs, means, label=scheme.name, color=f'C{index}', marker='o', markersize=3)
            panel.fill_between(xs, lows, highs, color=f'C{index}', alpha=0.15, linewidth=0)
        panel.set_title(title, loc='left', fontsize=11)
        panel.set_xlabel(AXES[x], fontsize=9)
        panel.grid(alpha=0.25)
        panel.spines[['top', 'right']].set_visible(False)
    for empty in axes[len(panels) :]:
        empty.axis('off')
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc='outside lower center',
        ncols=len(schemes),
        fontsize=10,
        edgecolor='none',
    )
    save_atomically(path, lambda partial: figure.savefig(partial, dpi=100))


def build_table(schemes: list[Scheme]) -> str:
    """Return a Markdown table; ranges are between repetitions, and the first scheme is the reference."""
    metric = schemes[0].metric
    epochs = [epoch for scheme in schemes for run in scheme.runs for epoch in run]
    metrics = [name for name in (metric, 'test_AP50') if any(name in epoch for epoch in epochs)]
    values = [epoch[metric] for run in schemes[0].runs for epoch in run if metric in epoch]
    goal = max(values, default=math.inf)
    title = f'epochs to {metric.removeprefix("test_")} {goal:.3f}'
    head = ['scheme', 'runs', *(name.removeprefix('test_') for name in metrics), title]
    head += ['minutes per epoch', 'queries changed', 'duplicates']
    lines = ['| ' + ' | '.join(head) + ' |', '|' + ' --- |' * len(head)]
    for scheme in schemes:
        last = [run[-1] for run in scheme.runs]
        reached = [[e['epoch'] for e in run if e.get(metric, -math.inf) >= goal] for run in scheme.runs]
        cells = [
            scheme.name,
            str(len(last)),
            *(mean_and_range([epoch.get(name) for epoch in last]) for name in metrics),
            ', '.join(str(numbers[0]) if numbers else 'not reached' for numbers in reached),
            f'{mean(epoch["minutes"] / epoch["epoch"] for epoch in last):.2f}',
            mean_and_range([epoch.get('changes') for epoch in last]),
            mean_and_range([epoch.get('duplicates') for epoch in last]),
        ]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def mean_and_range(values: list[float | None]) -> str:
    """Return the mean, and the lowest and highest value if they differ."""
    if None in values:
        return '-'
    text = f'{mean(values):.3f}'
    return text if min(values) == max(values) else f'{text} ({min(values):.3f} to {max(values):.3f})'


def main(args: argparse.Namespace) -> None:
    schemes: dict[str, Scheme] = {}
    device = choose_device(args.device)
    folders = [Path(run) for run in args.runs]
    for folder, name in zip(folders, scheme_names(folders), strict=True):
        epochs, metric = read_run(folder)
        if not args.logs_only:
            read_checkpoints(folder, epochs, device, {name: getattr(args, name) for name in TRUST})
        schemes.setdefault(name, Scheme(name, metric)).runs.append(epochs)
        print(f'{folder}: {len(epochs)} epochs', flush=True)
    output = Path(args.output)
    make_folder(output)
    text = build_table(list(schemes.values()))
    plot_schemes(output / 'comparison.png', list(schemes.values()), args.by)
    save_atomically(output / 'comparison.md', lambda path: path.write_text(text))
    print(f'\n{text}\ncomparison.png and comparison.md are in {output}')


if __name__ == '__main__':
    run_command(main, get_args_parser())
