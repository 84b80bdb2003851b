"""
Swin Transformer (arXiv:2103.14030) for detectors: any image size, a norm for each map that is returned,
official parameter names. ViT has the same blocks and windows. Maps are [B, H, W, C].

Classifiers differ: timm shifts maps before it pads them, and torchvision does not shift a map that fits into
one window.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from .ops.functions import in_torch_export
from .units import call_unit


@dataclass(frozen=True)
class SwinSize:
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int
    weights: str = ''  # name of the official ImageNet file


SWIN_SIZES = {
    'swin_tiny': SwinSize(96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 'swin_tiny_patch4_window7_224'),
    'swin_small': SwinSize(96, (2, 2, 18, 2), (3, 6, 12, 24), 7, 'swin_small_patch4_window7_224'),
    'swin_base': SwinSize(128, (2, 2, 18, 2), (4, 8, 16, 32), 7, 'swin_base_patch4_window7_224_22k'),
    'swin_base_window12': SwinSize(
        128, (2, 2, 18, 2), (4, 8, 16, 32), 12, 'swin_base_patch4_window12_384_22k'
    ),
    'swin_large': SwinSize(192, (2, 2, 18, 2), (6, 12, 24, 48), 7, 'swin_large_patch4_window7_224_22k'),
    'swin_large_window12': SwinSize(
        192, (2, 2, 18, 2), (6, 12, 24, 48), 12, 'swin_large_patch4_window12_384_22k'
    ),
}
WEIGHTS_URL = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/{}.pth'
FORBIDDEN = -100.0  # added to attention logits between tokens from different sides of the map


class Block(nn.Module):
    """Attention and a feed-forward block, each behind a norm, on a map of any size.

    drop_path: probability that an image skips either in training. eps: of the norms.
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
    """Return the probabilities of skipping each block, which grow linearly from 0 to `rate`."""
    return torch.linspace(0, rate, depth, device='cpu').tolist()


class Windows(NamedTuple):
    """Windows of `size` squared tokens over a map, which is padded with zeros at the right and the bottom."""

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
    """Return the number of windows that cover a side.

    In an exported program it is an unbacked integer. Otherwise torch.export expresses each later shape by the
    sides of the images, which takes minutes for each block.
    """
    number = (side + size - 1) // size  # ONNX rounds negative quotients to zero
    if in_torch_export():
        number = torch.full((), number).item()
        torch._check(number >= 1)
        torch._check(number * size >= side)
    return number


class PatchEmbed(nn.Module):
    """A linear projection of patches of 4 x 4 pixels, with zero padding at the right and bottom edges."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Turn [B, 3, H, W] into [B, ceil(H / 4), ceil(W / 4), C]."""
        padded = F.pad(images, (0, 3, 0, 3))  # the convolution leaves out what does not fill a patch
        return self.norm(self.proj(padded).permute(0, 2, 3, 1))


class WindowAttention(nn.Module):
    """Attention within windows of `window_size` squared tokens, which are shifted by `shift` tokens."""

    def __init__(self, dim: int, num_heads: int, window_size: int, shift: int) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.shift = num_heads, window_size, shift
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        place = torch.stack(torch.meshgrid(*[torch.arange(window_size)] * 2, indexing='ij'), dim=-1).flatten(
            0, 1
        )
        distance = place[:, None] - place[None] + window_size - 1  # [N, N, 2] y, x
        index = distance[..., 0] * (2 * window_size - 1) + distance[..., 1]
        self.register_buffer('relative_position_index', index)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend in a map [B, H, W, C], and return the same shape."""
        height, width = x.shape[1:3]
        windows, shift = Windows.cover(height, width, self.window_size), self.shift
        x = windows.pad(x)
        if shift:
            x = x.roll((-shift, -shift), dims=(1, 2))
        x = windows.merge(self.attend(windows.split(x), windows))
        if shift:
            x = x.roll((shift, shift), dims=(1, 2))
        return x[:, :height, :width]

    def attend(self, x: Tensor, windows: Windows) -> Tensor:
        """Attend within each window of x [B, windows, size, size, C]."""
        size = self.window_size
        q, k, v = self.qkv(x.flatten(2, 3)).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # [M, N, N]
        if self.shift:
            bias = bias + self.mask(windows, bias)[:, None]  # [windows, M, N, N]
        # ONNX has scaled_dot_product_attention for four dimensions only, and here it is slower on a CPU.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        attended = scores.softmax(-1) @ v
        return self.proj(attended.transpose(2, 3).flatten(3)).unflatten(2, (size, size))

    def mask(self, windows: Windows, like: Tensor) -> Tensor:
        """Return [windows, N, N]: FORBIDDEN between tokens from different sides of the map, else 0."""
        regions = []
        for side in windows.sides:
            place = torch.arange(side, device=like.device)
            regions.append((place >= side - self.window_size).int() + (place >= side - self.shift).int())
        labels = 3 * regions[0][:, None] + regions[1]  # [H, W]
        labels = windows.split(labels[None, ..., None]).flatten(2)[0]  # [windows, N]
        apart = labels[:, :, None] != labels[:, None]
        return torch.zeros_like(apart, dtype=like.dtype).masked_fill(apart, FORBIDDEN)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PatchMerging(nn.Module):
    """A layer that halves height and width (rounded up, zero padding) and doubles the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        # Always padded: exported shapes have no remainders then.
        x = F.pad(x, (0, 0, 0, 1, 0, 1))
        parts = [
            x[:, row : height + row : 2, column : width + column : 2] for column in (0, 1) for row in (0, 1)
        ]
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))


class SwinStage(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, window_size: int, drop_paths: list[float], last: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(
                dim,
                WindowAttention(dim, num_heads, window_size, shift=window_size // 2 * (index % 2)),
                FeedForward(dim),
                drop_path,
            )
            for index, drop_path in enumerate(drop_paths)
        )
        self.downsample = None if last else PatchMerging(dim)


class SwinTransformer(nn.Module):
    """A backbone that turns images into the normed maps of some stages.

    Args:
        stages: stages whose maps are returned, 1 to 4 of strides 4, 8, 16 and 32. Later stages are not built.
        drop_path_rate: probability of skipping the last block in training; it grows linearly from 0.
    """

    def __init__(
        self,
        size: SwinSize,
        stages: range,
        drop_path_rate: float = 0.2,
    ) -> None:
        super().__init__()
        self.stages = stages
        self.num_channels = [size.embed_dim * 2 ** (stage - 1) for stage in stages]
        self.patch_embed = PatchEmbed(size.embed_dim)
        rates = drop_paths(drop_path_rate, sum(size.depths))
        starts = [0, *accumulate(size.depths)]
        last = stages[-1] - 1
        self.layers = nn.ModuleList(
            SwinStage(
                size.embed_dim * 2**i,
                size.num_heads[i],
                size.window_size,
                rates[starts[i] : starts[i + 1]],
                i == last,
            )
            for i in range(stages[-1])
        )
        for stage, channels in zip(stages, self.num_channels, strict=True):
            self.add_module(f'norm{stage - 1}', nn.LayerNorm(channels))
        self.apply(initialise)

    def units(self) -> list[nn.Module]:
        """Return the blocks for `models.units`."""
        return [block for stage in self.layers for block in stage.blocks]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Turn [B, 3, H, W] into maps [B, C, ceil(H / stride), ceil(W / stride)] by their stages."""
        x, maps = self.patch_embed(images), {}
        for stage, layer in enumerate(self.layers, start=1):
            for block in layer.blocks:
                x = call_unit(block, x)
            if stage in self.stages:
                maps[str(stage)] = getattr(self, f'norm{stage - 1}')(x).permute(0, 3, 1, 2)
            if layer.downsample is not None:
                x = layer.downsample(x)
        return maps


def initialise(module: nn.Module) -> None:
    initialise_linear(module)
    if isinstance(module, WindowAttention):
        nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
