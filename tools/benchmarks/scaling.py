"""
What training on many GPUs costs: a table by their number, for each model.

Sizes of messages and checkpoints, the loader's speed and the time of saving are measured here, in the same run
(`scaling_inputs.py`); step times and links of GPUs are flags, whose defaults name their source (`scaling_formulas.py`
puts both together). Marks of the rows: M measured here, P published, E an estimate; a row carries those of all that
went into it. Padding and the largest batch are drawn from the sizes of the images that were loaded.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tools.benchmarks.scaling_formulas import (
    Links,
    Saving,
    all_reduce_seconds,
    exposed_seconds,
    fsdp_bytes,
    fsdp_seconds,
    job_mtbf,
    ring_bytes,
    shard_bytes,
    tree_latency,
    waiting,
)
from tools.benchmarks.scaling_inputs import (
    MODELS,
    LoaderFigures,
    ModelFigures,
    detection_bytes,
    import_seconds,
    index_bytes,
    measure_loader,
    measure_model,
    random_state_bytes,
)

# Milliseconds of GPU work a training image in bf16. Estimates from counted FLOPs and bytes at 800 x 1333 on an H200, with
# fused attention kernels, times 0.64 for the mean image; Swin-L: Co-DINO's by the ratio of FLOPs (plan.count_flops).
GPU_MS = {'detr': 1.5, 'deformable': 5.7, 'h_detr': 6.7, 'co_dino': 23.0, 'co_dino_swin_l': 39.0}
# Llama 3 (arXiv:2407.21783, Sec. 3.3.4): 419 unexpected interruptions in 54 days on 16,384 GPUs.
LLAMA3_MTBF_HOURS = 54 * 24 * 16384 / 419
# The same, Sec. 3.3.1: storage that sustains 2 TB/s for these GPUs.
LLAMA3_STORAGE_MB = 2e6 / 16384
MB, GB, HOUR, DAY = 1e6, 1e9, 3600.0, 86400.0

# Flag -> default and help with its source.
ASSUMED = {
    'batch_size': (2, "images a GPU and step [P, the recipes']"),
    'host_ms': (25.0, 'least milliseconds of a step: launches and matching on the host [E, from counted calls]'),
    'backward_share': (0.65, 'backward pass as a share of a step [E, from counted FLOPs]'),
    'bucket_mb': (25.0, "MiB of gradients that DDP sends at once [P, PyTorch's default]"),
    'node_gpus': (8, 'GPUs a node [P, HGX H200]'),
    'nvlink_gb': (450.0, 'GB/s of a GPU inside its node, one direction [P, data sheet of the H200]'),
    'network_gb': (50.0, "GB/s of a GPU's network card, one direction [P, 400 Gbit/s: Llama 3, Sec. 3.3.1]"),
    'link_share': (0.8, 'of these two rates that is reached [E]'),
    'hop_us': (10.0, 'microseconds of a message from node to node [E]'),
    'storage_mb': (LLAMA3_STORAGE_MB, "MB/s of reading from shared storage, a GPU's share [P, Llama 3, Sec. 3.3.1]"),
    'write_mb': (0.0, 'MB/s of writing a checkpoint; 0 = as measured on the disk of --folder [M]'),
    'mtbf_hours': (LLAMA3_MTBF_HOURS, 'mean hours of a GPU between failures that end a run [P, Llama 3, Sec. 3.3.4]'),
    'detect_s': (60.0, 'seconds from a death to the end of the run [E, heartbeat]'),
    'requeue_s': (300.0, 'seconds until all processes are started again and have met [E]'),
    'detections': (300, "detections an image at evaluation [P, the recipes' most]"),
    'eval_images': (5000, 'evaluated images [P, COCO val2017]'),
    'base_batch': (16, "images a step of most recipes, which their learning rates are for [P, scripts/]"),
    'largest_batch': (64, 'most images a step in published training of DETRs that we know [P, DETR, Sec. 4]'),
    'images': (1_000_000_000, 'images to train on, epochs included'),
}  # fmt: skip

Cells = Callable[[int], str]  # number of GPUs to text


@dataclass(frozen=True)
class Row:
    marks: str
    name: str
    cell: Cells


@dataclass(frozen=True)
class Shared:
    """What holds for every model. ranks: bytes of random states a process; found: bytes of detections an image;
    start: seconds of importing; slowest: GPUs to pixels of the largest batch over those of the mean one.
    """

    loader: LoaderFigures
    ranks: float
    found: float
    start: float
    links: Links
    slowest: dict[int, float]


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        'scaling',
        help='what thousands of GPUs cost: a table by their number',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_measuring_args(parser)
    add_assumed_args(parser)
    parser.set_defaults(run=benchmark_scaling)


def add_measuring_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('what is measured')
    group.add_argument('--models', nargs='+', default=list(MODELS), choices=MODELS, help='(default: all)')
    group.add_argument(
        '--coco_path', help="data set to load; by default images are drawn, smaller files than COCO's"
    )
    group.add_argument('--num_images', default=64, type=int, help='images a round (default: %(default)s)')
    group.add_argument(
        '--rounds', default=5, type=int, help='timed rounds of the loader (default: %(default)s)'
    )
    group.add_argument(
        '--folder', help='where checkpoints are written and removed again (default: the temporary one)'
    )


def add_assumed_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('what cannot be measured here (each default names its source)')
    group.add_argument('--gpus', nargs='+', default=[8, 64, 512, 4096], type=int, help='columns of the table')
    group.add_argument('--gpu_ms', nargs='+', default=[], metavar='MODEL=MS',
                       help=f'GPU milliseconds a training image in bf16 [E, from counted FLOPs and bytes] (default: {GPU_MS})')  # fmt: skip
    for name, (default, text) in ASSUMED.items():
        text = f'{text} (default: %(default).6g)'
        group.add_argument(f'--{name}', default=default, type=type(default), help=text)


def check_args(args: argparse.Namespace) -> None:
    if min(args.gpus) < 2:
        raise ValueError(f'--gpus {min(args.gpus)} has nobody to talk to: give numbers from 2')
    for name in ('num_images', 'rounds', *ASSUMED):
        if getattr(args, name) <= 0 and name != 'write_mb':
            raise ValueError(f'--{name} must be above 0, not {getattr(args, name)}')
    if args.folder and not Path(args.folder).is_dir():
        raise ValueError(f'--folder {args.folder} is no folder: create it')


def benchmark_scaling(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    check_args(args)
    gpu_ms = parse_times(args.gpu_ms)
    shared = measure_shared(args)
    print_inputs(args, shared, gpu_ms)
    models = {name: measure_model(MODELS[name], args.folder) for name in args.models}
    print_models(models)
    print_table('all models', args.gpus, common_rows(args, shared))
    for name, figures in models.items():
        print_table(name, args.gpus, ModelTable(args, shared, figures, gpu_ms[name] / 1e3).rows())


def parse_times(given: list[str]) -> dict[str, float]:
    """GPU_MS with what --gpu_ms says instead."""
    times = dict(GPU_MS)
    for text in given:
        name, _, value = text.partition('=')
        try:
            if name not in times:
                raise ValueError
            times[name] = float(value)
        except ValueError as error:
            raise ValueError(f'--gpu_ms {text}: give MODEL=MS, MODEL one of {", ".join(times)}') from error
    return times


def measure_shared(args: argparse.Namespace) -> Shared:
    loader = measure_loader(args.coco_path, args.num_images, args.rounds, args.batch_size)
    return Shared(
        loader=loader,
        ranks=random_state_bytes(),
        found=detection_bytes(args.detections),
        start=import_seconds(),
        links=Links(
            args.node_gpus,
            args.nvlink_gb * GB * args.link_share,
            args.network_gb * GB * args.link_share,
            args.hop_us / 1e6,
        ),
        slowest={n: waiting(loader.sizes, n, args.batch_size, bucketed=False)[1] for n in args.gpus},
    )


def print_inputs(args: argparse.Namespace, shared: Shared, gpu_ms: dict[str, float]) -> None:
    loader = shared.loader
    height, width = loader.sizes.double().mean(dim=0).tolist()
    print(
        f'measured here [M], {loader.name}: {loader.rate:.0f} images/s of one core from file to batch, '
        f'{loader.stored / 1e3:.0f} kB a file, {loader.sent / MB:.2f} MB an image in a uint8 batch of {args.batch_size} with its '
        f'mask, mean size {height:.0f} x {width:.0f}\n'
        f'  {args.images:,} such images: {loader.stored * args.images / 1e12:.0f} TB of files, '
        f'{loader.annotated * args.images / GB:.0f} GB of annotations, {index_bytes(args.images) / GB:.0f} GB for one '
        f"sampler's list of their indices\n"
        f'  {shared.found / 1e3:.1f} kB of detections an evaluated image, {shared.ranks / 1e3:.1f} kB of random states a '
        f'process in a checkpoint, {shared.start:.1f} s to import main.py'
    )
    times = ', '.join(f'{name} {gpu_ms[name]:g}' for name in args.models)
    print(f'assumed [E]: ms of GPU work an image: {times}; at least {args.host_ms:g} ms a step')


def print_models(models: dict[str, ModelFigures]) -> None:
    print(
        f'\n{"MB, measured [M]":<18}{"weights":>10}{"gradients":>11}{"buffers":>9}{"AdamW":>9}{"average":>9}{"file":>9}'
        f'{"save, s":>10}{"on disk, s":>12}{"read, s":>9}{"build, s":>10}'
    )
    for name, m in models.items():
        print(
            f'{name:<18}{m.parameters / MB:10.1f}{m.gradients / MB:11.1f}{m.buffers / MB:9.1f}{m.optimizer / MB:9.1f}'
            f'{m.averaged / MB:9.1f}{m.file / MB:9.1f}{m.save:10.1f}{m.durable:12.1f}{m.read:9.1f}{m.build:10.1f}'
        )


def print_table(title: str, gpus: list[int], rows: list[Row]) -> None:
    print(f'\n{title + ", GPUs:":<65}' + ''.join(f'{n:>13,}' for n in gpus))
    for row in rows:
        print(f'  {row.marks:<4}{row.name:<59}' + ''.join(f'{row.cell(n):>13}' for n in gpus))


def common_rows(args: argparse.Namespace, shared: Shared) -> list[Row]:
    sizes, batch, links = shared.loader.sizes, args.batch_size, shared.links
    gathered = args.eval_images * shared.found

    def grouped(n: int) -> float:
        return waiting(sizes, n, batch, bucketed=True)[1]

    def rates(n: int) -> str:
        factor = n * batch / args.base_batch
        return f'{factor**0.5:.3g}, {factor:.4g}'

    return [
        Row('P', 'images a step', lambda n: f'{n * batch:,}'),
        Row('P', 'the same / the largest published', lambda n: number(n * batch / args.largest_batch)),
        Row('P', f'learning rate x, square root and linear, from {args.base_batch}', rates),
        Row('M', 'padding, %', lambda n: number(100 * waiting(sizes, n, batch, bucketed=False)[0])),
        Row('M', 'largest batch / mean batch of a step, as drawn', lambda n: number(shared.slowest[n])),
        Row('M', 'the same, all GPUs of a step from one bucket of sizes', lambda n: number(grouped(n))),
        Row('E', 'loss normaliser: a collective of a few numbers, ms', lambda n: number(1e3 * tree_latency(n, links))),
        Row('MP', 'evaluation: MB that a process receives', lambda n: number(shard_bytes(n, gathered) / MB)),
        Row('M', 'random states of all processes in a checkpoint, MB', lambda n: number(n * shared.ranks / MB)),
        Row('P', 'hours between failures', lambda n: number(job_mtbf(n, args.mtbf_hours))),
    ]  # fmt: skip


@dataclass(frozen=True)
class ModelTable:
    """One model's part of the table. gpu: seconds of GPU work an image."""

    args: argparse.Namespace
    shared: Shared
    model: ModelFigures
    gpu: float

    def compute(self, n: int) -> float:
        """Seconds of the slowest GPU of n, which all wait for; GPU time goes with the pixels. n = 1: of the mean one."""
        slowest = self.shared.slowest[n] if n > 1 else 1.0
        return max(self.args.host_ms / 1e3, self.gpu * self.args.batch_size * slowest)

    def exposed(self, n: int) -> float:
        backward = self.args.backward_share * self.compute(n)
        bucket = self.args.bucket_mb * 2**20
        return exposed_seconds(n, self.model.gradients, bucket, backward, self.shared.links)

    def step(self, n: int) -> float:
        """With DDP; the normaliser is a collective that nothing hides."""
        return self.compute(n) + self.exposed(n) + tree_latency(n, self.shared.links)

    def gpu_rate(self, n: int) -> float:
        """Images a second and GPU."""
        return self.args.batch_size / self.step(n)

    def file(self, n: int) -> float:
        return self.model.file + (n - 1) * self.shared.ranks

    def saving(self, n: int) -> Saving:
        rate = self.args.write_mb * MB or self.model.file / self.model.durable
        reading = max(self.model.read, self.file(n) / (self.args.storage_mb * MB))
        waited = self.args.detect_s + self.args.requeue_s
        restart = waited + self.shared.start + self.model.build + reading
        return Saving(self.file(n) / rate, restart, job_mtbf(n, self.args.mtbf_hours * HOUR))

    def lost(self, n: int) -> float:
        saving = self.saving(n)
        return saving.lost_share(saving.best_interval())

    def days(self, n: int) -> float:
        worked = self.args.images / (n * self.gpu_rate(n))
        return worked / max(1 - self.lost(n), 1e-9) / DAY

    def rows(self) -> list[Row]:
        return self.communication_rows() + self.loading_rows() + self.saving_rows()

    def communication_rows(self) -> list[Row]:
        m, links, state = self.model, self.shared.links, self.model.state
        return [
            Row('M', 'DDP: MB sent a GPU and step', lambda n: number(ring_bytes(n, m.gradients) / MB)),
            Row('MPE', '  ms on the links', lambda n: number(1e3 * all_reduce_seconds(n, m.gradients, links))),
            Row('MPE', '  of them not hidden by the backward pass', lambda n: number(1e3 * self.exposed(n))),
            Row('M', 'FSDP2: MB sent a GPU and step', lambda n: number(fsdp_bytes(n, m.parameters, m.gradients) / MB)),
            Row('MPE', '  ms on the links', lambda n: number(1e3 * fsdp_seconds(n, m.parameters, m.gradients, links))),
            Row('M', 'GB of weights, gradients, AdamW and average a GPU, DDP', lambda n: number(state / GB)),
            Row('M', '  the same, FSDP2', lambda n: number(state / n / GB)),
            Row('MPE', 'step, ms', lambda n: number(1e3 * self.step(n))),
            Row('MPE', 'speed / that of one GPU and mean batches, %',
                lambda n: number(100 * self.compute(1) / self.step(n))),
            Row('MPE', 'images/s', lambda n: f'{n * self.gpu_rate(n):,.0f}'),
        ]  # fmt: skip

    def loading_rows(self) -> list[Row]:
        loader, per_node = self.shared.loader, self.args.node_gpus

        def stored(n: int) -> float:
            return n * self.gpu_rate(n) * loader.stored / GB

        return [
            Row('MPE', 'cores a GPU for loading', lambda n: number(self.gpu_rate(n) / loader.rate)),
            Row('MPE', 'GB/s from storage to a node', lambda n: number(stored(n) * min(n, per_node) / n)),
            Row('MPE', '  to all', lambda n: number(stored(n))),
            Row('MPE', 'MB/s to a GPU over PCIe', lambda n: number(self.gpu_rate(n) * loader.sent / MB)),
        ]  # fmt: skip

    def saving_rows(self) -> list[Row]:
        def interval(n: int) -> float:
            return self.saving(n).best_interval()

        return [
            Row('M', 'checkpoint, GB', lambda n: number(self.file(n) / GB)),
            Row('M', 'seconds of saving, all wait for rank 0', lambda n: number(self.saving(n).cost)),
            Row('MPE', 'seconds from a failure to the next step', lambda n: number(self.saving(n).restart)),
            Row('MP', 'best interval between checkpoints, minutes', lambda n: number(interval(n) / 60)),
            Row('MPE', '  in steps: --checkpoint_steps', lambda n: f'{interval(n) / self.step(n):,.0f}'),
            Row('MPE', 'work lost to saving and failures, %', lambda n: number(100 * self.lost(n))),
            Row('MPE', f'days for {self.args.images:,} images', lambda n: number(self.days(n))),
        ]


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'
