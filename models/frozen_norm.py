"""
Frozen batch norms inside the convolutions in front of them: a factor and a bias a channel need no pass over the map.

The weight is multiplied in every forward, so that it trains as before. Parameters and buffers keep their places and
names; results differ by rounding.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d


class FoldedNorm(FrozenBatchNorm2d):
    """Holds the buffers of a norm whose work is done by the convolution in front of it."""

    def __init__(self, norm: FrozenBatchNorm2d) -> None:
        super().__init__(len(norm.weight), norm.eps)
        for name, buffer in norm.named_buffers():
            setattr(self, name, buffer)

    def factor_and_bias(self) -> tuple[Tensor, Tensor]:
        """[C] twice, of each channel."""
        factor = self.weight * (self.running_var + self.eps).rsqrt()
        return factor, self.bias - self.running_mean * factor

    def forward(self, x: Tensor) -> Tensor:
        return x


class FoldedConvolution(nn.Module):
    """A convolution without bias, and the frozen norm behind it."""

    def __init__(self, convolution: nn.Conv2d, norm: FoldedNorm) -> None:
        super().__init__()
        self.weight = convolution.weight
        self.options = {
            name: getattr(convolution, name) for name in ('stride', 'padding', 'dilation', 'groups')
        }
        self._norm = (norm,)  # in a tuple: as a part of the network it stands elsewhere

    def forward(self, x: Tensor) -> Tensor:
        factor, bias = self._norm[0].factor_and_bias()
        return F.conv2d(x, self.weight * factor.view(-1, 1, 1, 1), bias, **self.options)


def fold_frozen_norms(network: nn.Module) -> None:
    """In place, wherever a frozen norm is defined next to the convolution that it follows, as in torchvision's ResNet
    and MobileNetV2.
    """
    for part in list(network.modules()):
        for (name, convolution), (norm_name, norm) in pairwise(list(part.named_children())):
            plain = type(convolution) is nn.Conv2d and convolution.padding_mode == 'zeros'
            if plain and convolution.bias is None and type(norm) is FrozenBatchNorm2d:
                folded = FoldedNorm(norm)
                setattr(part, norm_name, folded)
                setattr(part, name, FoldedConvolution(convolution, folded))
