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

    Only this process has read the weights of the backbone. Before an evaluation the buffers of batch norms
    are broadcast, because each rank has its own statistics.
    """
    if get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)
            torch.autograd.graph.increment_version(tensor)  # a broadcast alone does not count as a change


def register_result_types(types: Sequence[type]) -> None:
    """Register dataclasses of the result of a model as pytrees of PyTorch.

    DDP and FSDP look for tensors only in known types. Gradients of other tensors would not be reduced.
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
    """Shard weights, gradients and optimizer states over the ranks (FSDP2), in place.

    Args:
        units: modules that gather their weights for their forward pass and free them afterwards. Methods in
            `entry_points` of a unit or of the model do so too.
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
    # Only contiguous weights can be sharded.
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # not in torch's stubs
    for unit in units:
        fully_shard(unit, **options)
    # By default the outermost weights would stay whole until a backward pass, and an evaluation has none.
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
    """Skip the all-reduce of gradients in the block. Only the last backward pass of a step needs it."""
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
    """Replace shards in a state (of a model, an optimizer) by whole tensors on the CPU of the main process.

    All ranks must call it; the others get None in their place. They hold one whole tensor at a time.
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
        ValueError: their shapes differ.
    """
    if whole.shape != part.shape:
        raise ValueError(f'a tensor is {list(whole.shape)} instead of {list(part.shape)}')
    if not isinstance(part, DTensor):
        return torch.empty_like(part, dtype=whole.dtype, device=whole.device).copy_(whole)
    return distribute_tensor(whole.to(part.device), part.device_mesh, part.placements)


def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole tensors into a model, sharded or not."""
    parts = model.state_dict()
    model.load_state_dict({name: split_like(state[name], part) for name, part in parts.items()})


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load whole tensors into the optimizer of a model, sharded or not.

    Learning rates, weight decay and other options stay those of this run.

    Raises:
        UserError: it is the state of another optimizer, or of other parameters.
    """
    saved_sizes, sizes = (
        [len(group['params']) for group in groups]
        for groups in (state['param_groups'], optimizer.param_groups)
    )
    if saved_sizes != sizes:
        raise UserError(
            f'the checkpoint trains groups of {saved_sizes} parameters, this run of {sizes}: give the '
            '--freeze, --lr_backbone and --lr_..._names of its run, or start from its weights with '
            '--pretrained'
        )
    saved_by_sgd, is_sgd = (
        'momentum' in groups[0] for groups in (state['param_groups'], optimizer.param_groups)
    )
    if saved_by_sgd != is_sgd:
        name, remedy = ('SGD', 'give --sgd') if saved_by_sgd else ('AdamW', 'leave --sgd out')
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
    for group, group_options in zip(optimizer.param_groups, options, strict=True):
        group.update(group_options)
