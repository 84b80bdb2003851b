"""
Measure a training step: forward, losses, backward, clipping and optimizer.

Models have R50 and random weights, images have 7 objects. Deformable DETR and H-Deformable-DETR are also
timed on the path of the official code (`official.py`).

    python tools/benchmark.py step        each method in each precision, as a table
    python tools/benchmark.py profile     operators and kernels of one step by their time
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from engine import build_optimizer
from models import build_model
from models.frozen_norm import FoldedNorm
from models.ops.functions import implementation
from models.training.criterion import weighted_sum
from models.units import compile_units
from tools.benchmarks import common
from tools.benchmarks.official import add_official, load_official, official_model, official_path
from util.config.settle import Settled
from util.errors import UserError
from util.precision import Precision, avoid_plans_per_shape, set_tf32

# Methods that are also timed on the path of the official code.
OFFICIAL = ('Deformable DETR, two stages', 'H-Deformable-DETR')
PRECISIONS = ('fp32', 'tf32', 'bf16', 'bf16 + compile')
# Largest share by which the loss may differ from that of the first precision: rounding changes the choice of
# proposals and pairs.
AGREE = 0.05
PROFILED_ROWS = 20
Batch = tuple[Tensor, list[dict[str, Tensor]]]


@dataclass
class Contender:
    """Model in one precision, and a function that makes a step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[], Tensor]  # returns the loss


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('step', help='a training step of each method in each precision')
    common.add_flags(parser, rounds=20, size=(2, 800, 1333))
    names = list(common.MODELS)
    parser.add_argument('--models', nargs='+', default=names, choices=names, help='(default: all)')
    parser.add_argument(
        '--precisions', nargs='+', default=PRECISIONS, choices=PRECISIONS, help='(default: all)'
    )
    add_official(parser)
    parser.set_defaults(run=benchmark_steps)
    parser = commands.add_parser('profile', help='where the time of a training step goes')
    common.add_flags(parser, rounds=5, size=(2, 800, 1333))
    parser.add_argument('--method', default='H-Deformable-DETR', choices=common.MODELS)
    parser.add_argument('--precision', default='bf16', choices=PRECISIONS)
    parser.add_argument('--trace', metavar='FILE', help='write all events for chrome://tracing too')
    parser.set_defaults(run=profile_step)


def benchmark_steps(args: argparse.Namespace) -> None:
    common.start(args, 'A training step, R50')
    avoid_plans_per_shape()
    on_gpu = args.device == 'cuda'
    precisions = [name for name in args.precisions if on_gpu or name != 'tf32']  # CPUs have no TF32
    common.print_head(('method', 'precision', 'ms', 'images/s', 'peak GB', 'waits', 'loss'))
    problems = []
    extension = load_official(args.official) if args.official else None
    for method in args.models:
        try:
            problems += benchmark_method(method, precisions, args, extension)
        except torch.OutOfMemoryError as error:
            problems.append(f'{method}: out of memory ({str(error).splitlines()[0]})')
        if on_gpu:
            torch.cuda.empty_cache()
    if problems:
        raise UserError('; '.join(problems))


def benchmark_method(
    method: str, precisions: list[str], args: argparse.Namespace, extension: ModuleType | None
) -> list[str]:
    """Print a row for each contender.

    Returns:
        A sentence for each loss that differs from that of the first precision, and for each contender of
            this repository that does not call the operator of deformable attention.
    """
    torch.manual_seed(0)
    batch = common.training_batch(args)
    flags = common.detector_flags(args, **common.MODELS[method])
    contenders = build_contenders(flags, precisions, batch)
    if method in OFFICIAL:
        weights = contenders[precisions[0]].model.state_dict()
        contenders |= build_official(flags, precisions, batch, weights, extension)
    losses = {name: contender.step().item() for name, contender in contenders.items()}
    expected = losses[precisions[0]]
    times = common.time_in_turn({name: c.step for name, c in contenders.items()}, args.rounds, args.device)
    on_gpu, problems = args.device == 'cuda', []
    for name, contender in contenders.items():
        difference = losses[name] / expected - 1
        if not abs(difference) <= AGREE:
            problems.append(f'{method}: the loss in {name} is {losses[name]:g}, not {expected:g}')
        if name in precisions and lacks_operator(flags, args.device, contender.step):
            problems.append(f'{method}: {name} does not call the operator of deformable attention')
        common.print_row(
            (
                method,
                name,
                f'{times[name]:.1f}',
                f'{1e3 * args.batch_size / times[name]:.1f}',
                f'{peak_memory(contender) / 1e9:.1f}' if on_gpu else '-',
                count_waits(contender.step) if on_gpu else '-',
                f'{100 * difference:+.1f} %',
            )
        )
    return problems


def profile_step(args: argparse.Namespace) -> None:
    """Profile one step, after rounds in which plans are chosen and memory is reserved.

    On a GPU the rows are sorted by the time of their kernels, on a CPU by that of the operators themselves.
    """
    common.start(args, f'A training step of {args.method}, R50, in {args.precision}')
    avoid_plans_per_shape()
    on_gpu = args.device == 'cuda'
    flags = common.detector_flags(args, **common.MODELS[args.method])
    step = build_contenders(flags, [args.precision], common.training_batch(args))[args.precision].step
    for _ in range(args.rounds if on_gpu else 1):
        step()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with profile(activities=activities) as trace:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    order = 'self_device_time_total' if on_gpu else 'self_cpu_time_total'
    print(trace.key_averages().table(sort_by=order, row_limit=PROFILED_ROWS, max_name_column_width=90))
    if args.trace:
        trace.export_chrome_trace(args.trace)


def build_contenders(flags: Settled, precisions: list[str], batch: Batch) -> dict[str, Contender]:
    """Build contenders with the same weights; a compiled model is a copy."""
    torch.manual_seed(0)
    model, criterion, _ = build_model(flags)
    lower_variance(model)
    model.to(batch[0].device).train()
    turn_off_dropout(model)
    contenders = {}
    for name in precisions:
        network = model
        if 'compile' in name:
            network = copy.deepcopy(model)
            compile_units(network)
        contenders[name] = build_contender(network, build_loss(network, criterion, batch), name, batch[0])
    return contenders


def build_loss(model: nn.Module, criterion: nn.Module, batch: Batch) -> Callable[[Precision], Tensor]:
    def loss(precision: Precision) -> Tensor:
        with precision.autocast():
            outputs = model(*batch)
        return weighted_sum(criterion(outputs, batch[1]), criterion.weight_dict)

    return loss


def build_official(
    flags: Settled,
    precisions: list[str],
    batch: Batch,
    weights: dict[str, Tensor],
    extension: ModuleType | None,
) -> dict[str, Contender]:
    """Build the model on the path of the official code, which has no 16 bits."""
    model, criterion = official_model(flags, weights)
    model.to(batch[0].device).train()
    turn_off_dropout(model)
    loss = build_loss(model, criterion, batch)

    def official_loss(precision: Precision) -> Tensor:
        with official_path(extension):
            return loss(precision)

    return {
        f'official path, {name}': build_contender(model, official_loss, name, batch[0])
        for name in precisions
        if name in ('fp32', 'tf32')
    }


def build_contender(
    model: nn.Module, forward: Callable[[Precision], Tensor], name: str, images: Tensor
) -> Contender:
    precision = Precision('bf16' if name.startswith('bf16') else 'off', images.device)
    optimizer = build_optimizer(model, 0.0, 0.0, 0.0)  # weights stay, so that all steps are the same
    trained = list(model.parameters())

    def step() -> Tensor:
        if images.is_cuda:
            set_tf32(not name.startswith('fp32'))
        torch.manual_seed(0)  # queries may be drawn at random
        loss = forward(precision)
        precision.backward(loss)
        precision.step(optimizer, trained, max_norm=0.1)
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Contender(model, optimizer, step)


@torch.no_grad()
def lower_variance(model: nn.Module) -> None:
    """Lower the variance of a ResNet with random weights and inactive norms.

    It would double in each block, unlike that of trained weights. Attention to such large numbers would not
    show how rounding acts on a trained model.
    """
    for name, module in model.backbone.named_modules():
        if isinstance(module, FoldedNorm) and name.endswith('bn3'):
            module.weight.fill_(0.2)


def turn_off_dropout(model: nn.Module) -> None:
    """Turn off dropout so that losses can be compared: kernels draw its random numbers differently."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, 'dropout') and isinstance(module.dropout, float):
            module.dropout = 0.0


def peak_memory(contender: Contender) -> int:
    """Return the bytes of a step: parameters, optimizer state, and the most that is added to them."""
    states = [x for state in contender.optimizer.state.values() for x in state.values()]
    stored = [*contender.model.parameters(), *contender.model.buffers(), *states]
    stored_bytes = sum(x.nbytes for x in stored if isinstance(x, Tensor) and x.is_cuda)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.step()
    torch.cuda.synchronize()
    return stored_bytes + torch.cuda.max_memory_allocated() - before


def count_waits(step: Callable[[], object]) -> int:
    """Count how often the host waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    return sum('synchronizing' in str(warning.message) for warning in caught)


def lacks_operator(flags: Settled, device: str, step: Callable[[], object]) -> bool:
    """Return whether a step of Deformable DETR leaves out the operator, though there are kernels here."""
    if flags.family != 'deformable' or implementation(device) == 'pytorch':
        return False
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        step()
    return all(event.key != 'detr::ms_deform_attn' for event in trace.key_averages())
