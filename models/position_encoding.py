"""Position encodings of the cells of a feature map, and of points and boxes."""

import math

import torch
from torch import Tensor, nn

from util.errors import UserError


def sine_waves(angle: Tensor, num_feats: int, temperature: float = 10000) -> Tensor:
    """Turn angles [...] into waves [..., num_feats], with sines at even indices and cosines at odd ones."""
    index = torch.arange(
        num_feats, dtype=torch.float32, device=angle.device
    )  # whatever the model's precision
    phase = angle[..., None] / temperature ** (2 * torch.div(index, 2, rounding_mode='floor') / num_feats)
    return torch.stack((phase[..., 0::2].sin(), phase[..., 1::2].cos()), dim=-1).flatten(-2)


def sine_embedding(coordinates: Tensor, num_feats: int, temperature: float = 10000) -> Tensor:
    """Embed points or boxes: [..., n] numbers in [0, 1] become [..., n * num_feats], in the given order.

    Conditional DETR (Sec. 3.3) puts y before x: pass `points.flip(-1)`.
    """
    return sine_waves(coordinates * (2 * math.pi), num_feats, temperature).flatten(-2)


class PositionEmbeddingSine(nn.Module):
    """Sine encoding of a padded feature map, normalised by each image's own size (DETR Sec. A.4), in float32.

    Args:
        offset: number added to the positions in cells, 0 in DETR and -0.5 in Deformable DETR.
        scale: angle in radians that a whole side spans.
    """

    def __init__(
        self,
        num_pos_feats: int,
        temperature: float = 10000,
        offset: float = 0.0,
        scale: float = 2 * math.pi,
    ) -> None:
        super().__init__()
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        self.offset = offset
        self.scale = scale

    def forward(self, mask: Tensor) -> Tensor:
        """Encode a mask [B, H, W], True = padding, as [B, 2 * num_pos_feats, H, W], y before x, float32."""
        valid = ~mask
        # Count in integers, because a GPU adds floats in no fixed order.
        y = valid.cumsum(1, dtype=torch.int32).float()
        x = valid.cumsum(2, dtype=torch.int32).float()
        y = (y + self.offset) / (y[:, -1:, :] + 1e-6) * self.scale
        x = (x + self.offset) / (x[:, :, -1:] + 1e-6) * self.scale
        waves = [sine_waves(axis, self.num_pos_feats, self.temperature) for axis in (y, x)]
        return torch.cat(waves, dim=-1).permute(0, 3, 1, 2)


class PositionEmbeddingLearned(nn.Module):
    """A learned vector for each of 50 columns and 50 rows; the padding is encoded like the image."""

    cells = 50

    def __init__(self, num_pos_feats: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(self.cells, num_pos_feats)
        self.col_embed = nn.Embedding(self.cells, num_pos_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask: Tensor) -> Tensor:
        """Encode the cells of a padding mask [B, H, W] as [B, 2 * num_pos_feats, H, W], x before y.

        Raises:
            UserError: a side has more than 50 cells.
        """
        batch, height, width = mask.shape
        if max(height, width) > self.cells:
            raise UserError(
                f'learned position encodings cover {self.cells} x {self.cells} cells, this feature map has '
                f'{height} x {width}: use --position_embedding sine, or smaller images (--img_size, '
                '--max_size)'
            )
        columns = self.col_embed.weight[:width].expand(height, -1, -1)
        rows = self.row_embed.weight[:height, None].expand(-1, width, -1)
        return torch.cat([columns, rows], dim=-1).permute(2, 0, 1).expand(batch, -1, -1, -1)


def build_position_encoding(name: str, hidden_dim: int, **options: float) -> nn.Module:
    """Build the encoding `sine` (alias v2) or `learned` (alias v3), with half of the channels for each axis.

    options: arguments of `PositionEmbeddingSine`.
    """
    if name in ('sine', 'v2'):
        return PositionEmbeddingSine(hidden_dim // 2, **options)
    return PositionEmbeddingLearned(hidden_dim // 2)
