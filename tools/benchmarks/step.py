"""
Measure a training step: forward, losses, backward, clipping and optimizer.

Models have R50 and random weights, images have 7 objects.

    python tools/benchmark.py step      each method in each precision, as a table
    python tools/benchmark.py train     H-Deformable-DETR against grid_sample and one masked attention

In `step`, models of the transformers library with their losses stand beside ours, and, where it fits, our
model on the path of the official code (`official.py`).
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
from models.training import build_supervision
from models.training.criterion import weighted_sum
from models.units import compile_units
from tools.benchmarks import common
from tools.benchmarks.official import (
    add_official,
    load_official,
    official_loss,
    official_model,
    official_path,
)
from util.config.settle import Settled
from util.errors import UserError
from util.precision import Precision, avoid_plans_per_shape, set_tf32

# Methods whose official losses `reference_criterion.py` computes.
OFFICIAL = ('Deformable DETR, two stages', 'H-Deformable-DETR')
PRECISIONS = ('fp32', 'tf32', 'bf16', 'bf16 + compile')
# Largest share by which the loss may differ from that of the first precision: other proposals and pairs are
# chosen for a rounding.
AGREE = 0.05
Batch = tuple[Tensor, list[dict[str, Tensor]]]


@dataclass
class Contender:
    """Model in one precision; a peer's loss is its own."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[], Tensor]  # returns the loss


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('train', help='a training step of H-Deformable-DETR')
    common.add_flags(parser, rounds=3, size=(2, 384, 512))
    parser.add_argument('--compile', action='store_true', help='time a compiled copy too')
    parser.set_defaults(run=benchmark_train)
    parser = commands.add_parser('step', help='a training step of each method in each precision')
    common.add_flags(parser, rounds=20, size=(2, 800, 1333))
    names = list(common.MODELS)
    parser.add_argument('--models', nargs='+', default=names, choices=names, help='(default: all)')
    parser.add_argument(
        '--precisions', nargs='+', default=PRECISIONS, choices=PRECISIONS, help='(default: all)'
    )
    add_official(parser)
    parser.set_defaults(run=benchmark_steps)


def benchmark_train(args: argparse.Namespace) -> None:
    common.start(args, 'A training step of H-Deformable-DETR')
    batch = common.training_batch(args)
    flags = common.detector_flags(args, **common.TRICKS, **common.HYBRID, dropout=0.0)
    contenders = make_contenders(flags, ['fp32', *['fp32 + compile'] * args.compile], batch)
    ours = contenders['fp32']

    def plain_step() -> Tensor:
        with official_path():
            return ours.step()

    steps = {name: contender.step for name, contender in contenders.items()}
    steps['grid_sample, masked attention'] = plain_step
    losses = {name: step() for name, step in steps.items()}
    for loss in losses.values():
        torch.testing.assert_close(loss, losses['fp32'], rtol=1e-3, atol=0)
    common.print_times(common.time_in_turn(steps, args.rounds, args.device))


def benchmark_steps(args: argparse.Namespace) -> None:
    common.start(args, 'A training step')
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
            ours that does not call the operator of deformable attention.
    """
    torch.manual_seed(0)
    batch = common.training_batch(args)
    flags = common.detector_flags(args, **common.MODELS[method])
    contenders = ours = make_contenders(flags, precisions, batch)
    if method in OFFICIAL:
        contenders = ours | make_official(flags, precisions, batch, ours[precisions[0]].model, extension)
    contenders = contenders | make_peers(method, precisions, batch, flags)
    losses = {name: contender.step().item() for name, contender in contenders.items()}
    expected = losses[precisions[0]]
    times = common.time_in_turn({name: c.step for name, c in contenders.items()}, args.rounds, args.device)
    on_gpu, problems = args.device == 'cuda', []
    for name, contender in contenders.items():
        same_loss, difference = not name.startswith('transformers'), losses[name] / expected - 1
        if same_loss and not abs(difference) <= AGREE:
            problems.append(f'{method}: the loss in {name} is {losses[name]:g}, not {expected:g}')
        if name in ours and lacks_operator(flags, args.device, contender.step):
            problems.append(f'{method}: {name} does not call the operator of deformable attention')
        common.print_row(
            (
                method,
                name,
                f'{times[name]:.1f}',
                f'{1e3 * args.batch_size / times[name]:.1f}',
                f'{peak_memory(contender) / 1e9:.1f}' if on_gpu else '-',
                count_waits(contender.step) if on_gpu else '-',
                f'{100 * difference:+.1f} %' if same_loss else '-',
            )
        )
    return problems


def make_contenders(flags: Settled, precisions: list[str], batch: Batch) -> dict[str, Contender]:
    """Build contenders with the same weights; a compiled model is a copy."""
    torch.manual_seed(0)
    model, criterion, _ = build_model(flags)
    quieten(model)
    model.to(batch[0].device).train()
    turn_off_dropout(model)
    contenders = {}
    for name in precisions:
        own = copy.deepcopy(model) if 'compile' in name else model
        if own is not model:
            compile_units(own)

        def loss(precision: Precision, own: nn.Module = own) -> Tensor:
            with precision.autocast():
                outputs = own(*batch)
            return weighted_sum(criterion(outputs, batch[1]), criterion.weight_dict)

        contenders[name] = make_contender(own, loss, name, batch[0])
    return contenders


def make_official(
    flags: Settled, precisions: list[str], batch: Batch, ours: nn.Module, extension: ModuleType | None
) -> dict[str, Contender]:
    """Build our model on the path of the official code, which has no 16 bits."""
    model = official_model(flags, ours.state_dict()).to(batch[0].device).train()
    turn_off_dropout(model)
    coefficients = build_supervision(flags)[0].weight_dict
    loss = official_loss(model, coefficients, flags.hybrid_k or 1, batch, extension)
    return {
        f'official path, {name}': make_contender(model, loss, name, batch[0])
        for name in precisions
        if name in ('fp32', 'tf32')
    }


def make_peers(method: str, precisions: list[str], batch: Batch, ours: Settled) -> dict[str, Contender]:
    """Build the same method in the transformers library, in the precisions that need no compiler."""
    if method not in common.PEERS or not (transformers := common.import_transformers()):
        return {}
    try:
        peers = build_peers(transformers, method, precisions, batch, ours)
        for peer in peers.values():
            peer.step()
    except Exception as error:  # another program's, of any version: ours is timed without it
        print(f'{method}: transformers {transformers.__version__} does not train here ({error})')
        return {}
    return peers


def build_peers(
    transformers: ModuleType, method: str, precisions: list[str], batch: Batch, ours: Settled
) -> dict[str, Contender]:
    images, targets = batch
    options = {'two_stage_num_proposals': ours.num_queries, 'auxiliary_loss': True, 'dropout': 0.0}
    model = common.transformers_model(transformers, method, **options).to(images.device).train()
    for name, parameter in model.named_parameters():  # it freezes a ResNet as a whole
        if any(f'.stages.{stage}.' in name for stage in (1, 2, 3)) and 'normalization' not in name:
            parameter.requires_grad_()
    labels = [{'class_labels': target['labels'], 'boxes': target['boxes']} for target in targets]
    mask = torch.ones_like(images[:, 0], dtype=torch.long)

    def loss(precision: Precision) -> Tensor:
        with precision.autocast():
            return model(pixel_values=images, pixel_mask=mask, labels=labels).loss

    return {
        f'transformers {transformers.__version__}, {name}': make_contender(model, loss, name, images)
        for name in precisions
        if 'compile' not in name
    }


def make_contender(
    model: nn.Module, forward: Callable[[Precision], Tensor], name: str, images: Tensor
) -> Contender:
    precision = Precision('bf16' if name.startswith('bf16') else 'off', images.device)
    optimizer = build_optimizer(model, 0.0, 0.0, 0.0)  # weights stay, so that all steps are the same
    trained = list(model.parameters())

    def step() -> Tensor:
        if images.is_cuda:
            set_tf32(not name.startswith('fp32'))
        torch.manual_seed(0)  # what samples queries draws the same
        loss = forward(precision)
        precision.backward(loss)
        precision.step(optimizer, trained, max_norm=0.1)
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Contender(model, optimizer, step)


@torch.no_grad()
def quieten(model: nn.Module) -> None:
    """Lower the variance of a ResNet with random weights and inactive norms.

    It would double block by block; that of trained ones does not, and attention to such numbers says nothing
    about rounding.
    """
    for name, module in model.backbone.named_modules():
        if isinstance(module, FoldedNorm) and name.endswith('bn3'):
            module.weight.fill_(0.2)


def turn_off_dropout(model: nn.Module) -> None:
    """Turn off dropout, so that losses can be compared: kernels that draw by blocks drop other numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, 'dropout') and isinstance(module.dropout, float):
            module.dropout = 0.0


def peak_memory(contender: Contender) -> int:
    """Return the bytes of a step: parameters, optimizer state, and the most that is added to them."""
    states = [x for state in contender.optimizer.state.values() for x in state.values()]
    own = [*contender.model.parameters(), *contender.model.buffers(), *states]
    kept = sum(x.nbytes for x in own if isinstance(x, Tensor) and x.is_cuda)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.step()
    torch.cuda.synchronize()
    return kept + torch.cuda.max_memory_allocated() - before


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
