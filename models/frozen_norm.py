"""
Fold frozen batch norms into the convolutions in front of them, which saves a pass over the feature map.

Each forward multiplies the weight by the norm's constant factor, so that it trains as before. Parameters and
buffers keep their names. Results differ by rounding.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from util.precision import without_autocast


class FoldedNorm(FrozenBatchNorm2d):
    """The identity, with the buffers of a norm that the convolution in front of it applies."""

    # Factor and bias, the buffers that they were computed from, and the state of these.
    _cache: tuple[tuple[Tensor, Tensor], list[Tensor], list[tuple[int, int]]] | None = None

    def __init__(self, norm: FrozenBatchNorm2d) -> None:
        super().__init__(len(norm.weight), norm.eps)
        for name, buffer in norm.named_buffers():
            setattr(self, name, buffer)

    def factor_and_bias(self) -> tuple[Tensor, Tensor]:
        """Return factor and bias [C] of each channel, computed again if a buffer was written or replaced."""
        buffers = [self.weight, self.bias, self.running_mean, self.running_var]
        if not may_cache(buffers):
            return self.compute()
        state = [(id(buffer), buffer._version) for buffer in buffers]
        if self._cache is None or self._cache[2] != state:
            # The cache holds the buffers too, so that no other tensor gets their ids.
            with without_autocast(buffers[0]):
                self._cache = self.compute(), buffers, state
        return self._cache[0]

    def compute(self) -> tuple[Tensor, Tensor]:
        factor = self.weight * (self.running_var + self.eps).rsqrt()
        return factor, self.bias - self.running_mean * factor

    def forward(self, x: Tensor) -> Tensor:
        return x


class FoldedConvolution(nn.Module):
    """A convolution without bias that also applies the frozen norm behind it."""

    def __init__(self, convolution: nn.Conv2d, norm: FoldedNorm) -> None:
        super().__init__()
        self.weight = convolution.weight
        self.options = {
            name: getattr(convolution, name) for name in ('stride', 'padding', 'dilation', 'groups')
        }
        self._norm = (norm,)  # in a tuple, since it is already registered elsewhere in the network

    def forward(self, x: Tensor) -> Tensor:
        factor, bias = self._norm[0].factor_and_bias()
        return F.conv2d(x, self.weight * factor.view(-1, 1, 1, 1), bias, **self.options)


def may_cache(buffers: list[Tensor]) -> bool:
    """Return whether what is computed from buffers may be cached until they change.

    Compiled, exported and recorded programs must read the buffers themselves. Tensors of inference mode
    cannot be used in a backward pass, and their changes are not counted.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    recorded = buffers[0].is_cuda and torch.cuda.is_current_stream_capturing()
    return not (recorded or any(buffer.is_inference() or buffer.requires_grad for buffer in buffers))


def fold_frozen_norms(network: nn.Module) -> None:
    """Fold, in place, every frozen norm that is defined right after its convolution, as in torchvision."""
    for part in list(network.modules()):
        for (name, convolution), (norm_name, norm) in pairwise(list(part.named_children())):
            plain = type(convolution) is nn.Conv2d and convolution.padding_mode == 'zeros'
            if plain and convolution.bias is None and type(norm) is FrozenBatchNorm2d:
                folded = FoldedNorm(norm)
                setattr(part, norm_name, folded)
                setattr(part, name, FoldedConvolution(convolution, folded))
