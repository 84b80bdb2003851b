"""A detector with its preparation of images and its postprocessing: image in, named boxes out."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from datasets.augmentations import build_augmentation
from datasets.class_map import ClassMap
from datasets.readers import READING, build_reader
from models import build_detector, build_postprocessors
from models.postprocess import Encode, postprocess_batch, to_cpu
from models.weights.load import load_checkpoint
from models.weights.read import read_checkpoint
from models.weights.records import extract_class_map, extract_flags
from util.command_line import add_http_flag
from util.config.recipes import find_row
from util.config.recorded import settle_recorded
from util.config.settle import Settled
from util.distributed.collectives import choose_device
from util.errors import UserError
from util.nested_tensor import nested_tensor_from_tensor_list
from util.precision import Precision
from util.run_entries import check_entries


class Detector:
    """A model in evaluation mode, its postprocessors, classes and image preparation.

    Args:
        args: settled flags of the model, of the preparation (img_size, max_size, aug), and of the `reader` of
            image files (exif, upright, pixel_range).
        half: compute in 16 bits, as training with --amp: fp16 on NVIDIA GPUs, bf16 elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        postprocessors: dict[str, nn.Module],
        class_map: ClassMap,
        args: Namespace,
        half: bool = False,
    ) -> None:
        self.model, self.postprocessors = model.eval(), postprocessors
        self.class_map, self.args = class_map, args
        device = next(model.parameters()).device
        half_precision = 'fp16' if device.type == 'cuda' else 'bf16'
        self.precision = Precision(half_precision if half else 'off', device)
        self.prepare = build_augmentation(args).transforms('val')
        self.reader = build_reader(args)

    def __call__(self, image: Tensor | str | Path, score_threshold: float = 0.3) -> list[dict]:
        """Detect objects in a uint8 image [3, H, W] or an image file.

        Returns:
            Objects by falling score, each with its `name`, `score` and `box` (x0, y0, x1, y1 in pixels of the
                image as `reader` reads it), and from a detector with masks its `mask` [H, W] bool.
        """
        image = image if isinstance(image, Tensor) else self.reader.read(image)
        result = self.detect(image)
        objects = []
        for index in result['scores'].argsort(descending=True).tolist():
            name, score = self.class_map.names[result['labels'][index]], result['scores'][index].item()
            if score >= score_threshold and name is not None:
                detected = {'name': name, 'score': score, 'box': result['boxes'][index].tolist()}
                if 'masks' in result:
                    detected['mask'] = result['masks'][index, 0].bool()
                objects.append(detected)
        return objects

    def detect(self, image: Tensor) -> dict[str, Tensor]:
        """Return `scores`, `labels` and `boxes` (xyxy in pixels) of one uint8 image [3, H, W]."""
        return self.detect_batch([image])[0]

    @torch.no_grad()
    def detect_batch(self, images: list[Tensor], encode: Encode | None = None) -> list[dict]:
        """Return the result of `detect` for each image; padding of smaller ones changes results slightly.

        encode: returns the run lengths of a few masks [n, 1, H, W] as a list. With it the results have
            these as `segmentation`, and no `masks`.
        """
        device = next(self.model.parameters()).device
        prepared = [self.prepare(image, {'orig_size': torch.tensor(image.shape[-2:])}) for image in images]
        samples = nested_tensor_from_tensor_list([image for image, _ in prepared]).to(device)
        with self.precision.autocast():
            outputs = self.model(samples)
        targets = [target for _, target in prepared]
        results = postprocess_batch(self.model, self.postprocessors, outputs, targets, samples, encode)
        return [to_cpu(result) for result in results]


def add_detector_args(parser: ArgumentParser, with_device: bool = True) -> None:
    """Declare the flags that name a detector and, with_device, its precision and device."""
    flag = parser.add_argument
    flag(
        '--checkpoint',
        '--weights',
        default='',
        metavar='FILE',
        help='path or URL of weights: a file of main.py or another one with flags, or with --model any file',
    )
    flag(
        '--model',
        default='',
        metavar='NAME',
        help='hub entry or recipe whose model to build, with its published weights if no file is named',
    )
    add_http_flag(parser)
    if with_device:
        flag('--half', action='store_true', help='compute in 16 bits: fp16 on NVIDIA GPUs, bf16 elsewhere')
        flag('--device', default='auto', help='auto, cuda, mps or cpu (default: %(default)s)')


def load_from_flags(args: Namespace) -> Detector:
    """Load the detector that a tool's flags name (`add_detector_args`, and `add_reader_args` if it has them)."""
    detector = load_detector(args.model, args.checkpoint, args.device, args.half)
    given = {name: vars(args)[name] for name in READING if vars(args).get(name) is not None}
    detector.reader = build_reader(Namespace(**vars(detector.args) | given))
    return detector


def load_detector(
    model: str = '', weights: str | Path = '', device: str | torch.device = 'cpu', half: bool = False
) -> Detector:
    """Load a detector from a row of the zoo, from a file of weights, or from both.

    Args:
        model: name of a hub entry; '': the model of the flags in the file.
        weights: path or URL of weights; '': those published for `model`.
        device: device of the model; `auto` takes the first of cuda, mps and cpu that is available.
        half: compute in 16 bits.

    Raises:
        UserError: there is no such file, it does not fit the model, or it has no flags and no model is named.
    """
    row = find_row(model) if model else None
    source = str(weights) if weights or row is None else row.source()
    if not source:
        raise UserError('give --checkpoint FILE, or --model NAME for published weights')
    checkpoint = read_checkpoint(source)
    check_entries(checkpoint, source, resume=False)
    recorded = vars(row.recipe.flags) if row else extract_flags(checkpoint)
    if row is None and not recorded:
        raise UserError(
            f'{source} holds weights alone, without the flags of its run: name its model too (--model NAME '
            'in a tool, docs/zoo.md has the names)'
        )
    class_map = extract_class_map(checkpoint, source)
    network, args = build_network(recorded, class_map.num_classes)
    load_checkpoint(network, checkpoint, name=source)
    network.to(choose_device(str(device)) if device == 'auto' else device)
    return Detector(network, build_postprocessors(args), class_map, args, half)


def build_network(
    flags: Mapping, num_classes: int, backbone_weights: str = 'none'
) -> tuple[nn.Module, Settled]:
    """Build a detector for inference, without the modules of training; return it with its settled flags."""
    fixed = {'num_classes': num_classes, 'eval_module': 'detr', 'aux_loss': False}
    args = settle_recorded({**flags, **fixed}).but(backbone_weights=backbone_weights)
    return build_detector(args, {'one2one': args.num_queries}), args
