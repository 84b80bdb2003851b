"""
Masks of detections from their RoI features, as Co-DETR's ViT models predict them: RefineMask's head
(arXiv:2104.08569) in four stages of growing size, and a head that predicts the IoU of a mask (Mask Scoring
R-CNN, arXiv:1903.00241).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import roi_align

ROI_SIZE = 14
DILATIONS = (1, 3, 5)
BOUNDARY_SHARE = 0.1  # of a window that must have the other value


class NormedConvolution(nn.Module):
    """A 3 x 3 convolution without bias, a norm over channels and a ReLU."""

    def __init__(self, channels: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, outputs, 3, stride, padding=1, bias=False)
        self.norm_layer = LayerNorm2d(outputs, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm_layer(self.conv(x)))


class Convolution(nn.Module):
    """A convolution with bias, under the official name `conv`."""

    def __init__(self, channels: int, kernel_size: int, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=padding, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class DilatedFusion(nn.Module):
    """The sum of three dilated convolutions and of the mean over the map, mixed by a 1 x 1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for index, dilation in enumerate(DILATIONS, start=1):
            self.add_module(f'dilation_conv_{index}', Convolution(channels, 3, dilation))
        self.merge_conv = Convolution(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.relu(getattr(self, f'dilation_conv_{index}')(x)) for index in (1, 2, 3)]
        return self.merge_conv(sum(parts) + x.mean((2, 3), keepdim=True))


class RefineStage(nn.Module):
    """A stage that mixes instance and semantic features and its mask into features of half the channels."""

    def __init__(self, channels: int, semantic_channels: int, upsample: bool) -> None:
        super().__init__()
        self.upsample = upsample
        self.semantic_transform_in = nn.Conv2d(semantic_channels, channels, 1)
        self.fuse_conv = nn.ModuleList([nn.Conv2d(2 * channels + 1, channels, 1), DilatedFusion(channels)])
        self.fuse_transform_out = nn.Conv2d(channels, channels // 2 - 1, 1)

    def forward(
        self, instance: Tensor, logits: Tensor, semantic: Tensor, rois: Tensor, stride: int
    ) -> Tensor:
        """Return features [N, C / 2, 2h, 2w] (h, w without upsampling).

        Args:
            instance: [N, C, h, w]. logits: masks of this stage [N, 1, h, w].
            semantic: map [B, S, H, W]. rois: [N, 5] image and box xyxy in pixels. stride: of the map, pixels.
        """
        semantic = F.relu(self.semantic_transform_in(semantic))
        semantic = roi_align(semantic, rois, instance.shape[-2:], 1 / stride, sampling_ratio=0, aligned=True)
        x = torch.cat([instance, semantic, logits.sigmoid()], dim=1)
        for layer in self.fuse_conv:
            x = F.relu(layer(x))
        x = torch.cat([F.relu(self.fuse_transform_out(x)), logits.sigmoid()], dim=1)
        return F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=False) if self.upsample else x


class RefineMaskHead(nn.Module):
    """A head that predicts masks with sides of 14, 28, 56 and 112 pixels; the last are class-agnostic.

    stride: of the map that semantic features are read from, in pixels.
    """

    def __init__(self, channels: int, num_classes: int, stride: int = 4) -> None:
        super().__init__()
        self.stride = stride
        self.instance_convs = nn.Sequential(NormedConvolution(channels, channels))
        self.semantic_convs = nn.Sequential(*(NormedConvolution(channels, channels) for _ in range(2)))
        self.stages = nn.ModuleList(
            RefineStage(channels >> stage, channels, upsample=stage < 2) for stage in range(3)
        )
        classes = (num_classes, num_classes, num_classes, 1)
        self.stage_instance_logits = nn.ModuleList(
            nn.Conv2d(channels >> stage, outputs, 1) for stage, outputs in enumerate(classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Tensor, finest: Tensor, rois: Tensor, labels: Tensor) -> list[Tensor]:
        """Return mask logits [N, h, w] of every stage for the class of each region.

        Args:
            features: RoI features [N, C, 14, 14].
            finest: the finest map [B, C, H, W].
            rois: [N, 5] image and box xyxy in pixels.
            labels: [N] class of each region.
        """
        features, finest = self.instance_convs(features), self.semantic_convs(finest)
        masks, row = [], torch.arange(len(labels), device=labels.device)
        for head, stage in zip(self.stage_instance_logits, self.stages, strict=False):
            logits = head(features)[row, labels][:, None]
            masks.append(logits[:, 0])
            features = stage(features, logits, finest, rois, self.stride)
        last = F.interpolate(
            self.stage_instance_logits[3](features), scale_factor=2, mode='bilinear', align_corners=True
        )
        return [*masks, last[:, 0]]


class MaskIoUHead(nn.Module):
    """A head that predicts the IoU of a mask for every class."""

    def __init__(self, channels: int, num_classes: int, hidden: int = 1024) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            NormedConvolution(channels + 1, channels), NormedConvolution(channels, channels, stride=2)
        )
        self.fcs = nn.Sequential(nn.Linear(channels * (ROI_SIZE // 2) ** 2, hidden), nn.ReLU())
        self.fc_mask_iou = nn.Linear(hidden, num_classes)

    def forward(self, features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the IoU [N] of each mask from RoI features [N, C, 14, 14] and logits [N, 28, 28]."""
        x = torch.cat([features, F.max_pool2d(logits[:, None].sigmoid(), 2)], dim=1)
        quality = self.fc_mask_iou(self.fcs(self.convs(x).flatten(1))).sigmoid()
        return quality[torch.arange(len(labels), device=labels.device), labels]


def boundary(mask: Tensor, width: int) -> Tensor:
    """Return the pixels with another value in more than a tenth of the window around them, [N, h, w] bool.

    mask: [N, h, w] bool; outside is False. width: the window has sides of 2 width + 1.
    """
    side = 2 * width + 1
    share = F.avg_pool2d(mask[:, None].float(), side, stride=1, padding=width, count_include_pad=True)[:, 0]
    return torch.where(mask, 1 - share, share) > BOUNDARY_SHARE


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [N, h, w] with corners that stay in place."""
    return F.interpolate(x[:, None], size=size, mode='bilinear', align_corners=True)[:, 0]


def refined(logits: list[Tensor]) -> Tensor:
    """Merge the stages' logits to probabilities [N, 112, 112]: a stage refines the last one's boundary."""
    merged = logits[1]
    for finer in logits[2:]:
        size = tuple(finer.shape[-2:])
        inside = resized((~boundary(merged > 0, 1)).to(finer), size) >= 0.5
        merged = torch.where(inside, resized(merged, size), finer)
    return merged.sigmoid()


def numbered(regions: list[Tensor]) -> Tensor:
    """Join the boxes [N_i, 4] of all images as [N, 5], with the index of the image in front."""
    image = torch.cat([x.new_full((len(x), 1), index) for index, x in enumerate(regions)])
    return torch.cat([image, torch.cat(regions)], dim=1)


def roi_features(
    maps: list[Tensor], strides: list[int], regions: list[Tensor], size: int, finest: int
) -> Tensor:
    """Return RoI features [N, C, size, size] of all regions, each from its level (FPN, Sec. 4.2).

    Args:
        maps: [B, C, H, W] of each level; more maps than strides are ignored.
        regions: boxes [N_i, 4] xyxy in pixels of each image.
        finest: regions up to twice this side, pixels, are read from the first level.
    """
    rois = numbered(regions)
    side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    levels = torch.floor(torch.log2(side / finest + 1e-6)).nan_to_num(0.0).clamp(0, len(strides) - 1)
    counts = (levels == torch.arange(len(strides), device=levels.device)[:, None]).sum(1).tolist()
    order = levels.argsort(stable=True)
    parts = [
        roi_align(x, part, size, 1 / stride, sampling_ratio=0, aligned=True)
        for x, stride, part in zip(maps, strides, rois[order].split(counts), strict=False)
    ]
    return torch.cat(parts)[order.argsort()]


class DetectionMasks(nn.Module):
    """Masks of boxes and their IoU, from the encoder's maps. strides: of the maps in pixels."""

    chunk = 150  # regions at a time in evaluation

    def __init__(self, channels: int, num_classes: int, strides: list[int]) -> None:
        super().__init__()
        self.strides = strides
        self.mask_head = RefineMaskHead(channels, num_classes, strides[0])
        self.mask_iou_head = MaskIoUHead(channels, num_classes)

    def forward(
        self, maps: list[Tensor], regions: list[Tensor], labels: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Return mask logits of every stage and the IoU [N] of the second's, for the N regions of a batch."""
        features = roi_features(maps, self.strides, regions, ROI_SIZE, ROI_SIZE * self.strides[0])
        logits = self.mask_head(features, maps[0], numbered(regions), labels)
        return logits, self.mask_iou_head(features, logits[1], labels)

    def detect(self, maps: list[Tensor], boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities [N, 112, 112] and IoU [N] for boxes xyxy in pixels of the image of `maps`."""
        masks, qualities = [], []
        for part, classes in zip(boxes.split(self.chunk), labels.split(self.chunk), strict=True):
            logits, quality = self(maps, [part], classes)
            masks.append(refined(logits))
            qualities.append(quality)
        return torch.cat(masks), torch.cat(qualities)
