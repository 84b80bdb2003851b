"""Masks of DETR (arXiv:2005.12872, Sec. 4.4): attention maps of queries, and convolutions to stride 4."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.precision import without_autocast

from .structures import Memory


class AttentionMaps(nn.Module):
    """Attention weights of queries on a map, for every head; the softmax runs over heads and cells."""

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear, self.k_linear = nn.Linear(hidden_dim, hidden_dim), nn.Linear(hidden_dim, hidden_dim)
        for layer in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, queries: Tensor, tokens: Tensor, padding_mask: Tensor) -> Tensor:
        """Return weights [B, Q, M, S] of queries [B, Q, C] on tokens [B, S, C]; padding (True) gets none."""
        q, k = (
            x.unflatten(-1, (self.num_heads, -1)) for x in (self.q_linear(queries), self.k_linear(tokens))
        )
        weights = torch.einsum('bqmc,bsmc->bqms', q * q.shape[-1] ** -0.5, k)
        weights = weights.masked_fill(padding_mask[:, None, None], float('-inf'))
        return weights.flatten(2).softmax(-1).view_as(weights)


class MaskHead(nn.Module):
    """Convolutions that turn attention maps into masks, with the backbone's finer maps added.

    Args:
        num_heads: attention maps of a query.
        finer: channels of the backbone's maps that are added, the coarsest first.
    """

    def __init__(self, hidden_dim: int, num_heads: int, finer: list[int]) -> None:
        super().__init__()
        width = hidden_dim + num_heads
        widths = [width, width, *(hidden_dim // 2 ** (level + 1) for level in range(len(finer) + 1))]
        for index, (before, after) in enumerate(pairwise(widths), start=1):
            self.add_module(f'lay{index}', nn.Conv2d(before, after, 3, padding=1))
            self.add_module(f'gn{index}', nn.GroupNorm(math.gcd(8, after), after))
        self.out_lay = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for index, channels in enumerate(finer, start=1):
            self.add_module(f'adapter{index}', nn.Conv2d(channels, widths[index + 1], 1))
        for module in self.children():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, src: Tensor, weights: Tensor, finer: list[Tensor]) -> Tensor:
        """Return mask logits [B, Q, h, w] at the size of the finest map.

        Args:
            src: the projected map [B, C, H, W].
            weights: attention maps [B, Q, M, H, W].
            finer: the backbone's maps, coarsest first.
        """
        batch, num_queries = weights.shape[:2]
        channels = src.shape[1]
        # The first convolution is linear: its part that reads `src` is the same for all queries of an image.
        shared = F.conv2d(src, self.lay1.weight[:, :channels], self.lay1.bias, padding=1)
        x = F.conv2d(weights.flatten(0, 1), self.lay1.weight[:, channels:], padding=1)
        x = F.relu(self.gn1((x.unflatten(0, (batch, num_queries)) + shared[:, None]).flatten(0, 1)))
        x = F.relu(self.gn2(self.lay2(x)))
        for index, finer_map in enumerate(finer, start=1):
            adapted = getattr(self, f'adapter{index}')(finer_map)
            x = F.interpolate(x, size=adapted.shape[-2:], mode='nearest').unflatten(0, (batch, num_queries))
            x = (x + adapted[:, None]).flatten(0, 1)
            x = F.relu(getattr(self, f'gn{index + 2}')(getattr(self, f'lay{index + 2}')(x)))
        return self.out_lay(x)[:, 0].unflatten(0, (batch, num_queries))


def predict_masks(
    attention: AttentionMaps,
    head: MaskHead,
    queries: Tensor,
    memory: Memory,
    level: int,
    src: Tensor,
    finer: list[Tensor],
) -> Tensor:
    """Return mask logits [B, Q, h, w] of queries [B, Q, C], in float32 at least.

    Args:
        level: level of the memory that the queries attend to, of the size of `src`.
        src: the projected map of that level, before the encoder.
        finer: the backbone's finer maps, coarsest first.
    """
    start = sum(height * width for height, width in memory.shapes[:level])
    height, width = memory.shapes[level]
    cells = slice(start, start + height * width)
    with without_autocast(queries):
        dtype = head.out_lay.weight.dtype
        weights = attention(
            queries.to(dtype), memory.tokens[:, cells].to(dtype), memory.padding_mask[:, cells]
        )
        return head(src.to(dtype), weights.unflatten(-1, (height, width)), [x.to(dtype) for x in finer])


def freeze_all_but_masks(model: nn.Module) -> None:
    """Train only the mask heads (the second step of DETR's recipe); dropout stays active."""
    for name, parameter in model.named_parameters():
        if not name.startswith(('bbox_attention.', 'mask_head.')):
            parameter.requires_grad_(False)


def build_mask_heads(hidden_dim: int, num_heads: int, finer: list[int]) -> dict[str, nn.Module]:
    """Build the modules of a detector with masks by their official names. finer: channels of added maps."""
    return {
        'bbox_attention': AttentionMaps(hidden_dim, num_heads),
        'mask_head': MaskHead(hidden_dim, num_heads, finer),
    }
