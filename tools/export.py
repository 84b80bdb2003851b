"""
Export a trained detector as one program for batches of any size, and check that it computes the same.

  python tools/export.py --checkpoint output/quickstart/checkpoint.pth --output detector.onnx
  python tools/export.py --model detr_resnet50 --output exported --format pt2      exported/detector.pt2
  python tools/export.py --checkpoint FILE --output OUT.onnx --postprocess         detections in pixels
  python tools/export.py --checkpoint FILE --output OUT.onnx --coco_path DATA      AP of both too
  python tools/export.py --checkpoint FILE --output OUT.onnx --half                products in fp16

The input `images` is uint8 [B, 3, H, W], resized but not normalized, and without padding. The outputs are
`pred_logits` and `pred_boxes`; with --postprocess `scores`, `labels` and `boxes` (xyxy in pixels of the
input). Masks are left out. A file whose outputs differ from those of PyTorch is removed. A pt2 file is run by
`torch.export.load(FILE).module(check_guards=False)`: its guards fix whether the sides of images are even.
"""

import argparse
import logging
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.build import build_dataset, build_evaluator, data_settings, locate
from datasets.image_dataset import ImageDataset
from datasets.shapes import ShapesDetection
from models.detector import Detector, add_detector_args, load_detector
from models.postprocess import SoftmaxPostProcess, TopKPostProcess, frame_size
from util.command_line import FlagParser, int_range, run_command
from util.errors import UserError
from util.files import save_atomically

Run = Callable[[Tensor], tuple[Tensor, ...]]

TOLERANCE = 1e-4  # of scores, and of boxes in [0, 1]
HALF_TOLERANCE = 5e-2
HALF_OPERATORS = ('Conv', 'MatMul', 'Gemm')  # that autocast computes in 16 bits
OPSET = 20
PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
PROPOSALS = 'proposals'  # output that a file has until it is verified
OUTPUTS, DETECTIONS = ['pred_logits', 'pred_boxes'], ['scores', 'labels', 'boxes']


def get_args_parser() -> argparse.ArgumentParser:
    parser = FlagParser('export.py', description=__doc__)
    add_detector_args(parser, with_device=False)
    flag = parser.add_argument
    text = 'file to write, or a folder for detector.onnx'
    flag('--output', required=True, type=Path, metavar='OUT', help=text)
    flag('--format', default='onnx', choices=('onnx', 'pt2'), help='onnx, or a program of torch.export: pt2')
    flag('--postprocess', action='store_true', help='end in detections, not in logits and boxes')
    text = 'compute products of an ONNX file in fp16; the rest stays float32'
    flag('--half', action='store_true', help=text)
    group = parser.add_argument_group('AP of PyTorch and of the program, side by side')
    flag = group.add_argument
    flag('--coco_path', metavar='DIR', help='data in COCO form, as main.py reads it')
    flag('--val_images', metavar='DIR', help='folder of images, instead of --coco_path')
    flag('--val_ann', metavar='FILE', help='file of annotations, instead of --coco_path')
    flag('--allow_outside', action='store_true', help='take file names that lead out of the image folder')
    flag('--limit', type=int_range(1), metavar='N', help='only the first N images (default: all)')
    return parser


class AskedProposals:
    """The choice of proposals of a model, unless certain ones are requested; it remembers what it returned.

    Rounding decides between proposals whose scores are almost equal, and each query attends to all others.
    So an exported program is compared with the result of PyTorch for the same proposals, whose scores must
    be those of the choice, too.
    """

    def __init__(self, choose: Callable[..., Tensor]) -> None:
        self.choose = choose
        self.asked: Tensor | None = None  # indices [B, Q] to return in place of the choice
        self.taken: Tensor | None = None  # indices that were returned
        self.difference = 0.0  # between the scores of `asked` and of the choice

    def __call__(self, scores: Tensor, *args: object, **options: object) -> Tensor:
        self.taken = chosen = self.choose(scores, *args, **options)
        if self.asked is not None:
            self.taken = self.asked
            best, asked = (scores.gather(1, index).sigmoid() for index in (chosen, self.asked))
            self.difference = (best - asked).abs().max().item()
        return self.taken


class Program(nn.Module):
    """Module that is exported: images in, tensors in the order of `names` out, then the proposals, if any.

    postprocess: module that computes detections; None: the outputs are logits and boxes.
    """

    def __init__(self, model: nn.Module, postprocess: nn.Module | None) -> None:
        super().__init__()
        self.model, self.postprocess = model, postprocess
        self.names = OUTPUTS if postprocess is None else DETECTIONS
        self.selection: AskedProposals | None = None

    def output_proposals(self) -> None:
        """Add the indices of the proposals to the outputs, if the model has two stages."""
        if (first_stage := getattr(self.model, 'first_stage', None)) is not None:
            self.selection = first_stage.choose = AskedProposals(first_stage.choose)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(images)
        logits, boxes = outputs['pred_logits'], outputs['pred_boxes']
        proposals = () if self.selection is None else (self.selection.taken,)
        if self.postprocess is None:
            return logits, boxes, *proposals
        size = torch.stack([boxes.new_full((), side) for side in images.shape[-2:]])
        scores, labels, boxes, _ = self.postprocess.batched(outputs, size.expand(boxes.shape[0], 2))
        return scores, labels, boxes, *proposals

    @torch.no_grad()
    def expected(self, images: Tensor, proposals: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the outputs of the detector's own modules, from the best proposals or from given ones."""
        if self.selection is not None:
            self.selection.asked = proposals
        outputs = self.model(images)
        if self.postprocess is None:
            return outputs['pred_logits'], outputs['pred_boxes']
        size = torch.tensor(images.shape[-2:]).expand(len(images), 2)
        results = self.postprocess(outputs, size)
        return tuple(torch.stack([result[name] for result in results]) for name in self.names)


def build_program(detector: Detector, postprocess: bool) -> Program:
    """Build the program of a detector.

    Raises:
        UserError: a program cannot compute its detections.
    """
    module = detector.postprocessors['bbox']
    if postprocess and not isinstance(module, SoftmaxPostProcess | TopKPostProcess):
        raise UserError(
            f'--postprocess: {type(module).__name__} gives a different number of detections for each image, '
            'which cannot be exported: leave the flag out'
        )
    return Program(detector.model, module if postprocess else None).eval()


def check_packages() -> None:
    missing = ' '.join(name for name in PACKAGES if find_spec(name) is None)
    if missing:
        raise UserError(f'--format onnx needs packages: pip install {missing}, or take --format pt2')


def export(program: Program, images: Tensor, path: Path) -> None:
    """Write a program as .onnx or .pt2, with number, height and width of the images variable."""
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        exported = torch.export.export(
            program, (images,), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},), strict=False
        )
    if path.suffix == '.pt2':
        torch.export.save(exported, path)
        return
    outputs = program.names + [PROPOSALS] * (program.selection is not None)
    names = {'input_names': ['images'], 'output_names': outputs}
    torch.onnx.export(exported, **names, opset_version=OPSET, dynamo=True, verbose=False).save(path)
    if (weights := path.with_name(f'{path.name}.data')).exists():
        weights.unlink()
        raise UserError('--format onnx: these weights do not fit into one file: take --format pt2')


def halve(path: Path) -> None:
    """Convert HALF_OPERATORS of an ONNX file, and their weights, to fp16; all other tensors stay float32."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(path)
    graph, nodes, half_names = model.graph, [], set()
    weights = {weight.name: weight for weight in graph.initializer}
    for node in graph.node:
        if node.op_type not in HALF_OPERATORS:
            nodes.append(node)
            continue
        for index, name in enumerate(node.input):
            if not name:  # an input that is left out
                continue
            half = f'{name}.half'
            if half not in half_names and name in weights:
                values = numpy_helper.to_array(weights[name]).astype(np.float16)
                graph.initializer.append(numpy_helper.from_array(values, half))
            elif half not in half_names:
                nodes.append(helper.make_node('Cast', [name], [half], to=onnx.TensorProto.FLOAT16))
            half_names.add(half)
            node.input[index] = half
        name = node.output[0]
        node.output[0] = f'{name}.half'
        half_names.add(f'{name}.half')
        nodes += [node, helper.make_node('Cast', [f'{name}.half'], [name], to=onnx.TensorProto.FLOAT)]
    inputs = {name for node in nodes for name in node.input}
    used_weights = [weight for weight in graph.initializer if weight.name in inputs]
    for field, values in ((graph.node, nodes), (graph.initializer, used_weights)):
        del field[:]
        field.extend(values)
    onnx.save(model, path)


def drop_proposals(path: Path) -> None:
    """Remove the output of proposals from an ONNX file that has it."""
    import onnx

    model = onnx.load(path)
    if model.graph.output[-1].name == PROPOSALS:
        del model.graph.output[-1]
        onnx.save(model, path)


def load(path: Path) -> Run:
    """Load a program written by `export`."""
    if path.suffix == '.pt2':
        make_module = torch.export.load(path).module
        guarded = 'check_guards' in signature(make_module).parameters  # from PyTorch 2.9 on
        return make_module(check_guards=False) if guarded else make_module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {'images': images.numpy()})))


def draw_images(number: int, height: int, width: int) -> Tensor:
    """Return built-in images, uint8 [number, 3, height, width]."""
    shapes = ShapesDetection(number, 'test')
    images = [F.interpolate(shapes[index][0][None].float(), (height, width)) for index in range(number)]
    return torch.cat(images).byte()


def image_sizes(detector: Detector) -> list[tuple[int, int, int]]:
    """Return number, height and width of the example's images, and of those to compare."""
    side, multiple = max(256, detector.args.img_size // 2), detector.model.multiple
    long = side * 5 // 4
    sizes = [(2, side, long), (1, side + 37, side - 19), (2, long, side), (2, side - 51, side + 62)]
    return [(number, *(-(-edge // multiple) * multiple for edge in edges)) for number, *edges in sizes]


def comparison_rows(
    program: Program, outputs: tuple[Tensor, ...], size: tuple[int, int], softmax: bool
) -> Tensor:
    """Return rows to compare, [B, N, D]: the label of detections, then scores, then a box in [0, 1].

    size: height and width of the images.
    """
    if program.postprocess is None:
        logits, boxes = outputs
        return torch.cat([logits.softmax(-1) if softmax else logits.sigmoid(), boxes], dim=-1)
    scores, labels, boxes = outputs
    return torch.cat(
        [labels[..., None], scores[..., None], boxes / torch.tensor(size).flip(0).repeat(2)], dim=-1
    )


def largest_differences(
    expected: Tensor, exported: Tensor, truncated: bool, tolerance: float
) -> tuple[float, float]:
    """Return the largest difference of scores (and labels), and of boxes, between rows and the nearest rows.

    The order may differ, because rounding chooses between detections whose scores are almost equal.

    Args:
        truncated: rows are the best of more, by score. Those within the tolerance of the last score may
            differ.
    """
    differences = []
    for rows, others in ((expected, exported), (exported, expected)):
        nearest = torch.cdist(rows, others, p=torch.inf).argmin(2, keepdim=True)
        difference = (rows - others.gather(1, nearest.expand_as(rows))).abs()
        if truncated:
            scores = rows[..., -5:-4]
            difference *= scores > scores.amin(1, keepdim=True) + tolerance
            difference[..., -5] = (expected - exported)[..., -5].abs()
        differences.append(difference)
    largest = torch.cat(differences, dim=1)
    return largest[..., :-4].amax().item(), largest[..., -4:].amax().item()


def verify(detector: Detector, program: Program, run: Run, half: bool = False) -> None:
    """Compare a program in a file with the detector at several sizes, and print the largest differences.

    Raises:
        UserError: a difference is above TOLERANCE (HALF_TOLERANCE).
    """
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    module = detector.postprocessors['bbox']
    softmax = isinstance(module, SoftmaxPostProcess)
    truncated = isinstance(program.postprocess, TopKPostProcess)
    for number, height, width in image_sizes(detector)[1:]:
        images = draw_images(number, height, width)
        outputs = run(images)
        exported, proposals = outputs[: len(program.names)], outputs[len(program.names) :]
        expected = program.expected(images, *proposals)
        rows = [comparison_rows(program, x, (height, width), softmax) for x in (expected, exported)]
        scores, boxes = largest_differences(*rows, truncated, tolerance)
        if program.selection is not None:
            scores = max(scores, program.selection.difference)
        line = f'largest difference of scores {scores:.1e}, of boxes {boxes:.1e}'
        print(f'{number} x {height} x {width}: {line}', flush=True)
        if not (scores <= tolerance and boxes <= tolerance):
            raise UserError(
                f'the exported program is not the detector ({line}; at most {tolerance} is allowed): no file '
                'is kept: ' + ('leave --half out' if half else 'try the other --format')
            )


def build_val_data(detector: Detector, args: Namespace) -> ImageDataset:
    """Build the validation data of the command line, prepared as in the detector's run."""
    kind = 'lvis' if getattr(detector.args, 'dataset_file', '') == 'lvis' else 'auto'
    paths = dict.fromkeys(('train_images', 'train_ann', 'val_share', 'split_seed'))
    paths |= {name: getattr(args, name) for name in ('coco_path', 'val_images', 'val_ann', 'allow_outside')}
    flags = Namespace(**vars(detector.args) | paths | {'dataset_file': kind, 'seed': 0, 'eval': True})
    settings = locate(data_settings(flags, masks=False), alone=True)
    return build_dataset('val', settings, detector.class_map)


@torch.no_grad()
def compare_precision(
    detector: Detector, program: Program, runs: dict[str, Run], dataset: ImageDataset, limit: int | None
) -> str:
    """Return a line with AP and AP50 of each run, image by image."""
    kind = 'lvis' if dataset.federated else 'coco'
    evaluators = {name: build_evaluator(kind, dataset) for name in runs}
    count = min(limit or len(dataset), len(dataset))
    for index in range(count):
        image, target = dataset[index]
        size = frame_size(target)
        for name, run in runs.items():
            outputs = dict(zip(program.names, run(image[None]), strict=True))
            if program.postprocess is None:
                result = detector.postprocessors['bbox'](outputs, size[None])[0]
            else:
                result = {key: value[0] for key, value in outputs.items()}
                result['boxes'] *= (size / torch.tensor(image.shape[-2:])).flip(0).repeat(2)
            evaluators[name].update({int(target['image_id']): result})
    texts = []
    for name, evaluator in evaluators.items():
        numbers = evaluator.summarize().numbers
        texts.append(f'{name} AP {100 * numbers["AP"]:.2f}, AP50 {100 * numbers["AP50"]:.2f}')
    return f'{count} images: {"; ".join(texts)}'


def output_path(output: Path, suffix: str) -> Path:
    """Return the file to write.

    Raises:
        UserError: it exists, or has another suffix.
    """
    if output.suffix not in ('', suffix) and not output.is_dir():
        raise UserError(f'--output {output}: let it end in {suffix}, or name a folder')
    path = output if output.suffix == suffix else output / f'detector{suffix}'
    if path.exists():
        raise UserError(f'{path} exists: choose another name, or remove it')
    return path


def main(args: Namespace) -> str:
    if args.format == 'onnx':
        check_packages()
    elif args.half:
        raise UserError(
            '--half is for --format onnx: a program of torch.export runs in the types of its weights'
        )
    if args.val_images and not args.val_ann:
        raise UserError(f'--val_images {args.val_images}: give --val_ann too, or leave it out')
    path = output_path(args.output, f'.{args.format}')
    detector = load_detector(args.model, args.checkpoint)
    program = build_program(detector, args.postprocess)
    if args.format == 'onnx':
        program.output_proposals()
    dataset = build_val_data(detector, args) if args.coco_path or args.val_ann else None

    def save(partial: Path) -> None:
        export(program, draw_images(*image_sizes(detector)[0]), partial)
        if args.half:
            halve(partial)
        verify(detector, program, load(partial), args.half)
        if args.format == 'onnx':
            drop_proposals(partial)

    logging.getLogger('onnxscript').setLevel(logging.ERROR)  # it warns about each operator otherwise
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        save_atomically(path, save)
    if dataset is not None:
        runs = {'PyTorch': program.expected, 'exported': load(path)}
        print(compare_precision(detector, program, runs, dataset, args.limit))
    return f'{path}: {path.stat().st_size / 1e6:.1f} MB'


if __name__ == '__main__':
    run_command(main, get_args_parser())
