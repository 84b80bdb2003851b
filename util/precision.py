"""
Mixed precision (arXiv:1710.03740) and TensorFloat-32 in a training step.

Parameters, and all computations on boxes, stay float32. The modules that need this use `without_autocast` and
`full_precision`.
"""

import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from util.distributed.collectives import all_reduce_sum
from util.errors import UserError

DTYPES = {'off': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


class Precision:
    """Precision of forward, backward and optimizer step on a device.

    mode: `off`, `bf16` or `fp16`. The gradients of fp16 are scaled so that small ones do not vanish. If they
    overflow, the step is skipped and the scale is halved.

    Raises:
        UserError: the device does not support the mode.
    """

    def __init__(self, mode: str, device: torch.device) -> None:
        check_mode(mode, device)
        self.device_type, self.dtype = device.type, DTYPES[mode]
        self.scaler = torch.amp.GradScaler(device.type) if mode == 'fp16' else None

    def autocast(self) -> AbstractContextManager:
        """Return a context for the forward pass of the model alone."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device_type, self.dtype)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[Tensor],
        max_norm: float = 0.0,
        losses: Sequence[Tensor] = (),
    ) -> tuple[bool, bool]:
        """Unscale and clip gradients, then step the optimizer if gradient and losses are finite on all ranks.

        Args:
            parameters: trained parameters of the model.
            max_norm: largest norm of their gradient; 0 = no clipping.
            losses: losses of the step, scalars.

        Returns:
            Whether the optimizer made a step, and whether all values are finite; both the same on all ranks.
            This waits for the device. With fp16 a gradient that is not finite counts as finite if the losses
            are finite, since its scale may be the reason.
        """
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        parameters = list(parameters)
        if max_norm > 0:
            norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        values = torch.stack([norm, *(loss.detach().to(norm) for loss in losses)])
        bad_norm, *bad_losses = all_reduce_sum((~values.isfinite()).float()).tolist()
        made = not (bad_norm or any(bad_losses))
        if self.scaler is None:
            if made:
                optimizer.step()
            return made, made
        if made:
            self.scaler.step(optimizer)
        self.scaler.update()
        return made, not any(bad_losses)

    def state_dict(self) -> dict:
        """Return the state of the scaler; {} without one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Load the state of the scaler. {}, of a run in another precision, keeps the initial scale."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


def check_mode(mode: str, device: torch.device) -> None:
    if mode not in DTYPES:
        raise UserError(f'unknown precision {mode}: choose of {", ".join(DTYPES)}')
    if mode == 'off':
        return
    if not torch.amp.is_autocast_available(device.type):
        raise UserError(f'{mode} needs autocast, which {device.type} devices do not have: turn it off')
    if mode == 'fp16' and device.type not in ('cpu', 'cuda'):
        raise UserError(
            f'fp16 needs scaled gradients, which are for CUDA and CPU, not {device.type}: use bf16'
        )
    if mode == 'bf16' and device.type == 'cuda' and not torch.cuda.is_bf16_supported(False):
        raise UserError(f'{torch.cuda.get_device_name(device)} does not compute in bf16: use fp16')


def set_tf32(allowed: bool | None) -> None:
    """Allow or forbid TensorFloat-32 (10 bits of the mantissa) for float32 products on a GPU.

    None keeps PyTorch's default: exact matrix products and TF32 convolutions.
    """
    if allowed is None:
        return
    with warnings.catch_warnings():
        # PyTorch 2.9 and 2.10 recommend a new interface here, but their compiler reads this one, and refuses
        # both together.
        warnings.filterwarnings('ignore', message='.*TF32')
        torch.set_float32_matmul_precision('high' if allowed else 'highest')
        torch.backends.cudnn.allow_tf32 = allowed


def avoid_plans_per_shape() -> None:
    """Turn off the attention of cuDNN, which PyTorch prefers on Hopper in 16 bits.

    It builds a plan for every new shape, and images and query groups have many shapes.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context in which operations on the device of x keep the precision of their inputs."""
    # Exported programs cannot contain a context, so there is none where it would change nothing.
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def full_precision(x: Tensor) -> Tensor:
    """Convert 16-bit numbers to float32; return others unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
