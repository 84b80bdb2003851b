"""The attention module of Deformable DETR (arXiv:2010.04159, Sec. 4.1) around the operator."""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.precision import full_precision

from .functions import Shapes, ms_deform_attn


def level_sizes(spatial_shapes: Shapes, like: Tensor) -> Tensor:
    """Return width and height of each level, [L, 2], on the device of `like`.

    They are filled in, not copied from the host: this needs no synchronisation, and exported programs keep
    the sizes variable.
    """
    sides = [like.new_full((), side) for height, width in spatial_shapes for side in (width, height)]
    return torch.stack(sides).view(-1, 2)


class MSDeformAttn(nn.Module):
    """Attention to `n_points` sampled points per level and head, around a reference point or inside a reference box.

    Raises:
        ValueError: d_model is not a multiple of n_heads.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f'd_model {d_model} is not a multiple of n_heads {n_heads}')
        if (d_model // n_heads) & (d_model // n_heads - 1):
            warnings.warn(
                f'{d_model // n_heads} channels a head: kernels are faster with a power of two', stacklevel=2
            )
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Initialise points along one direction per head, each a step further out, with uniform weights."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.n_heads, dtype=torch.float32) * (2.0 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().max(-1, keepdim=True).values  # onto the unit square
        steps = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        offsets = direction[:, None, None] * steps[:, None]  # [M, 1, P, 2]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.n_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Shapes,
        input_padding_mask: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """Attend, and return [N, Q, C].

        Args:
            query: [N, Q, C], positions added.
            reference_points: [N, Q, L, 2] centres or [N, Q, L, 4] boxes cxcywh, in units of the padded image.
            input_flatten: [N, S, C], without positions.
            input_spatial_shapes: (H, W) of each level, plain integers.
            input_padding_mask: [N, S], True = padding.
            sizes: `level_sizes` of the shapes, if the caller has computed them already.
        """
        shapes = input_spatial_shapes
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0)
        value = value.unflatten(-1, (self.n_heads, -1))  # [N, S, M, D]
        grid = self.n_heads, self.n_levels, self.n_points
        offsets = self.sampling_offsets(query).unflatten(-1, (*grid, 2))  # [N, Q, M, L, P, 2]
        weights = self.attention_weights(query).unflatten(-1, (self.n_heads, -1))
        # Over levels and points, in float32 at least: autocast on CPUs would compute it in 16 bits.
        weights = F.softmax(weights, dim=-1, dtype=torch.promote_types(weights.dtype, torch.float32))
        weights = weights.unflatten(-1, grid[1:])  # [N, Q, M, L, P]
        locations = self.locations(offsets, reference_points, shapes, sizes)
        return self.output_proj(ms_deform_attn(value, shapes, locations, weights))

    def locations(
        self, offsets: Tensor, reference_points: Tensor, shapes: Shapes, sizes: Tensor | None
    ) -> Tensor:
        """Compute sampling locations [N, Q, M, L, P, 2]; offsets are pixels, or fractions of half the reference box.

        Locations have float32 at least. Offsets may have 16 bits, since they are small numbers.
        """
        reference = full_precision(reference_points)[:, :, None, :, None]  # [N, Q, 1, L, 1, 2 or 4]
        if reference.shape[-1] == 2:
            sizes = level_sizes(shapes, reference) if sizes is None else sizes
            return reference + offsets / sizes[:, None]
        if reference.shape[-1] == 4:
            parts = full_precision(offsets) / self.n_points
            return reference[..., :2] + parts * reference[..., 2:] * 0.5
        raise ValueError(f'reference points have 2 or 4 coordinates, not {reference.shape[-1]}')
