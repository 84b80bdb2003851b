"""What Swin and ViT share: windows of a map, blocks, and initial values. Maps are [B, H, W, C]."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from .ops.functions import is_exporting


class Block(nn.Module):
    """Attention and a feed-forward block in front of which norms stand, on a map of any size.

    drop_path: probability that an image skips the branch of either while training. eps: of the norms.
    """

    def __init__(
        self, dim: int, attention: nn.Module, mlp: nn.Module, drop_path: float, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attention
        self.drop_path = StochasticDepth(drop_path, 'row')
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def initialise_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_paths(rate: float, depth: int) -> list[float]:
    """Return the probabilities with which blocks are skipped, which grow linearly from 0 to `rate`."""
    return torch.linspace(0, rate, depth, device='cpu').tolist()


class Windows(NamedTuple):
    """A grid of windows of `size` squared tokens over a map, padded with zeros at the right and bottom edges."""

    rows: int
    columns: int
    size: int

    @classmethod
    def cover(cls, height: int, width: int, size: int) -> 'Windows':
        return cls(count(height, size), count(width, size), size)

    @property
    def sides(self) -> tuple[int, int]:
        """Return height and width of the padded map."""
        return self.rows * self.size, self.columns * self.size

    def pad(self, x: Tensor) -> Tensor:
        """Pad a map [B, H, W, C] to `sides`."""
        height, width = self.sides
        return F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))

    def split(self, x: Tensor) -> Tensor:
        """Split a padded map [B, H, W, C] into windows [B, rows * columns, size, size, C]."""
        x = x.unflatten(2, (self.columns, self.size)).unflatten(1, (self.rows, self.size))
        return x.transpose(2, 3).flatten(1, 2)

    def merge(self, windows: Tensor) -> Tensor:
        """Undo `split`."""
        x = windows.unflatten(1, (self.rows, self.columns)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)


def count(side: int, size: int) -> int:
    """Return how many windows cover a side.

    In an exported program this is an unbacked integer. Otherwise torch.export expresses each later shape
    through the sides of the images, which takes minutes for each block.
    """
    number = (side + size - 1) // size  # ONNX rounds negative quotients to zero
    if is_exporting():
        number = torch.full((), number).item()
        torch._check(number >= 1)
        torch._check(number * size >= side)
    return number
