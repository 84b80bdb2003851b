"""
Triton kernels of multi-scale deformable attention (arXiv:2010.04159, Eq. 3), for CUDA machines without
compiled kernels.

One program handles a block of consecutive queries of one head of one image. A row of the block is one query,
and its columns are the head's channels. Sums are float32 (float64 for float64 values), whatever the type of
the values. Level sizes reach the kernels in memory, so that a new image size compiles nothing. Nothing here
needs a synchronisation.

Letters: N images, S tokens, M heads, D channels of a head, Q queries, L levels, P points.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program's block: 16 queries of 32 channels forward, 4 queries backward. One warp then does a
# backward block, sums over channels by shuffles, and waits for no other warp.
FORWARD_BLOCK = 512
BACKWARD_BLOCK = 128
MAX_BLOCK_QUERIES = 128
BYTES_PER_WARP = 512  # 16 per thread
MAX_WARPS = 16


@triton.jit
def place_block(num_queries, M: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Return this program's image and head, its rows of [N, Q, M], and which of them exist."""
    num_blocks = tl.cdiv(num_queries, BLOCK_Q)
    image_head = tl.program_id(0) // num_blocks
    image, head = (image_head // M).to(tl.int64), image_head % M
    queries = tl.program_id(0) % num_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return image, head, (image * num_queries + queries) * M + head, queries < num_queries


@triton.jit
def place_points(locations, points, height, width, exists):
    """Return each point's upper left pixel, its distance from that, and whether it touches the level."""
    x = tl.load(locations + 2 * points, mask=exists, other=0.0) * width - 0.5
    y = tl.load(locations + 2 * points + 1, mask=exists, other=0.0) * height - 0.5
    inside = exists & (x > -1) & (x < width) & (y > -1) & (y < height)  # False for NaN and infinity
    x, y = tl.where(inside, x, 0.0), tl.where(inside, y, 0.0)
    left, top = tl.floor(x), tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top, inside


@triton.jit
def place_pixels(
    column, row, height, width, inside, D: tl.constexpr, STRIDE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Return offsets [BLOCK_Q, BLOCK_D] from the level's first token, and which of them may be read."""
    channels = tl.arange(0, BLOCK_D)
    exists = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    tokens = row.to(tl.int64) * width + column
    return tokens[:, None] * STRIDE + channels[None, :], exists[:, None] & (channels < D)[None, :]


@triton.jit
def add_share(sums, share, grad, scale, mask):
    """Add share * grad to the sums, integers in units of 1 / scale if there is a scale (fixed point)."""
    if scale is None:
        terms = share * grad
    else:
        terms = tl.floor(share.to(tl.float64) * grad.to(tl.float64) * scale + 0.5).to(tl.int64)
    tl.atomic_add(sums, terms, mask=mask, sem='relaxed')


@triton.jit(do_not_specialize=['num_tokens', 'num_queries'])
def forward_kernel(
    value,
    levels,
    locations,
    weights,
    output,
    num_tokens,
    num_queries,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image, head, rows, exists = place_block(num_queries, M, BLOCK_Q)
    value += image * num_tokens * (M * D) + head * D
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
    value,
    levels,
    locations,
    weights,
    grad_output,
    grad_value,
    grad_locations,
    grad_weights,
    scale,
    num_tokens,
    num_queries,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image, head, rows, exists = place_block(num_queries, M, BLOCK_Q)
    first = image * num_tokens * (M * D) + head * D
    channels = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (channels < D)[None, :]
    grad = tl.load(grad_output + rows[:, None] * D + channels[None, :], mask=mask, other=0.0)
    grad = grad.to(weights.dtype.element_ty)
    if scale is not None:
        scale = tl.load(scale)
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
                    share = weight * along_y * along_x
                    add_share(grad_value + first + offsets, share[:, None], grad, scale, mask)
            tl.store(grad_weights + points, tl.where(inside, sample, 0.0), mask=exists)
            grad_x = tl.where(inside, weight * slope_x * width, 0.0)
            grad_y = tl.where(inside, weight * slope_y * height, 0.0)
            tl.store(grad_locations + 2 * points, grad_x, mask=exists)
            tl.store(grad_locations + 2 * points + 1, grad_y, mask=exists)
        first += height.to(tl.int64) * width * (M * D)


def forward(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Return [N, Q, M D]. Inputs are those of `ms_deform_attn`, with flat shapes: H0, W0, H1, W1 ..."""
    inputs = value, sampling_locations, attention_weights
    check_inputs(spatial_shapes, *inputs)
    output = value.new_empty(output_shape(value, sampling_locations))
    if output.numel() > 0:
        launch(forward_kernel, FORWARD_BLOCK, spatial_shapes, inputs, [output])
    return output


def backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights.

    If PyTorch is to be deterministic, the gradient of value is summed in fixed point, where the order does
    not matter. It is then NaN everywhere if grad_output or the weights contain a number that is not finite.
    """
    inputs = value, sampling_locations, attention_weights
    check_inputs(spatial_shapes, *inputs)
    if grad_output.shape != output_shape(value, sampling_locations):
        raise RuntimeError(
            f'ms_deform_attn: grad_output {[*grad_output.shape]} does not fit {[*value.shape]}'
        )
    if min(grad_output.numel(), attention_weights.numel()) == 0:
        return tuple(value.new_zeros(tensor.shape, dtype=tensor.dtype) for tensor in inputs)
    scale = None
    if torch.are_deterministic_algorithms_enabled():
        scale = fixed_point_scale(grad_output, attention_weights)
    sums = value.new_zeros(value.shape, dtype=attention_weights.dtype if scale is None else torch.int64)
    grads = [tensor.new_empty(tensor.shape) for tensor in inputs[1:]]
    others = grad_output.contiguous(), sums, *grads, scale
    launch(backward_kernel, BACKWARD_BLOCK, spatial_shapes, inputs, others)
    grad_value = sums if scale is None else sums.double() / scale
    return grad_value.to(value.dtype), *grads


def output_shape(value: Tensor, locations: Tensor) -> tuple[int, int, int]:
    batch, _, heads, channels = value.shape
    return batch, locations.shape[1], heads * channels


def check_inputs(shapes: Sequence[int], value: Tensor, locations: Tensor, weights: Tensor) -> None:
    """Refuse tensors that do not fit each other, because kernels would read outside of them."""
    batch, num_tokens, heads, _ = value.shape
    _, num_queries, _, _, num_points, _ = locations.shape
    expected = batch, num_queries, heads, len(shapes) // 2, num_points
    areas = [height * width for height, width in zip(shapes[::2], shapes[1::2], strict=True)]
    if (
        locations.shape != (*expected, 2)
        or weights.shape != expected
        or min(shapes, default=1) < 1
        or sum(areas) != num_tokens
    ):
        raise RuntimeError(
            f'ms_deform_attn: value {[*value.shape]}, spatial_shapes {[*shapes]}, sampling_locations '
            f'{[*locations.shape]} and attention_weights {[*weights.shape]} do not fit each other'
        )


def fixed_point_scale(grad_output: Tensor, weights: Tensor) -> Tensor:
    """Return a scale with which every sum fits into 63 bits, or NaN if an input is not finite.

    A pixel gets at most one share from each point that a query has in its level.
    """
    largest = [torch.linalg.vector_norm(tensor, ord=torch.inf).double() for tensor in (grad_output, weights)]
    _, num_queries, _, _, num_points = weights.shape
    bound = largest[0] * largest[1] * (num_queries * num_points)
    return (2.0**62 / bound.clamp(min=1e-280)).masked_fill(~bound.isfinite(), torch.nan)


def launch(
    kernel: Callable,
    block: int,
    shapes: Sequence[int],
    inputs: Sequence[Tensor],
    others: Sequence[Tensor | None],
) -> None:
    value, locations, weights = (tensor.contiguous() for tensor in inputs)
    _, num_tokens, _, channels = value.shape
    batch, num_queries, heads, num_levels, num_points, _ = locations.shape
    block_d = triton.next_power_of_2(channels)
    block_q = min(max(block // block_d, 1), MAX_BLOCK_QUERIES)
    num_bytes = block_q * block_d * value.element_size()
    with torch.cuda.device_of(value):
        kernel[(batch * heads * triton.cdiv(num_queries, block_q),)](
            value,
            cached_level_sizes(tuple(shapes), value.device),
            locations,
            weights,
            *others,
            num_tokens,
            num_queries,
            M=heads,
            D=channels,
            L=num_levels,
            P=num_points,
            BLOCK_Q=block_q,
            BLOCK_D=block_d,
            num_warps=min(max(num_bytes // BYTES_PER_WARP, 1), MAX_WARPS),
        )


def cached_level_sizes(shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return level sizes [2 L] int32, cached except for CUDA graphs, which own the memory they use."""
    if device.type != 'cuda' or torch.cuda.is_current_stream_capturing():
        return new_level_sizes(shapes, device)
    # Each stream has its own copy, because another stream would have to wait for the numbers.
    return kept_level_sizes(shapes, device, torch.cuda.current_stream(device).cuda_stream)


def new_level_sizes(shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """Fill the sizes in on the device: a copy from the host might wait, and CUDA graphs cannot hold one."""
    sizes = torch.empty(len(shapes), dtype=torch.int32, device=device)
    for size, number in zip(sizes, shapes, strict=True):
        size.fill_(number)
    return sizes


@lru_cache(maxsize=512)
def kept_level_sizes(shapes: tuple[int, ...], device: torch.device, _stream: int) -> Tensor:
    return new_level_sizes(shapes, device)
