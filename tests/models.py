"""Small models of every kind, batches for them, and what tests do to them."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Self
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from engine import build_optimizer
from models import build_model
from models.position_encoding import PositionEmbeddingSine
from models.training import collaborative
from models.training.criterion import weighted_sum
from models.vit import VIT_SIZES, ViTSize
from util.nested_tensor import NestedTensor

VIT_SIZES['vit_mini'] = ViTSize(128, 4, 2, 4, 4, (1, 3))

SMALL = {
    'backbone': 'resnet10',
    'backbone_weights': 'none',
    'backbone_stages': 3,
    'hidden_dim': 32,
    'nheads': 4,
    'enc_layers': 2,
    'dec_layers': 3,
    'dim_feedforward': 64,
    'num_queries': 12,
    'num_classes': 6,
}
# Its gradients do not depend on how a batch is split into smaller ones.
SMALLER = SMALL | {
    'enc_layers': 1,
    'dec_layers': 2,
    'dim_feedforward': 32,
    'num_queries': 9,
    'num_classes': 4,
    'dropout': 0.0,
    'backbone_norm': 'group',
}
TWO_STAGE = {'with_box_refine': True, 'two_stage': True}
TRICKS = TWO_STAGE | {'mixed_selection': True, 'look_forward_twice': True}
HEADS = {'co_aux_heads': ['faster_rcnn', 'atss']}
# So few queries reach this score that none are drawn at random.
MIXED = {'use_ms_detr': True, 'num_queries': 24, 'o2m_matcher_threshold': 2.0}
DENSE = {'detr': {}, 'conditional': {'conditional': True}}
FAMILIES = DENSE | {
    'deformable': {'deformable': True},
    'box refinement': {'with_box_refine': True, 'use_checkpoint': True},
    'two stages': TWO_STAGE,
    'two stages with tricks': TRICKS,
    'hybrid': TWO_STAGE | {'mixed_selection': True, 'hybrid_k': 3, 'hybrid_queries': 24},
    'mixed': TWO_STAGE | MIXED | {'use_aux_ffn': True},
    'mixed, variant a, one stage': MIXED | {'ms_variant': 'a'},
    'dino': {'dino': True},
    'all, conditional': MIXED
    | {'conditional': True, 'hybrid_queries': 24, 'group_detr': 2, 'use_indices_merge': True},
}
SCHEMES = {
    'detr': {},
    'conditional': {'conditional': True},
    'deformable': {'deformable': True},
    'refine': {'with_box_refine': True},
    'two_stage': TWO_STAGE,
    'one_loss': TWO_STAGE | {'aux_loss': False},  # a head without a gradient
    'hybrid': TRICKS | {'hybrid_k': 2, 'hybrid_queries': 12},
    'mixed': TRICKS | {'use_ms_detr': True, 'use_aux_ffn': True},
    'mixed_a': {'use_ms_detr': True, 'ms_variant': 'a', 'with_box_refine': True},
    'groups': {'group_detr': 2},
    'denoising': TRICKS | {'dn_number': 4},
    'co_deformable': TRICKS | HEADS,
    'co_dino': HEADS | {'dino': True, 'dn_number': 4},
}


def build(flags: dict) -> tuple[nn.Module, nn.Module, dict]:
    torch.manual_seed(0)
    return build_model(Namespace(**SMALL | flags))


def random_targets(*num_objects: int) -> list[dict[str, Tensor]]:
    dtype = torch.get_default_dtype()
    return [
        {'labels': torch.randint(0, 6, (num,)), 'boxes': torch.rand(num, 4, dtype=dtype) * 0.4 + 0.2}
        for num in num_objects
    ]


def train_steps(
    model: nn.Module,
    criterion: nn.Module,
    images: Tensor,
    targets: list[dict],
    steps: int,
    max_norm: float = 1.0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the losses of the first and of the last of some optimizer steps on one batch."""
    optimizer, losses = build_optimizer(model, 1e-3, 1e-3, 1e-4), []
    for _ in range(steps):
        losses.append(criterion(model.train()(images, targets), targets))
        optimizer.zero_grad()
        weighted_sum(losses[-1], criterion.weight_dict).backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return losses[0], losses[-1]


def with_masks(targets: list[dict], size: tuple[int, int]) -> list[dict]:
    """Targets whose masks fill their boxes."""
    rows, columns = (torch.arange(side) + 0.5 for side in size)
    for target in targets:
        x, y, width, height = (target['boxes'] * torch.tensor([size[1], size[0]] * 2)).T[..., None, None]
        inside = ((rows[:, None] - y).abs() < height / 2) & ((columns - x).abs() < width / 2)
        target['masks'] = inside.byte()
    return targets


class GivenFeatures(nn.Module):
    """In place of a backbone: the samples are feature maps."""

    def __init__(self, num_channels: int, hidden_dim: int, offset: float) -> None:
        super().__init__()
        self.num_channels = [num_channels]
        self.encoding = PositionEmbeddingSine(hidden_dim // 2, offset=offset)

    def forward(self, samples: NestedTensor) -> tuple[list[NestedTensor], list[Tensor]]:
        return [samples], [self.encoding(samples.mask).to(samples.tensors.dtype)]


class CountSyncs(TorchDispatchMode):
    """Counts what would make a GPU's host wait, on any device.

    It counts scalars that are read, shapes that depend on values, boolean indices, and copies between host
    and device, except those to the device with `non_blocking`. Tensors made without a device, or of such
    tensors alone, are the host's; all others count as the device's.
    """

    names = (
        'aten._local_scalar_dense',
        'aten._unique',
        'aten.bincount',
        'aten.equal',
        'aten.is_nonzero',
        'aten.masked_select',
        'aten.nonzero',
        'aten.unique',
        'torchvision.nms',
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.on_host = False  # the call that runs has the host's tensors only
        self.others = ExitStack()

    def __enter__(self) -> Self:
        self.others.enter_context(TensorPlaces(self))
        # No mode sees the original.
        self.others.enter_context(mock.patch.object(torch, 'from_numpy', torch.as_tensor))
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.others.close()

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        name, kwargs = str(func), kwargs or {}
        by_mask = name.startswith('aten.index') and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in tree_leaves(args[1:2])
        )
        by_numbers = name == 'aten.repeat_interleave.Tensor' and kwargs.get('output_size') is None
        if not self.on_host and (by_mask or by_numbers or name.startswith(self.names)):
            self.found.append(name)
        return func(*args, **kwargs)


class TensorPlaces(TorchFunctionMode):
    """Marks the tensors that a GPU's host would have, and tells `syncs` of copies that wait."""

    def __init__(self, syncs: CountSyncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        name, kwargs = func.__name__, kwargs or {}
        leaves = tree_leaves((args, kwargs))
        given = [getattr(x, 'of_host', False) for x in leaves if isinstance(x, Tensor)]
        from_host, moved = all(given), any(isinstance(x, torch.device) for x in leaves)
        waits = {
            'to': given[:1] == [True] and (moved or not from_host) and not kwargs.get('non_blocking'),
            'tensor': moved,
            'as_tensor': moved,
            'new_tensor': not from_host,
            '__getitem__': given[:1] == [False] and any(given),
            '__setitem__': given[:1] == [False] and any(given),
        } | dict.fromkeys(('cpu', 'tolist', 'numpy'), not from_host)
        if waits.get(name):
            self.syncs.found.append(name)
        self.syncs.on_host = from_host and not moved
        try:
            result = func(*args, **kwargs)
        finally:
            self.syncs.on_host = False
        if name in ('to', 'cpu'):
            with _disable_current_modes():  # a CPU copies nothing; the other place's tensor keeps its mark
                result = result.view_as(result)
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                x.of_host = name == 'cpu' or (from_host and not moved)
        return result


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that an operator makes."""

    bytes = 0

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        sizes = [
            each.numel() * each.element_size() for each in tree_leaves(result) if isinstance(each, Tensor)
        ]
        self.bytes = max([self.bytes, *sizes])
        return result


def content_of(x: Tensor) -> Tensor:
    """Numbers in [0, 1) that follow from the values of x alone."""
    return (x.double() * 77.7 + 0.3).sin().abs() * 0.999


@contextmanager
def no_chance() -> Iterator[None]:
    """Random numbers follow from the values they are drawn for, not from the split of a batch.

    A head has the same number of queries in any batch.
    """

    def randint_like(x: Tensor, low: int, high: int) -> Tensor:
        return (
            low + (content_of(x) * (high - low)).to(x.dtype).floor()
            if x.is_floating_point()
            else torch.ones_like(x)
        )

    with (
        mock.patch.object(torch, 'rand_like', lambda x, dtype=None: content_of(x).to(dtype or x.dtype)),
        mock.patch.object(torch, 'randint_like', randint_like),
        mock.patch.object(torch, 'randperm', lambda n, **options: torch.arange(n)),
        mock.patch.object(collaborative, 'MIN_QUERIES', 40),
    ):
        yield


def batch(step: int, counts: list[int]) -> tuple[Tensor, list[dict]]:
    """Images [B, 3, 64, 64] with so many objects."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(len(counts), 3, 64, 64, generator=generator)
    targets = []
    for count in counts:
        boxes = torch.rand(count, 4, generator=generator) * 0.4 + 0.1
        targets.append({'labels': torch.randint(0, 4, (count,), generator=generator), 'boxes': boxes})
    return images, targets
