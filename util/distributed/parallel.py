"""One model on many devices: replicated (DistributedDataParallel), or sharded (FSDP2)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm

from util.distributed.collectives import get_world_size, is_main_process
from util.errors import UserError

REGISTERED: set[type] = set()


def broadcast_from_main(tensors: Iterable[Tensor]) -> None:
    """Broadcast tensors from the main process to all ranks.

    It alone has read the weights of the backbone. Before an evaluation the buffers of batch norms are
    broadcast, because each rank has its own statistics.
    """
    if get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)
            torch.autograd.graph.increment_version(tensor)  # a broadcast does not count as a change by itself


def register_result_types(types: Sequence[type]) -> None:
    """Register dataclasses in a model's result with PyTorch's pytrees.

    DDP and FSDP look for tensors in known types only; gradients that come back another way are not reduced.
    """
    for kind in types:
        if kind not in REGISTERED:
            torch.export.register_dataclass(kind)
            REGISTERED.add(kind)


def replicate(model: nn.Module, result_types: Sequence[type] = (), accum_steps: int = 1) -> nn.Module:
    """Wrap a model in DistributedDataParallel: gradients are averaged over ranks during the backward pass.

    static_graph detects unused parameters once; it cannot be combined with no_sync (several batches per
    step). Buffers are constants that each rank has, unless batch norms train. result_types: see
    `register_result_types`.
    """
    register_result_types(result_types)
    trains_norms = any(isinstance(module, _BatchNorm) for module in model.modules())
    return nn.parallel.DistributedDataParallel(
        model, static_graph=accum_steps == 1, gradient_as_bucket_view=True, broadcast_buffers=trains_norms
    )


def shard(model: nn.Module, units: Sequence[nn.Module], result_types: Sequence[type] = ()) -> nn.Module:
    """Let every rank keep a part of each weight, gradient and optimizer state (FSDP2). In place.

    Args:
        units: modules that all-gather their weights for their forward and free them afterwards.
            `entry_points` of these and of the model name further methods that do so.
        result_types: see `register_result_types`.

    Parameters without a dimension cannot be sharded: they stay whole, and their gradients are averaged one by
    one.
    """
    register_result_types(result_types)
    whole = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for parameter in whole:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average_gradient)
    options: dict[str, Any] = {'ignored_params': whole} if whole else {}
    # Only contiguous weights can be cut.
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # not in torch's stubs
    for unit in units:
        fully_shard(unit, **options)
    # By default the outermost weights would stay whole until a backward pass, which does not follow an
    # evaluation.
    fully_shard(model, reshard_after_forward=True, **options)
    for unit in [*units, model]:
        for method in getattr(unit, 'entry_points', ()):
            register_fsdp_forward_method(unit, method)
    return model


def average_gradient(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= get_world_size()


def local_gradients(model: nn.Module) -> AbstractContextManager:
    """Skip the all-reduce of gradients in the block; only the last backward pass of a step does it."""
    if isinstance(model, FSDPModule):
        return without_exchange(model)
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


@contextmanager
def without_exchange(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def gather(state: object) -> object:
    """Replace shards by whole tensors in a state (of a model, an optimizer): on the CPU of the main process,
    by None on others.

    All ranks must call it. They hold one whole tensor at a time.
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if is_main_process() else None
    if isinstance(state, dict):
        return {key: gather(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gather(value) for value in state]
    return state


def split_like(whole: Tensor, part: Tensor) -> Tensor:
    """Return this rank's shard of a whole tensor, sharded as `part` is.

    If `part` is not sharded, return the tensor in the memory layout of `part`: fused optimizers read states
    and weights side by side.

    Raises:
        ValueError: the two are of other shapes.
    """
    if whole.shape != part.shape:
        raise ValueError(f'a tensor is {list(whole.shape)} instead of {list(part.shape)}')
    if not isinstance(part, DTensor):
        return torch.empty_like(part, dtype=whole.dtype, device=whole.device).copy_(whole)
    return distribute_tensor(whole.to(part.device), part.device_mesh, part.placements)


def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole tensors into a model, sharded or not."""
    ours = model.state_dict()
    model.load_state_dict({name: split_like(state[name], ours[name]) for name in ours})


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load whole tensors into the optimizer of a model, sharded or not. Rates, weight decay and the like stay
    those of this run.

    Raises:
        UserError: it is the state of another optimizer, or of other parameters.
    """
    theirs, ours = (
        [len(group['params']) for group in groups]
        for groups in (state['param_groups'], optimizer.param_groups)
    )
    if theirs != ours:
        raise UserError(
            f'the checkpoint trains groups of {theirs} parameters, this run of {ours}: give the --freeze, '
            '--lr_backbone and --lr_..._names of its run, or start from its weights with --pretrained'
        )
    saved, here = state['param_groups'][0], optimizer.param_groups[0]
    if ('momentum' in saved) != ('momentum' in here):
        name, remedy = ('SGD', 'give --sgd') if 'momentum' in saved else ('AdamW', 'leave --sgd out')
        raise UserError(
            f'the checkpoint was trained with {name}: {remedy}, or start from its weights with --pretrained'
        )
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    parts = {
        index: {
            name: split_like(value, parameters[index]) if isinstance(value, Tensor) and value.dim() else value
            for name, value in entry.items()
        }
        for index, entry in state['state'].items()
    }
    options = [
        {name: value for name, value in group.items() if name != 'params'} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state | {'state': parts})
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
