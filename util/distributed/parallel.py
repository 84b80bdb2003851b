"""One model on many devices: the same on each (DistributedDataParallel), or a part of every weight on each (FSDP2)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm

from util.distributed.collectives import get_world_size

KNOWN: set[type] = set()


def broadcast_from_main(tensors: Iterable[Tensor]) -> None:
    """Every process takes those of the main process: weights, since it alone has read the backbone's; buffers before an
    evaluation, since statistics of batch norms are those of each process.
    """
    if get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def know_results(types: Sequence[type]) -> None:
    """Dataclasses in what a model returns: wrappers look for tensors in known types only, and gradients that come back
    another way are not exchanged.
    """
    for kind in types:
        if kind not in KNOWN:
            torch.export.register_dataclass(kind)
            KNOWN.add(kind)


def replicate(model: nn.Module, result_types: Sequence[type] = (), accum_steps: int = 1) -> nn.Module:
    """Gradients are averaged over processes while the backward pass runs. The graph is the same in every step: what no
    loss reaches is found once (not with several batches a step: PyTorch cannot have both). Buffers are those of each process, since they are constants, unless batch norms train. result_types: see `know_results`.
    """
    know_results(result_types)
    trains_norms = any(isinstance(module, _BatchNorm) for module in model.modules())
    return nn.parallel.DistributedDataParallel(
        model, static_graph=accum_steps == 1, gradient_as_bucket_view=True, broadcast_buffers=trains_norms
    )


def shard(model: nn.Module, units: Sequence[nn.Module], result_types: Sequence[type] = ()) -> nn.Module:
    """Let every process keep a part of each weight, gradient and optimizer state (FSDP2). In place.

    units: modules that gather their weights as they run, and let them go again; what they list as `entry_points` are methods
    besides forward that do so too. Numbers without a dimension cannot be cut: they stay whole, and their gradients are averaged
    one by one. result_types: see `know_results`.
    """
    know_results(result_types)
    whole = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for parameter in whole:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average_gradient)
    options: dict[str, Any] = {'ignored_params': whole} if whole else {}
    # Only contiguous weights can be cut.
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # not in torch's stubs
    for unit in units:
        fully_shard(unit, **options)
        for method in getattr(unit, 'entry_points', ()):
            register_fsdp_forward_method(unit, method)
    # By default the outermost weights would stay whole until a backward pass, which does not follow an evaluation.
    fully_shard(model, reshard_after_forward=True, **options)
    return model


def average_gradient(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= get_world_size()


def local_gradients(model: nn.Module) -> AbstractContextManager:
    """Backward passes inside do not exchange gradients between processes: the last one of a step does."""
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
    """A state (of a model, an optimizer) with whole tensors in place of parts; on the host, if there were any. All processes
    must call it.
    """
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, dict):
        return {key: gather(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gather(value) for value in state]
    return state


def split_like(whole: Tensor, part: Tensor) -> Tensor:
    """Cut this process's part out of a whole tensor, as `part` is cut; where nothing is cut, lay it out in memory as `part`
    lies: fused optimizers read states and weights side by side.
    """
    if not isinstance(part, DTensor):
        return torch.empty_like(part, dtype=whole.dtype, device=whole.device).copy_(whole)
    return distribute_tensor(whole.to(part.device), part.device_mesh, part.placements)


def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Whole tensors into a model, sharded or not."""
    ours = model.state_dict()
    model.load_state_dict({name: split_like(state[name], ours[name]) for name in ours})


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Whole tensors into the optimizer of a model, sharded or not."""
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    parts = {
        index: {
            name: split_like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in entry.items()
        }
        for index, entry in state['state'].items()
    }
    kinds = [{kind: group.get(kind) for kind in ('fused', 'foreach')} for group in optimizer.param_groups]
    optimizer.load_state_dict(state | {'state': parts})
    for group, kind in zip(optimizer.param_groups, kinds, strict=True):
        group.update(kind)  # how steps are computed depends on this run, not on the one that saved
