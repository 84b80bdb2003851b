"""
Triton kernels of multi-scale deformable attention (arXiv:2010.04159, Eq. 3): for CUDA machines on which nothing
was built.

One program serves a block of consecutive queries of one head of one picture; a row of the block is one query, its
columns are the head's channels. Sums are float32 (float64 for float64 values), whatever the type of the values.
Level sizes reach the kernels in memory, so that a new picture size compiles nothing. Nobody waits for the device.

Letters: N pictures, S tokens, M heads, D channels of a head, Q queries, L levels, P points.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ELEMENTS = 1024  # of a program: 32 queries of 32 channels
MAX_BLOCK_QUERIES = 128
ELEMENTS_PER_WARP = 256


@triton.jit
def place_block(num_queries, M: tl.constexpr, BLOCK_Q: tl.constexpr):
    """This program's picture and head, its rows of [N, Q, M], and which of them exist."""
    num_blocks = tl.cdiv(num_queries, BLOCK_Q)
    picture_head = tl.program_id(0) // num_blocks
    picture, head = (picture_head // M).to(tl.int64), picture_head % M
    queries = tl.program_id(0) % num_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return picture, head, (picture * num_queries + queries) * M + head, queries < num_queries


@triton.jit
def place_points(locations, points, height, width, exists):
    """The pixel up and left of each point, its distance from there, and whether it touches the level at all."""
    x = tl.load(locations + 2 * points, mask=exists, other=0.0) * width - 0.5
    y = tl.load(locations + 2 * points + 1, mask=exists, other=0.0) * height - 0.5
    inside = exists & (x > -1) & (x < width) & (y > -1) & (y < height)  # neither NaN nor infinity
    x, y = tl.where(inside, x, 0.0), tl.where(inside, y, 0.0)
    left, top = tl.floor(x), tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top, inside


@triton.jit
def place_pixels(column, row, height, width, inside, D: tl.constexpr, STRIDE: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_Q, BLOCK_D] offsets from the level's first token, and a mask of those that may be read."""
    channels = tl.arange(0, BLOCK_D)
    exists = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    tokens = row.to(tl.int64) * width + column
    return tokens[:, None] * STRIDE + channels[None, :], exists[:, None] & (channels < D)[None, :]


@triton.jit(do_not_specialize=['num_tokens', 'num_queries'])
def forward_kernel(
    value, levels, locations, weights, output, num_tokens, num_queries,
    M: tl.constexpr, D: tl.constexpr, L: tl.constexpr, P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    picture, head, rows, exists = place_block(num_queries, M, BLOCK_Q)
    value += picture * num_tokens * (M * D) + head * D
    channels = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_Q, BLOCK_D], dtype=weights.dtype.element_ty)
    for level in range(L):
        height, width = tl.load(levels + 2 * level), tl.load(levels + 2 * level + 1)
        for point in tl.static_range(P):
            points = rows * (L * P) + level * P + point
            left, top, x, y, inside = place_points(locations, points, height, width, exists)
            weight = tl.where(inside, tl.load(weights + points, mask=exists, other=0.0), 0.0)
            for down in tl.static_range(2):
                for right in tl.static_range(2):
                    offsets, mask = place_pixels(
                        left + right, top + down, height, width, inside, D, M * D, BLOCK_D
                    )
                    pixels = tl.load(value + offsets, mask=mask, other=0.0).to(total.dtype)
                    share = weight * (y if down else 1 - y) * (x if right else 1 - x)
                    total += share[:, None] * pixels
        value += height.to(tl.int64) * width * (M * D)
    mask = exists[:, None] & (channels < D)[None, :]
    tl.store(output + rows[:, None] * D + channels[None, :], total.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['num_tokens', 'num_queries'])
def backward_kernel(
    grad_output, value, levels, locations, weights, scale, grad_value, grad_locations, grad_weights,
    num_tokens, num_queries,
    M: tl.constexpr, D: tl.constexpr, L: tl.constexpr, P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`scale`: of the fixed-point numbers in which `grad_value` is summed; None if it is floating."""
    picture, head, rows, exists = place_block(num_queries, M, BLOCK_Q)
    first = picture * num_tokens * (M * D) + head * D
    channels = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (channels < D)[None, :]
    grad = tl.load(grad_output + rows[:, None] * D + channels[None, :], mask=mask, other=0.0)
    grad = grad.to(weights.dtype.element_ty)
    for level in range(L):
        height, width = tl.load(levels + 2 * level), tl.load(levels + 2 * level + 1)
        for point in tl.static_range(P):
            points = rows * (L * P) + level * P + point
            left, top, x, y, inside = place_points(locations, points, height, width, exists)
            weight = tl.where(inside, tl.load(weights + points, mask=exists, other=0.0), 0.0)
            sample, slope_x, slope_y = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
            for down in tl.static_range(2):
                for right in tl.static_range(2):
                    offsets, mask = place_pixels(
                        left + right, top + down, height, width, inside, D, M * D, BLOCK_D
                    )
                    pixels = tl.load(value + first + offsets, mask=mask, other=0.0).to(grad.dtype)
                    product = tl.sum(grad * pixels, axis=1)
                    along_x, along_y = x if right else 1 - x, y if down else 1 - y
                    sample += along_y * along_x * product
                    slope_x += along_y * (product if right else -product)
                    slope_y += along_x * (product if down else -product)
                    share = (weight * along_y * along_x)[:, None] * grad
                    if scale is not None:
                        share = tl.floor(share.to(tl.float64) * tl.load(scale) + 0.5).to(tl.int64)
                    tl.atomic_add(grad_value + first + offsets, share, mask=mask, sem='relaxed')
            tl.store(grad_weights + points, tl.where(inside, sample, 0.0), mask=exists)
            grad_x = tl.where(inside, weight * slope_x * width, 0.0)
            grad_y = tl.where(inside, weight * slope_y * height, 0.0)
            tl.store(grad_locations + 2 * points, grad_x, mask=exists)
            tl.store(grad_locations + 2 * points + 1, grad_y, mask=exists)
        first += height.to(tl.int64) * width * (M * D)


def forward(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Inputs as `ms_deform_attn`'s, but for flat shapes [H0, W0, H1, W1 ...]. Returns [N, Q, M D]."""
    batch, _, heads, channels = value.shape
    output = value.new_empty(batch, sampling_locations.shape[1], heads * channels)
    if output.numel() > 0:
        value, locations, weights = (
            tensor.contiguous() for tensor in (value, sampling_locations, attention_weights)
        )
        levels = level_sizes(spatial_shapes, value.device)
        launch(forward_kernel, value, levels, locations, weights, output, like=(value, locations))
    return output


def backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights. If PyTorch is to be deterministic, the first is summed in fixed
    point, where the order does not matter, and is NaN everywhere if a factor of it is infinite or NaN.
    """
    ...


