"""A padded batch of pictures and the mask that says where the padding is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class NestedTensor:
    """Pictures of different sizes in one tensor, each in the upper left corner.

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


def nested_tensor_from_tensor_list(pictures: Sequence[Tensor] | Tensor) -> NestedTensor:
    """Pad [3, h, w] pictures on the right and below to the largest height and width of the batch.

    A [B, 3, H, W] tensor is taken as pictures of one size. No rounding to a divisor (official DETR).
    """
    if isinstance(pictures, Tensor) and pictures.ndim == 4:
        return NestedTensor(pictures, pictures.new_zeros(pictures[:, 0].shape, dtype=torch.bool))
    if any(picture.ndim != 3 for picture in pictures):
        raise ValueError(f'pictures must be [3, h, w], not {[tuple(picture.shape) for picture in pictures]}')
    height, width = (max(picture.shape[side] for picture in pictures) for side in (1, 2))
    first = pictures[0]
    tensors = first.new_zeros(len(pictures), first.shape[0], height, width)
    mask = torch.ones(len(pictures), height, width, dtype=torch.bool, device=first.device)
    for index, picture in enumerate(pictures):
        _, h, w = picture.shape
        tensors[index, :, :h, :w] = picture
        mask[index, :h, :w] = False
    return NestedTensor(tensors, mask)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Padding mask [B, H, W] at the size (h, w) of a feature map: nearest neighbour, as the official code."""
    return F.interpolate(mask[None].float(), size=size)[0].bool()


def collate_fn(batch: list[tuple[Tensor, dict]]) -> tuple[NestedTensor, list[dict]]:
    """Items of a dataset to a padded batch and its targets."""
    pictures, targets = zip(*batch, strict=True)
    return nested_tensor_from_tensor_list(pictures), list(targets)
