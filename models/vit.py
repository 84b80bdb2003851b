"""
ViT with windows (EVA-02, arXiv:2303.11331) and a simple feature pyramid (ViTDet, arXiv:2203.16527), as
Co-DETR uses them.

The network has one stride and no class token. Most blocks attend within windows, some over the whole map.
Positions are learned (absolute) and rotary. Parameter names are the official ones; rotary tables are
computed, not loaded.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from util.errors import UserError

from .swin import Block, Windows, drop_paths, initialise_linear
from .units import call_unit

PATCH = 16  # pixels of a side; the stride
ROTARY_SIDE = 16  # positions along an axis are scaled to this number, whatever its length
ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class ViTSize:
    """Sizes of a ViT.

    position_grid: side of the grid of learned positions, tokens.
    window_size: side of a window, tokens.
    global_blocks: indices of the blocks that attend over the whole map.
    fixed_grid: side of the only map that global blocks take, tokens; None: any map.
    """

    embed_dim: int
    depth: int
    num_heads: int
    position_grid: int
    window_size: int
    global_blocks: tuple[int, ...]
    fixed_grid: int | None = None


# Co-DETR's networks: for images of any size, and for squares of 1536 pixels (large-scale jitter).
VIT_SIZES = {
    'vit_large': ViTSize(1024, 24, 16, 32, 24, (3, 7, 11, 15, 19, 23)),
    'vit_large_lsj': ViTSize(1024, 24, 16, 32, 16, (2, 5, 8, 11, 14, 17, 20, 23), fixed_grid=96),
}


def rotary_table(height: int, width: int, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [H * W, channels] of the rotary embedding of a map's positions, in float32.

    The first half of the channels belongs to the row, the second to the column. Two channels have each angle.
    """
    half = channels // 2
    rates = 1 / ROTARY_BASE ** (torch.arange(0, half, 2, device=device).float() / half)
    angles = []
    for side in (height, width):
        place = torch.arange(side, device=device).float() / side * ROTARY_SIDE
        angles.append((place[:, None] * rates).repeat_interleave(2, dim=-1))
    rows = angles[0][:, None].expand(height, width, half)
    columns = angles[1][None].expand(height, width, half)
    table = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return table.cos(), table.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent pairs of channels of x [..., N, C] by the angles of a table [N, C]."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class RotaryAttention(nn.Module):
    """Self-attention with rotary queries and keys, within windows or over the whole map. Keys have no bias.

    window_size: side of a window; None: no windows.
    """

    def __init__(self, size: ViTSize, window_size: int | None) -> None:
        super().__init__()
        dim = size.embed_dim
        self.num_heads, self.window_size, self.fixed_grid = size.num_heads, window_size, size.fixed_grid
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend in a map [B, H, W, C], and return the same shape.

        Raises:
            UserError: the map does not have the `fixed_grid` of the network.
        """
        if self.window_size is None:
            if self.fixed_grid is not None and x.shape[1:3] != (self.fixed_grid, self.fixed_grid):
                side = PATCH * self.fixed_grid
                raise UserError(
                    f'this ViT is for images of {side} x {side} pixels, not {PATCH * x.shape[1]} x '
                    f'{PATCH * x.shape[2]}: give --aug lsj --img_size {side}, or --backbone vit_large'
                )
            return self.attend(x)
        batch, height, width = x.shape[:3]
        windows = Windows.cover(height, width, self.window_size)
        x = windows.split(windows.pad(x))  # padding takes part
        x = self.attend(x.flatten(0, 1)).unflatten(0, (batch, windows.rows * windows.columns))
        return windows.merge(x)[:, :height, :width]

    def attend(self, x: Tensor) -> Tensor:
        """Attend among all tokens of each map [B, H, W, C]."""
        height, width = x.shape[1:3]
        cos, sin = rotary_table(height, width, x.shape[-1] // self.num_heads, x.device)
        tokens = x.flatten(1, 2)
        q = F.linear(tokens, self.q_proj.weight, self.q_bias)
        v = F.linear(tokens, self.v_proj.weight, self.v_bias)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, self.k_proj(tokens), v))
        attended = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.proj(attended.transpose(1, 2).flatten(2)).unflatten(1, (height, width))


class SwiGLU(nn.Module):
    """A gated feed-forward block with a norm in the middle."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(dim * 4 * 2 / 3)
        self.w1, self.w2 = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=1e-6)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class PatchEmbed(nn.Module):
    """A linear projection of patches of 16 x 16 pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, stride=PATCH)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).permute(0, 2, 3, 1)


class VisionTransformer(nn.Module):
    """A backbone that turns images into one map of stride 16.

    Args:
        drop_path_rate: probability of skipping the last block in training; it grows linearly from 0.
    """

    multiple = 32  # pixels; the pyramid halves the map once

    def __init__(self, size: ViTSize, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.size, self.num_channels = size, [size.embed_dim]
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + size.position_grid**2, size.embed_dim))
        self.patch_embed = PatchEmbed(size.embed_dim)
        self.blocks = nn.ModuleList(
            Block(
                size.embed_dim,
                RotaryAttention(size, None if index in size.global_blocks else size.window_size),
                SwiGLU(size.embed_dim),
                drop_path,
                eps=1e-6,
            )
            for index, drop_path in enumerate(drop_paths(drop_path_rate, size.depth))
        )
        self.out_norm = nn.LayerNorm(size.embed_dim)
        self.apply(initialise_linear)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def units(self) -> list[nn.Module]:
        """Return the blocks for `models.units`."""
        return list(self.blocks)

    def layer_of(self, name: str) -> int:
        """Return a parameter's layer for --lr_layer_decay: 0 for embeddings, then blocks, then all others."""
        if name.startswith('blocks.'):
            return int(name.split('.')[1]) + 1
        return 0 if name.startswith(('pos_embed', 'patch_embed.')) else len(self.blocks) + 1

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Turn [B, 3, H, W], sides multiples of 16, into the map [B, C, H / 16, W / 16] of stage 3."""
        x = self.patch_embed(images)
        x = x + self.positions(*x.shape[1:3])
        for block in self.blocks:
            x = call_unit(block, x)
        return {'3': self.out_norm(x).permute(0, 3, 1, 2)}

    def positions(self, height: int, width: int) -> Tensor:
        """Return the learned positions [1, H, W, C] of a map, without that of the class token."""
        side = self.size.position_grid
        grid = self.pos_embed[:, 1:].unflatten(1, (side, side))
        if (height, width) == (side, side):
            return grid
        grid = F.interpolate(grid.permute(0, 3, 1, 2), (height, width), mode='bicubic', align_corners=False)
        return grid.permute(0, 2, 3, 1)


def normed_convolution(channels: int, outputs: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, outputs, kernel_size, stride, kernel_size // 2, bias=False)
    nn.init.xavier_uniform_(convolution.weight)
    return [convolution, LayerNorm2d(outputs, eps=1e-6)]


def build_feature_pyramid(channels: int, hidden_dim: int) -> nn.ModuleList:
    """Build five levels of strides 4, 8, 16, 32 and 64 from one map of stride 16.

    Each is a sequence that reads the map; indices of its modules are official.
    """

    def up() -> nn.Module:
        return nn.Upsample(scale_factor=2, mode='nearest')

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, stride=2, padding=1)

    def end(width: int) -> list[nn.Module]:
        first, second = (
            normed_convolution(width, hidden_dim, 1),
            normed_convolution(hidden_dim, hidden_dim, 3),
        )
        return [*first, nn.GELU(), *second]

    half, quarter = channels // 2, channels // 4
    doubled = [up(), *normed_convolution(channels, half, 3), nn.GELU()]
    again = [up(), *normed_convolution(half, quarter, 3), nn.GELU()]
    return nn.ModuleList(
        nn.Sequential(*modules)
        for modules in (
            [*doubled, *again, *end(quarter)],
            [up(), *normed_convolution(channels, half, 3), nn.GELU(), *end(half)],
            end(channels),
            [pool(), *end(channels)],
            [pool(), *normed_convolution(channels, channels, 3, stride=2), nn.GELU(), *end(channels)],
        )
    )
