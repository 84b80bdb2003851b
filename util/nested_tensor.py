"""Padded batch of images with a mask of the padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from util.errors import UserError


@dataclass
class NestedTensor:
    """Images of different sizes in one tensor, each in the upper left corner.

    tensors: [B, 3, H, W], zero on padding. mask: [B, H, W] bool, True = padding.
    """

    tensors: Tensor
    mask: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> 'NestedTensor':
        return NestedTensor(
            self.tensors.to(device, non_blocking=non_blocking),
            self.mask.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> 'NestedTensor':
        return NestedTensor(self.tensors.pin_memory(), self.mask.pin_memory())

    def decompose(self) -> tuple[Tensor, Tensor]:
        return self.tensors, self.mask


def as_batch(samples: NestedTensor | Sequence[Tensor] | Tensor, multiple: int = 1) -> NestedTensor:
    """Return images as a padded batch whose height and width are multiples of a number."""
    if not isinstance(samples, NestedTensor):
        samples = nested_tensor_from_tensor_list(samples)
    height, width = samples.mask.shape[-2:]
    padding = (0, -width % multiple, 0, -height % multiple)
    if not any(padding):
        return samples
    return NestedTensor(F.pad(samples.tensors, padding), F.pad(samples.mask, padding, value=True))


def nested_tensor_from_tensor_list(images: Sequence[Tensor] | Tensor) -> NestedTensor:
    """Pad [3, h, w] images on the right and below to the largest height and width of the batch.

    A [B, 3, H, W] tensor is taken as images of one size. No rounding to a divisor (official DETR).
    """
    if isinstance(images, Tensor) and images.ndim == 4:
        return NestedTensor(images, images.new_zeros(images[:, 0].shape, dtype=torch.bool))
    if any(image.ndim != 3 for image in images):
        raise UserError(f'images must be [3, h, w], not {[tuple(image.shape) for image in images]}')
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    first = images[0]
    tensors = first.new_zeros(len(images), first.shape[0], height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=first.device)
    for index, image in enumerate(images):
        _, h, w = image.shape
        tensors[index, :, :h, :w] = image
        mask[index, :h, :w] = False
    return NestedTensor(tensors, mask)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a padding mask [B, H, W] to (h, w): nearest neighbour, as the official code."""
    return F.interpolate(mask[None].float(), size=size)[0].bool()


def collate_fn(batch: list[tuple[Tensor, dict]]) -> tuple[NestedTensor, list[dict]]:
    """Collate items of a dataset to a padded batch and its targets."""
    images, targets = zip(*batch, strict=True)
    return nested_tensor_from_tensor_list(images), list(targets)
