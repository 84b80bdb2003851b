"""
Fold frozen batch norms into the convolutions in front of them, which saves a pass over the feature map.

The weight is multiplied by the norm's factor in every forward, so that it trains as before. Parameters and buffers keep
their places and names. Results differ by rounding.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d


class FoldedNorm(FrozenBatchNorm2d):
    """The identity, with the buffers of a norm that the convolution in front of it applies."""

    def __init__(self, norm: FrozenBatchNorm2d) -> None:
        super().__init__(len(norm.weight), norm.eps)
        for name, buffer in norm.named_buffers():
            setattr(self, name, buffer)

    def factor_and_bias(self) -> tuple[Tensor, Tensor]:
        """Return factor and bias of each channel, [C] each."""
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


def fold_frozen_norms(network: nn.Module) -> None:
    """Fold, in place, every frozen norm that is defined right after its convolution, as torchvision's networks do."""
    for part in list(network.modules()):
        for (name, convolution), (norm_name, norm) in pairwise(list(part.named_children())):
            plain = type(convolution) is nn.Conv2d and convolution.padding_mode == 'zeros'
            if plain and convolution.bias is None and type(norm) is FrozenBatchNorm2d:
                folded = FoldedNorm(norm)
                setattr(part, norm_name, folded)
                setattr(part, name, FoldedConvolution(convolution, folded))
