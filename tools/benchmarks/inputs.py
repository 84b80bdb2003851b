"""What several benchmarks put into a detector: flags, and objects of an image."""

import math

import torch
from torch import Tensor

from util.config.networks import level_strides
from util.config.settle import Settled

TRICKS = {'with_box_refine': True, 'two_stage': True, 'mixed_selection': True, 'look_forward_twice': True}


def limit_queries(flags: Settled, height: int, width: int) -> Settled:
    """Return flags with at most as many queries as there are tokens: two stages need them, and small images have few."""
    if flags.family != 'deformable':
        return flags
    tokens = sum(math.ceil(height / stride) * math.ceil(width / stride) for stride in level_strides(flags))
    part = min(1.0, tokens / (flags.num_queries + (flags.hybrid_queries or 0)))
    hybrid = flags.hybrid_queries and int(part * flags.hybrid_queries)
    return flags.but(num_queries=int(part * flags.num_queries), hybrid_queries=hybrid)


def random_objects(number: int, device: str) -> dict[str, Tensor]:
    boxes = torch.cat([0.3 + 0.4 * torch.rand(number, 2), 0.05 + 0.3 * torch.rand(number, 2)], dim=1)
    return {'labels': torch.randint(1, 91, (number,)).to(device), 'boxes': boxes.to(device)}
