"""
Backbones: torchvision's ResNet and MobileNetV2, Swin (`swin.py`), ViT (`vit.py`), and networks of timm with
maps of strides 4, 8, 16 and 32 as `timm/NAME`.

`Joiner` and `Backbone.body` exist because official state dicts have them in their names. A body turns images
[B, 3, H, W] into a dictionary of maps, lists in `units()` the modules that `models.units` works on, and may
have `multiple`: sides of a batch must be multiples of this number of pixels.

The backbone holds the mean and standard deviation that its weights were trained with. It normalises uint8
images on the device; floating-point images are normalised already. Parameter names under `backbone.0.body`
are torchvision's, or the official ones of Swin and ViT.
"""

import pickle
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops.misc import FrozenBatchNorm2d

from util.distributed.collectives import is_main_process
from util.distributed.preemption import interruptible
from util.download import is_url
from util.errors import UserError
from util.nested_tensor import NestedTensor, resize_mask

from .frozen_norm import fold_frozen_norms
from .swin import SWIN_SIZES, WEIGHTS_URL, SwinTransformer
from .units import call_unit
from .vit import VIT_SIZES, VisionTransformer
from .weights.backbones import fetch_imagenet, load_backbone, no_download, read_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Every ResNet, ResNeXt and Wide ResNet of torchvision, and a smaller one.
RESNETS = (
    'resnet10',
    *torchvision.models.list_models(torchvision.models, include=['resnet*', 'resnext*', 'wide_resnet*']),
)
# Networks of torchvision with `features`: the last module of each stage, of strides 4, 8, 16, 32 (as
# layer1..layer4 of a ResNet).
FEATURE_STAGES = {'mobilenet_v2': ('3', '6', '13', '18')}
NORM_LAYERS = {'frozen': FrozenBatchNorm2d, 'batch': nn.BatchNorm2d, 'group': partial(nn.GroupNorm, 32)}
ODD_SIZE = (97, 161)  # height and width of an image that is no multiple of any window or stride


class Backbone(nn.Module):
    """Feature maps of an image batch, with padding masks at their size.

    Args:
        body: module that turns [B, 3, H, W] into a dictionary of feature maps, coarsest last.
        num_channels: number of channels of each map.
        mean, std: statistics of the training images, for pixels in [0, 1].
    """

    def __init__(
        self,
        body: nn.Module,
        num_channels: list[int],
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.body = body.to(memory_format=torch.channels_last)  # makes convolutions and pooling faster
        self.num_channels = num_channels
        # In units of uint8 pixels. Checkpoints do not hold them: they follow from the name of the backbone.
        self.register_buffer('pixel_mean', 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer('pixel_std', 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)

    def normalize(self, samples: NestedTensor) -> NestedTensor:
        """Normalise uint8 pixels. The padding becomes 0, as if added after normalising (official order)."""
        if samples.tensors.is_floating_point():
            return samples
        tensors = (samples.tensors - self.pixel_mean) / self.pixel_std
        return NestedTensor(tensors.masked_fill_(samples.mask[:, None], 0), samples.mask)

    def forward(self, samples: NestedTensor) -> list[NestedTensor]:
        samples = self.normalize(samples)
        features = self.body(samples.tensors.contiguous(memory_format=torch.channels_last))
        return [NestedTensor(x, resize_mask(samples.mask, x.shape[-2:])) for x in features.values()]


class Joiner(nn.Sequential):
    """Backbone and position encoding side by side (official names `backbone.0`, `backbone.1`)."""

    def __init__(self, backbone: Backbone, position_embedding: nn.Module) -> None:
        super().__init__(backbone, position_embedding)

    @property
    def num_channels(self) -> list[int]:
        return self[0].num_channels

    @property
    def multiple(self) -> int:
        """Return the number of pixels that the sides of a batch must be multiples of."""
        return getattr(self[0].body, 'multiple', 1)

    def forward(self, samples: NestedTensor) -> tuple[list[NestedTensor], list[Tensor]]:
        """Return feature maps [B, C, h, w] and their encodings [B, hidden_dim, h, w], coarsest last."""
        features = self[0](samples)
        return features, [self.encode_positions(x.mask).to(x.tensors.dtype) for x in features]

    def encode_positions(self, mask: Tensor) -> Tensor:
        """Return the position encoding [B, hidden_dim, h, w] for a padding mask [B, h, w]."""
        return self[1](mask)


class StageBody(IntermediateLayerGetter):
    """A torchvision network, cut off after the last feature map that the detector reads.

    `return_layers` maps the name of each child whose output is returned to the name of that map.
    """

    def units(self) -> list[nn.Module]:
        """Return the stages for `models.units`. Layers of the stem are left out: its ReLU works in place."""
        return [part for part in self.values() if len(list(part.children())) > 0]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = {}
        for name, part in self.items():
            x = call_unit(part, x)
            if name in self.return_layers:
                maps[self.return_layers[name]] = x
        return maps


class TimmBody(nn.Module):
    """A timm feature network that returns its maps in a dictionary."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def units(self) -> list[nn.Module]:
        """Return the whole network for `models.units`: stages of timm's networks have no common names."""
        return [self.network]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.network(x)
        if getattr(self.network, 'output_fmt', 'NCHW') == 'NHWC':
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return {str(index): feature for index, feature in enumerate(features)}


def build_backbone(
    name: str,
    weights: str,
    dilation: bool,
    norm: str,
    stages: range,
    train: bool,
    drop_path_rate: float = 0.0,
) -> Backbone:
    """Build a backbone, by the entry of `BACKBONES` for its name, and freeze what is not to be trained.

    Args:
        weights: `imagenet`, `none`, or a file of a state dict under the names of torchvision, timm or
            official Swin.
        norm: `frozen`, `batch` or `group`.
        stages: stages whose maps are returned. Stages 1 to 4 have strides 4, 8, 16 and 32 (16 with dilation).
        train: False freezes all parameters.
        drop_path_rate: argument of Swin and ViT; other networks do not read it.

    Raises:
        UserError: the name is unknown, or the network lacks one of the options.
    """
    names = (*RESNETS, *FEATURE_STAGES, *SWIN_SIZES, *VIT_SIZES)
    if name not in names and not name.startswith('timm/'):
        raise UserError(f"unknown backbone '{name}': choose {', '.join(names)} or timm/NAME")
    build = next(build for prefix, build in BACKBONES.items() if name.startswith(prefix))
    backbone = build(
        name.removeprefix('timm/'),
        weights=weights,
        dilation=dilation,
        norm=norm,
        stages=stages,
        drop_path_rate=drop_path_rate,
    )
    if not train:
        backbone.body.requires_grad_(False)
    return backbone


def build_torchvision(
    name: str, weights: str, dilation: bool, norm: str, stages: range, **_: object
) -> Backbone:
    """Build a network of torchvision. Frozen norms freeze stem and first stage, too (official rule)."""
    if dilation and name in ('resnet10', 'resnet18', 'resnet34', *FEATURE_STAGES):
        raise UserError(f'--dilation (DC5) needs resnet50 or deeper: {name} has no dilated last stage')
    if norm == 'group' and (weights == 'imagenet' or name in FEATURE_STAGES):
        raise UserError(
            '--backbone_norm group is for ResNets that start from random numbers or a file '
            f'(--backbone_weights none or FILE): the weights of {name} have batch norms'
        )
    options = {'replace_stride_with_dilation': [False, False, True]} if dilation else {}
    network = torchvision_network(name, weights, norm_layer=NORM_LAYERS[norm], **options)
    last_modules = FEATURE_STAGES.get(name, ('layer1', 'layer2', 'layer3', 'layer4'))
    children = network.features if name in FEATURE_STAGES else network
    body = StageBody(children, {last_modules[stage - 1]: str(stage) for stage in stages})
    if norm == 'frozen':
        for child_name, child in body.items():
            child.requires_grad_(False)
            if child_name == last_modules[0]:
                break
    fold_frozen_norms(body)
    with torch.no_grad():
        num_channels = [x.shape[1] for x in body.eval()(torch.zeros(1, 3, 64, 64)).values()]
    return Backbone(body.train(), num_channels)


def torchvision_network(name: str, weights: str, **options: object) -> nn.Module:
    """Build a torchvision classifier with its weights; only the main process downloads those of ImageNet."""
    if name == 'resnet10':  # one block per stage; torchvision has neither the name nor weights
        if weights == 'imagenet':
            raise UserError('resnet10 has no ImageNet weights: give --backbone_weights none or FILE')
        network = ResNet(BasicBlock, [1, 1, 1, 1], **options)
    else:
        network = torchvision.models.get_model(name, weights=None, **options)
    if weights == 'none' or (weights == 'imagenet' and not is_main_process()):
        return network
    if weights == 'imagenet':
        weights = fetch_imagenet(name, torchvision.models.get_model_weights(name)['IMAGENET1K_V1'].url)
    load_backbone(network, check_file(weights), name, whole=True)
    return network


def check_file(path: str) -> str:
    """Return the path of a file.

    Raises:
        UserError: there is none.
    """
    if not Path(path).is_file():
        raise UserError(f'--backbone_weights {path}: no such file (imagenet, none or a file of a state dict)')
    return path


def build_swin(name: str, weights: str, stages: range, drop_path_rate: float, **_: object) -> Backbone:
    """Build a Swin backbone. Only the main process downloads weights from a URL."""
    body = SwinTransformer(SWIN_SIZES[name], stages, drop_path_rate)
    source = WEIGHTS_URL.format(SWIN_SIZES[name].weights) if weights == 'imagenet' else weights
    if source != 'none' and (is_main_process() or not is_url(source)):
        load_backbone(body, source, name)
    return Backbone(body, body.num_channels)


def build_vit(name: str, weights: str, drop_path_rate: float, **_: object) -> Backbone:
    if weights == 'imagenet':
        raise UserError(
            f'the weights of {name} have no direct URL: download those of EVA-02 (pretrained on Objects365 '
            'by Co-DETR, or on images) and pass their path (--backbone_weights FILE), or none to start from '
            'random numbers'
        )
    body = VisionTransformer(VIT_SIZES[name], drop_path_rate)
    if weights != 'none':
        load_backbone(body, weights, name, averaged=True)
    return Backbone(body, body.num_channels)


def build_timm(name: str, weights: str, dilation: bool, norm: str, stages: range, **_: object) -> Backbone:
    """Build a feature network of timm's registry, and refuse one whose maps a detector cannot use.

    Names of other sources, a hub or a folder, are refused, also those in a checkpoint: to build its detector,
    a program would have to contact or read what the checkpoint names.
    """
    try:
        import timm
        from timm.layers import freeze_batch_norm_2d
    except ImportError as error:
        raise UserError(f'--backbone timm/{name} needs timm: pip install timm') from error
    if not timm.is_model(name) or set(name) & set('/\\:'):
        raise UserError(
            f'--backbone timm/{name} is not in the registry of timm {timm.__version__} (timm.list_models() '
            'has its names): for other weights of a known network pass their file as --backbone_weights'
        )
    if norm == 'group':
        raise UserError(
            '--backbone_norm group is for backbones of torchvision; networks of timm keep their norms'
        )
    network = create_timm(name, weights, stages, {'output_stride': 16} if dilation else {})
    body = TimmBody(network)
    check_timm(body, name, [16 if dilation and stage == 4 else 2 ** (stage + 1) for stage in stages])
    if norm == 'frozen':
        body = freeze_batch_norm_2d(body)
    config = network.pretrained_cfg
    return Backbone(body, network.feature_info.channels(), config['mean'], config['std'])


def create_timm(name: str, weights: str, stages: range, options: dict) -> nn.Module:
    """Create a feature network of timm with its weights, which only the main process downloads."""
    import timm

    if weights == 'imagenet' and is_main_process() and timm.is_model_pretrained(name):
        published = timm.get_pretrained_cfg(name)
        if not published.hf_hub_id:
            weights = fetch_imagenet(f'timm/{name}', published.url)
    if weights not in ('imagenet', 'none'):
        read_weights(check_file(weights))  # refuses a damaged file with a clear message
        options = options | {'pretrained_cfg_overlay': {'file': weights}}
    pretrained = weights != 'none' and (weights != 'imagenet' or is_main_process())
    indices = [stage - 5 for stage in stages]
    try:
        with interruptible():  # timm fetches by huggingface_hub, which checks lengths and has timeouts
            return timm.create_model(
                name, pretrained=pretrained, features_only=True, out_indices=indices, **options
            )
    except (RuntimeError, IndexError, AssertionError, TypeError, pickle.UnpicklingError) as error:
        flag = ' --dilation' if 'output_stride' in options else ''
        raise UserError(f'--backbone timm/{name} --backbone_stages {stages[-1]}{flag}: {error}') from error
    except Exception as error:
        # huggingface_hub lets errors of its HTTP library through, httpx or another version of it.
        if not isinstance(error, OSError) and not type(error).__module__.startswith('httpx'):
            raise
        raise UserError(no_download(f'timm/{name}', error)) from error


def check_timm(body: TimmBody, name: str, strides: list[int]) -> None:
    """Check that a network has these strides and takes images of any size.

    Raises:
        UserError: it does not.
    """
    reductions = body.network.feature_info.reduction()
    try:
        if reductions != strides:
            raise ValueError(f'its maps have strides {reductions}, not {strides}')
        with torch.no_grad():
            maps = body.eval()(torch.zeros(1, 3, *ODD_SIZE)).values()
        if [x.shape[1] for x in maps] != body.network.feature_info.channels():
            raise ValueError(f'its maps have shapes {[tuple(x.shape) for x in maps]}')
    except Exception as error:  # a network for images of one size may raise any
        raise UserError(
            f'--backbone timm/{name} is no backbone of a detector here, which needs maps of strides 4, 8, 16 '
            f'and 32 of images of any size ({str(error) or type(error).__name__}): choose a convolutional '
            'network of timm, or swin_tiny, vit_large and the like, which are not from timm'
        ) from error
    body.train()


# Beginning of a name -> builder, which reads the options of `build_backbone` that it needs.
# `util.config.networks.KINDS` has the facts that settings need.
BACKBONES = {'timm/': build_timm, 'swin_': build_swin, 'vit_': build_vit, '': build_torchvision}
