"""Windows of a map, for backbones that attend within them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.functions import is_exporting


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

    In an exported program this is a number without a history. Else PyTorch derives each later shape from the sides of the
    images, which takes minutes for each block.
    """
    number = (side + size - 1) // size  # ONNX rounds negative quotients to zero
    if is_exporting():
        number = torch.full((), number).item()
        torch._check(number >= 1)
        torch._check(number * size >= side)
    return number
