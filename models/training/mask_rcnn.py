"""The mask branch of Mask R-CNN (arXiv:1703.06870, Sec. 3) on the RoI head of Co-DETR (`co_deformable_detr_mask_r50`)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.refine_masks import ROI_SIZE, Convolution, roi_features

from .mask_losses import mask_targets

NUM_CONVOLUTIONS = 4


class MaskBranch(nn.Module):
    """Four convolutions, a transposed one and a map of 28 x 28 logits for each class. strides: of the maps in pixels."""

    def __init__(self, channels: int, num_classes: int, strides: list[int]) -> None:
        super().__init__()
        self.strides = strides
        self.convs = nn.ModuleList(Convolution(channels, 3) for _ in range(NUM_CONVOLUTIONS))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)
        for layer in (*(convolution.conv for convolution in self.convs), self.upsample, self.conv_logits):
            nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')
            nn.init.zeros_(layer.bias)

    def forward(self, maps: list[Tensor], regions: list[Tensor], labels: Tensor) -> Tensor:
        """Return logits [N, 28, 28] of the N regions of all images for their classes.

        Args:
            maps: [B, C, H, W] of each level.
            regions: boxes [N_i, 4] xyxy in pixels of each image.
            labels: [N].
        """
        x = roi_features(maps, self.strides, regions, ROI_SIZE, 14 * self.strides[0])
        for convolution in self.convs:
            x = F.relu(convolution(x))
        logits = self.conv_logits(F.relu(self.upsample(x)))
        return logits[torch.arange(len(labels), device=labels.device), labels]

    def loss(self, maps: list[Tensor], regions: list[Tensor], labels: Tensor, masks: list[Tensor]) -> Tensor:
        """Return the mean binary cross-entropy of all pixels; masks: [N_i, H, W], that of each region's object."""
        if not len(labels):
            return sum(parameter.sum() for parameter in self.parameters()) * 0.0
        logits = self(maps, regions, labels)
        pairs = [pair for pair in zip(masks, regions, strict=True) if len(pair[1])]
        wanted = torch.cat([mask_targets(*pair, sides=(2 * ROI_SIZE,))[0] for pair in pairs])
        return F.binary_cross_entropy_with_logits(logits, wanted.to(logits))

    def detect(self, maps: list[Tensor], image: int, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities [N, 28, 28] for boxes xyxy in pixels of one image, and ones [N]: masks have no score."""
        own = [x[image : image + 1] for x in maps]
        return self(own, [boxes], labels).sigmoid(), torch.ones_like(boxes[:, 0])
