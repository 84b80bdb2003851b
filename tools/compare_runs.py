"""
Compare how runs of main.py converged: one image and one Markdown table.

  python tools/compare_runs.py output/compare/{plain,hybrid}/seed* --output output/compare

The others are compared with the first one. Folders NAME/seedN are repetitions of NAME: their mean and range
are drawn.

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
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from datasets.build import build_dataset, data_settings
from models.detector import load_detector
from models.structures import Prediction
from models.training import build_supervision, coefficients
from models.training.matcher import Matcher, match
from models.weights.read import read_checkpoint
from models.weights.records import extract_flags
from util.box_ops import box_cxcywh_to_xyxy, box_iou
from util.config.flags import FLAGS, TRUST
from util.config.settle import settle
from util.distributed.collectives import choose_device
from util.errors import UserError
from util.files import make_folder, save_atomically
from util.flags import FlagParser, run_command
from util.logger import read_records
from util.nested_tensor import collate_fn
from util.visualize import new_figure

AXES = {'epoch': 'epoch', 'images': 'images seen', 'minutes': 'minutes of training'}
FOUND_SCORE, FOUND_IOU = 0.3, 0.5  # a detection of an object: its class, with at least these


# Measurements after an epoch by name; what was not measured is missing. epoch; images and minutes of training so far; loss of
# the one-to-one queries' last layer, weighted; metrics by their names in the log; changes, the share of objects whose query is
# not that of the epoch before; duplicates, the detections too many, an object.
Epoch = dict[str, float]


@dataclass
class Scheme:
    name: str
    metric: str  # that its runs are compared by
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
    parser = FlagParser(
        'compare_runs.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('runs', nargs='+', metavar='RUN', help='output folders of main.py')
    parser.add_argument('--output', default='.', help='folder of comparison.{png,md} (default: %(default)s)')
    parser.add_argument('--device', default='auto', help='auto, cuda, mps or cpu (default: %(default)s)')
    help = 'draw AP and loss by these; minutes mean nothing for runs that were paused (default: all)'
    parser.add_argument('--by', nargs='+', choices=AXES, default=list(AXES), help=help)
    parser.add_argument('--logs_only', action='store_true', help='read the logs, not the checkpoints')
    for name in TRUST:
        FLAGS[name].add_to(parser)
    return parser


def scheme_names(folders: list[Path]) -> list[str]:
    """Return what the runs of folders NAME/seedN are called, NAME, and others by their folder; two of one
    name by their path.
    """
    places = [folder.resolve() for folder in folders]
    names = [place.parent.name if re.fullmatch(r'seed\d+', place.name) else place.name for place in places]
    often = Counter(name for name, place in zip(names, places, strict=True) if place.name == name)
    return [
        str(folder) if often[name] > 1 and place.name == name else name
        for name, place, folder in zip(names, places, folders, strict=True)
    ]


def read_run(folder: Path) -> tuple[list[Epoch], str]:
    """Read the log of a run; return its epochs and the name of its main metric.

    Raises:
        UserError: the folder has none; or it is of an older version, which wrote no coefficients of losses,
        and without checkpoint.
    """
    log = folder / 'log.jsonl'
    if not log.is_file():
        raise UserError(f'{folder} is no output folder of a run: there is no log.jsonl in it')
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
        seen = {'epoch': record['epoch'], 'images': images, 'minutes': minutes, 'loss': loss}
        epochs.append(seen | metrics)
    if not epochs:
        raise UserError(f'{log} is empty: the run has finished no epoch')
    return epochs, metric


def coefficients_in(checkpoint: Path) -> dict[str, float]:
    """Return the coefficients of class and box losses among the flags in a checkpoint."""
    return coefficients(settle(Namespace(**extract_flags(read_checkpoint(checkpoint)))))


@torch.no_grad()
def read_checkpoints(folder: Path, epochs: list[Epoch], device: torch.device, trust: dict[str, bool]) -> None:
    """Fill in measurements that need the detector of an epoch, if its checkpoint was kept.

    trust: flags of `TRUST`, which the checkpoint does not decide.
    """
    before, data = None, None
    for epoch in epochs:
        file = folder / f'checkpoint{epoch["epoch"] - 1:04}.pth'
        if not file.is_file():
            before = None
            continue
        detector = load_detector(weights=file, device=device)
        if data is None:
            settings = data_settings(Namespace(**vars(detector.args) | trust), masks=False)
            data = build_dataset('val', settings, detector.class_map)
            matcher = build_supervision(detector.args)[0].table['one2one'].matcher
        chosen, epoch['duplicates'] = examine(detector.model, detector.postprocessors['bbox'], data, matcher)
        if before is not None:
            epoch['changes'] = (chosen != before).float().mean().item()
        before = chosen


def examine(
    model: nn.Module, postprocess: nn.Module, data: Dataset, matcher: Matcher
) -> tuple[Tensor, float]:
    """Return the query matched to each object of a dataset (-1: none), and duplicate detections per object."""
    device = next(model.parameters()).device
    queries, surplus, num_objects = [], 0, 0
    for samples, targets in DataLoader(data, batch_size=8, collate_fn=collate_fn):
        outputs = {name: x.cpu() for name, x in model(samples.to(device)).items()}
        last = Prediction(outputs['pred_logits'][None], outputs['pred_boxes'][None])
        (pairs,) = match(matcher, last, targets)
        query = torch.full((sum(len(t['labels']) for t in targets),), -1)
        query[pairs.target] = pairs.query
        queries.append(query)
        sizes = torch.stack([target['size'] for target in targets])
        for target, result, size in zip(targets, postprocess(outputs, sizes), sizes, strict=True):
            scale = size.flip(0).repeat(2)
            surplus += num_surplus(result, target['labels'], box_cxcywh_to_xyxy(target['boxes']) * scale)
            num_objects += len(target['labels'])
    return torch.cat(queries), surplus / max(num_objects, 1)


def num_surplus(result: dict[str, Tensor], labels: Tensor, boxes: Tensor) -> int:
    """Count detections of objects beyond the first of each.

    A detection belongs to the object of its class that it overlaps most.
    """
    shown = result['scores'] >= FOUND_SCORE
    if not len(labels) or not shown.any():
        return 0
    iou, _ = box_iou(result['boxes'][shown][:, None], boxes[None])  # [detections, objects]
    overlap, nearest = (iou * (result['labels'][shown][:, None] == labels)).max(1)
    found = nearest[overlap >= FOUND_IOU]
    return len(found) - len(found.unique())


def draw(path: Path, schemes: list[Scheme], by: list[str]) -> None:
    metric = schemes[0].metric
    panels = [(metric.removeprefix('test_'), metric, x) for x in by]
    panels += [('one-to-one loss', 'loss', x) for x in by]
    panels += [
        ('objects whose query changed', 'changes', 'epoch'),
        ('detections too many, an object', 'duplicates', 'epoch'),
    ]
    panels = [panel for panel in panels if any(scheme.curve(panel[2], panel[1])[0] for scheme in schemes)]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = new_figure(4 * columns, 3.3 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
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
    shown = axes[0].get_legend_handles_labels()
    figure.legend(*shown, loc='outside lower center', ncols=len(schemes), fontsize=10, edgecolor='none')
    save_atomically(path, lambda partial: figure.savefig(partial, dpi=100))


def table(schemes: list[Scheme]) -> str:
    """Return a Markdown table; ranges are those between repetitions, and the first scheme is the reference."""
    metric = schemes[0].metric
    epochs = [epoch for scheme in schemes for run in scheme.runs for epoch in run]
    shown = [name for name in (metric, 'test_AP50') if any(name in epoch for epoch in epochs)]
    values = [epoch[metric] for run in schemes[0].runs for epoch in run if metric in epoch]
    goal = max(values, default=math.inf)
    title = f'epochs to {metric.removeprefix("test_")} {goal:.3f}'
    head = ['scheme', 'runs', *(name.removeprefix('test_') for name in shown), title]
    head += ['minutes an epoch', 'queries changed', 'too many']
    lines = ['| ' + ' | '.join(head) + ' |', '|' + ' --- |' * len(head)]
    for scheme in schemes:
        last = [run[-1] for run in scheme.runs]
        reached = [[e['epoch'] for e in run if e.get(metric, -math.inf) >= goal] for run in scheme.runs]
        cells = [
            scheme.name,
            str(len(last)),
            *(mean_and_range([epoch.get(name) for epoch in last]) for name in shown),
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
    text = table(list(schemes.values()))
    draw(output / 'comparison.png', list(schemes.values()), args.by)
    save_atomically(output / 'comparison.md', lambda path: path.write_text(text))
    print(f'\n{text}\ncomparison.png and comparison.md lie in {output}')


if __name__ == '__main__':
    run_command(main, get_args_parser())
