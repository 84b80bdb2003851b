"""Deterministic weights and images from names alone: the same numbers on any machine.

Element i of the tensor called `name` is the splitmix64 hash of crc32(name) * 2^32 + i, its top 53 bits mapped
to [-1, 1). The recorded numbers of the official implementations were made with these weights.
"""

import math
import zlib

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CHUNK = 1 << 15  # numbers at a time, which stay in the processor's cache


class Unfilled(TorchDispatchMode):
    """Skip random values of parameters, which others overwrite: they take most of the time of building."""

    def __torch_dispatch__(
        self, func: object, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default):
            return args[0]
        return func(*args, **(kwargs or {}))


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 values in [-1, 1)."""
    values = np.empty(math.prod(shape))
    first = (zlib.crc32(name.encode()) << 32) + 0x9E3779B97F4A7C15
    count = np.arange(min(CHUNK, len(values)), dtype=np.uint64)
    with np.errstate(over='ignore'):
        for start in range(0, len(values), CHUNK):
            z = count[: len(values) - start] + np.uint64((first + start) % 2**64)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
                z ^= z >> np.uint64(shift)
                z *= np.uint64(factor)
            values[start : start + CHUNK] = z >> np.uint64(11)
    values /= 2**52
    values -= 1
    return values.reshape(shape)


def parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Value of the parameter or buffer called `name`: a unit-gain matrix, or a number near 0 or 1."""
    u = uniform(name, shape)
    if name.endswith('running_var'):
        return 1 + 0.5 * np.abs(u)
    if len(shape) >= 2:
        return u * math.sqrt(3 / math.prod(shape[1:]))
    is_scale = name.endswith('weight') and not name.endswith('running_mean')
    return 1 + 0.1 * u if is_scale else 0.1 * u


@torch.no_grad()
def fill(module: nn.Module, salt: str = '') -> nn.Module:
    """Give every floating entry of the state dict its value; a shared one takes that of its first name."""
    seen = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and tensor.ndim and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensor.copy_(torch.from_numpy(parameter(salt + name, tuple(tensor.shape))))
    return module


def image(name: str, height: int, width: int) -> Tensor:
    """A normalised [3, height, width] image."""
    return torch.from_numpy(1.5 * uniform(name, (3, height, width)))
