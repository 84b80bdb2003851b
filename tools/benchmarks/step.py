"""
Time of a whole training step (forward, losses, backward, clipping, optimizer) of each method in each precision, as a
table in markdown.

Models of the transformers library with their losses stand beside ours, and, where it fits, our model on the path of the
official code (`official_path.py`). R50, random weights, 7 objects per image.
"""

import argparse
import copy
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from engine import build_optimizer
from models import build_model
from models.frozen_norm import FoldedNorm
from models.ops.functions import describe, implementation
from models.training import build_supervision
from models.training.criterion import weighted_sum
from models.units import compile_units
from tools.benchmarks.inputs import TRICKS, limit_queries, random_objects
from tools.benchmarks.official_op import add_official, load_official
from tools.benchmarks.official_path import official_loss, official_model
from tools.benchmarks.timing import time_in_turn
from util.config.settle import settle
from util.errors import UserError
from util.precision import Precision, avoid_plans_per_shape, set_tf32

WIDE = TRICKS | {'dim_feedforward': 2048, 'dropout': 0.0}
MODELS = {
    'DETR': {},
    'Conditional DETR': {'conditional': True},
    'Deformable DETR, two stages': {'with_box_refine': True, 'two_stage': True},
    'H-Deformable-DETR': WIDE | {'hybrid_queries': 1500, 'hybrid_k': 6},
    'MS-DETR': WIDE | {'num_queries': 900, 'use_ms_detr': True, 'use_aux_ffn': True},
    'Co-Deformable-DETR': WIDE | {'co_aux_heads': ['faster_rcnn', 'atss']},
    'Co-DINO, five levels': {
        'dino': True,
        'num_feature_levels': 5,
        'num_queries': 900,
        'dn_number': 100,
        'co_aux_heads': ['faster_rcnn', 'atss'],
    },
}
# Models of the transformers library, and which stages of the backbone they read.
PEERS = {
    'DETR': ('Detr', ['stage4'], {}),
    'Conditional DETR': ('ConditionalDetr', ['stage4'], {}),
    'Deformable DETR, two stages': (
        'DeformableDetr',
        ['stage2', 'stage3', 'stage4'],
        {'with_box_refine': True, 'two_stage': True},
    ),
}
# Methods whose official losses `reference_criterion.py` computes.
OFFICIAL = ('Deformable DETR, two stages', 'H-Deformable-DETR')
PRECISIONS = ('fp32', 'tf32', 'bf16', 'bf16 + compile')
# Predictions, not measurements, of one image of 800 x 1333, forward and backward, from counted operations and bytes of
# the official code at rates of an H200 (67, 350 and 650 TFLOP/s in fp32, TF32 and bf16; 4.3 TB/s): milliseconds of matrix
# products and convolutions in each of these, milliseconds of reading and writing for all other operators in 32 bits
# (half of it in 16), milliseconds of deformable attention.
FLOOR_SIZE = (800, 1333)
# How much slower the memory of other GPUs with such units is.
FLOOR_CARDS = {'H200': 1.0, 'H100': 4.3 / 3.0}
FLOORS = {
    'DETR': ((8.0, 1.5, 0.8), 3.1, 0.0),
    'Conditional DETR': ((8.3, 1.6, 0.9), 3.5, 0.0),
    'Deformable DETR, two stages': ((17.6, 3.4, 1.8), 7.2, 3.5),
    'H-Deformable-DETR': ((26.3, 5.0, 2.7), 8.0, 3.7),
    'MS-DETR': ((25.3, 4.8, 2.6), 7.1, 3.6),
    'Co-Deformable-DETR': ((31.0, 5.9, 3.2), 10.0, 3.8),
    'Co-DINO, five levels': ((87.0, 17.0, 9.0), 26.0, 14.0),
}
# Largest share by which the loss may differ from that of the first precision: other proposals and pairs are chosen for a
# rounding.
AGREE = 0.05


@dataclass
class Contender:
    """Model in one precision; a peer's loss is its own."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[], Tensor]  # returns the loss


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('step', help='a training step of each method in each precision')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--height', default=800, type=int)
    parser.add_argument('--width', default=1333, type=int)
    parser.add_argument('--batch_size', default=2, type=int)
    parser.add_argument('--models', nargs='+', default=list(MODELS), choices=MODELS, help='(default: all)')
    parser.add_argument(
        '--precisions', nargs='+', default=PRECISIONS, choices=PRECISIONS, help='(default: all)'
    )
    parser.add_argument(
        '--threads', default=torch.get_num_threads(), type=int, help='CPU threads (default: all)'
    )
    parser.add_argument('--rounds', default=20, type=int, help='timed rounds of each contender')
    add_official(parser)
    parser.set_defaults(run=benchmark_steps)


def benchmark_steps(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    avoid_plans_per_shape()
    on_gpu = args.device == 'cuda'
    precisions = [name for name in args.precisions if on_gpu or name != 'tf32']  # CPUs have none
    name = torch.cuda.get_device_name() if on_gpu else f'CPU, {args.threads} thread(s)'
    print(
        f'A training step, R50, {args.batch_size} x {args.height} x {args.width}, {name}, PyTorch {torch.__version__}, '
        f'median of {args.rounds} rounds in turn; {describe(args.device)}.\n'
    )
    print('| method | precision | ms | images/s | peak GB | waits | loss | floor ms | of the floor |')
    print('| --- | --- | --- | --- | --- | --- | --- | --- | --- |')
    problems = []
    extension = load_official(args.official) if args.official else None
    for method in args.models:
        try:
            benchmark_method(method, precisions, args, extension, problems)
        except torch.OutOfMemoryError as error:
            problems.append(f'{method}: out of memory ({str(error).splitlines()[0]})')
        if on_gpu:
            torch.cuda.empty_cache()
    if problems:
        raise UserError('; '.join(problems))


def benchmark_method(
    method: str,
    precisions: list[str],
    args: argparse.Namespace,
    extension: ModuleType | None,
    problems: list[str],
) -> None:
    """Print a row per contender.

    problems: gets a sentence for each loss that differs from that of the first precision, and for each contender of ours that
    does not call the operator of deformable attention.
    """
    batch = make_batch(args)
    flags = method_flags(method, args)
    contenders = make_contenders(flags, precisions, batch)
    ours = list(contenders)
    if method in OFFICIAL:
        contenders |= make_official(flags, precisions, batch, contenders[ours[0]].model, extension)
    contenders |= make_peers(method, precisions, batch, flags)
    losses = {name: contender.step().item() for name, contender in contenders.items()}
    expected = losses[precisions[0]]
    times = time_in_turn({name: c.step for name, c in contenders.items()}, args.rounds, args.device)
    for name, contender in contenders.items():
        same_loss, difference = not name.startswith('transformers'), losses[name] / expected - 1
        if same_loss and not abs(difference) <= AGREE:
            problems.append(f'{method}: the loss in {name} is {losses[name]:g}, not {expected:g}')
        if name in ours and lacks_operator(flags, args.device, contender.step):
            problems.append(f'{method}: {name} does not call the operator of deformable attention')
        on_gpu = args.device == 'cuda'
        floor = floor_of(method, name, args) if name in ours else None
        cells = [
            f'{times[name]:.1f}',
            f'{1e3 * args.batch_size / times[name]:.1f}',
            f'{peak_memory(contender) / 1e9:.1f}' if on_gpu else '-',
            str(count_waits(contender.step)) if on_gpu else '-',
            f'{100 * difference:+.1f} %' if same_loss else '-',
            '-' if floor is None else f'{floor:.1f}',
            '-' if floor is None else f'{100 * floor / times[name]:.0f} %',
        ]
        print(f'| {method} | {name} | {" | ".join(cells)} |', flush=True)


def make_batch(args: argparse.Namespace) -> tuple[Tensor, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.height, args.width, device=args.device)
    return images, [random_objects(7, args.device) for _ in range(args.batch_size)]


def method_flags(method: str, args: argparse.Namespace) -> Namespace:
    return limit_queries(
        settle(Namespace(**MODELS[method], backbone_weights='none')), args.height, args.width
    )


def make_contenders(flags: Namespace, precisions: list[str], batch: tuple) -> dict[str, Contender]:
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
        contenders[name] = make_contender(own, our_loss(own, criterion, batch), name, batch[0])
    return contenders


def our_loss(model: nn.Module, criterion: nn.Module, batch: tuple) -> Callable[[Precision], Tensor]:
    def loss(precision: Precision) -> Tensor:
        with precision.autocast():
            outputs = model(*batch)
        return weighted_sum(criterion(outputs, batch[1]), criterion.weight_dict)

    return loss


def make_official(
    flags: Namespace, precisions: list[str], batch: tuple, ours: nn.Module, extension: ModuleType | None
) -> dict[str, Contender]:
    """Build our model on the path of the official code, which knows no 16 bits."""
    model = official_model(flags, ours.state_dict()).to(batch[0].device).train()
    turn_off_dropout(model)
    coefficients = build_supervision(flags)[0].weight_dict
    loss = official_loss(model, coefficients, flags.hybrid_k or 1, batch, extension)
    return {
        f'official path, {name}': make_contender(model, loss, name, batch[0])
        for name in precisions
        if name in ('fp32', 'tf32')
    }


def make_peers(method: str, precisions: list[str], batch: tuple, ours: Namespace) -> dict[str, Contender]:
    """Build the same method in the transformers library, in the precisions that need no compiler."""
    if method not in PEERS:
        return {}
    try:
        import transformers
    except ImportError:
        print('transformers is not installed: not compared with it')
        return {}
    try:
        peers = build_peers(method, precisions, batch, ours)
        for peer in peers.values():
            peer.step()
    except Exception as error:  # another program's, of any version: ours is timed without it
        print(f'{method}: transformers {transformers.__version__} does not train here ({error})')
        return {}
    return peers


def build_peers(method: str, precisions: list[str], batch: tuple, ours: Namespace) -> dict[str, Contender]:
    import transformers

    family, stages, flags = PEERS[method]
    backbone = transformers.ResNetConfig(out_features=stages)
    options = {'use_timm_backbone': False, 'use_pretrained_backbone': False, 'backbone_config': backbone}
    config = getattr(transformers, f'{family}Config')(
        **options,
        **flags,
        two_stage_num_proposals=ours.num_queries,
        num_labels=91,
        auxiliary_loss=True,
        dropout=0.0,
    )
    images, targets = batch
    model = getattr(transformers, f'{family}ForObjectDetection')(config).to(images.device).train()
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
            set_tf32(name != 'fp32')
        torch.manual_seed(0)  # what samples queries draws the same
        loss = forward(precision)
        precision.backward(loss)
        precision.step(optimizer, trained, max_norm=0.1)
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Contender(model, optimizer, step)


@torch.no_grad()
def quieten(model: nn.Module) -> None:
    """Lower the variance of a ResNet with random weights and inactive norms, which would double block by block.

    Trained ones do not, and attention to such numbers says nothing about rounding.
    """
    for name, module in model.backbone.named_modules():
        if isinstance(module, FoldedNorm) and name.endswith('bn3'):
            module.weight.fill_(0.2)


def turn_off_dropout(model: nn.Module) -> None:
    """Turn off dropout, so that losses can be compared: rounding changes what kernels drop that draw by blocks."""
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


def lacks_operator(flags: Namespace, device: str, step: Callable[[], object]) -> bool:
    """Tell whether a step of Deformable DETR leaves out the operator, though this device has kernels of it."""
    if flags.family != 'deformable' or implementation(device) == 'pytorch':
        return False
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        step()
    return all(event.key != 'detr::ms_deform_attn' for event in trace.key_averages())


def floor_of(method: str, precision: str, args: argparse.Namespace) -> float | None:
    """Return the least milliseconds of a step: b x (products + other operators + deformable attention).

    Other GPUs and sizes, for which the numbers do not hold, give None.
    """
    if args.device != 'cuda' or (args.height, args.width) != FLOOR_SIZE:
        return None
    slower = next((x for card, x in FLOOR_CARDS.items() if card in torch.cuda.get_device_name()), None)
    if slower is None:
        return None
    products, others, attention = FLOORS[method]
    kind = min(PRECISIONS.index(precision), 2)
    return args.batch_size * (products[kind] + slower * others * (0.5 if kind == 2 else 1.0) + attention)
