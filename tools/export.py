"""
Export a trained detector as one program for batches of any size, and check that it computes the same.

  python tools/export.py --checkpoint output/quickstart/checkpoint.pth --output detector.onnx
  python tools/export.py --model detr_resnet50 --output exported --format pt2      exported/detector.pt2
  python tools/export.py --checkpoint FILE --output OUT.onnx --postprocess         detections in pixels
  python tools/export.py --checkpoint FILE --output OUT.onnx --coco_path DATA      AP of both too
  python tools/export.py --checkpoint FILE --output OUT.onnx --half                products in fp16

The input `images` is uint8 [B, 3, H, W], resized but not normalized; all of it is image, nothing is padding.
The outputs are `pred_logits` and `pred_boxes`; with --postprocess `scores`, `labels` and `boxes` (xyxy in
pixels of the input). Masks are left out. A file whose outputs differ from PyTorch's is removed. A pt2 file is
run by `torch.export.load(FILE).module(check_guards=False)`: its guards fix the parity of the example's sides.
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

from datasets.build import build_dataset, build_evaluator, data_settings
from datasets.image_dataset import ImageDataset
from datasets.shapes import ShapesDetection
from models.deformable_detr import AskedProposals
from models.detector import Detector, add_detector_args, load_detector
from models.postprocess import SoftmaxPostProcess, TopKPostProcess, frame_size
from util.errors import UserError
from util.files import save_atomically
from util.flags import FlagParser, int_range, run_command

Run = Callable[[Tensor], tuple[Tensor, ...]]

TOLERANCE = 1e-4  # of scores, and of boxes in [0, 1]
HALF_TOLERANCE = 5e-2
HALVED = ('Conv', 'MatMul', 'Gemm')  # what autocast computes in 16 bits
OPSET = 20
PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
PROPOSALS = 'proposals'  # output that a file has only until it is verified
OUTPUTS, DETECTIONS = ['pred_logits', 'pred_boxes'], ['scores', 'labels', 'boxes']


def get_args_parser() -> argparse.ArgumentParser:
    parser = FlagParser('export.py', description=__doc__)
    add_detector_args(parser, with_device=False)
    flag = parser.add_argument
    flag(
        '--output',
        required=True,
        type=Path,
        metavar='OUT',
        help='file to write, or a folder for detector.onnx',
    )
    flag('--format', default='onnx', choices=('onnx', 'pt2'), help='onnx, or a program of torch.export: pt2')
    flag(
        '--postprocess',
        action='store_true',
        help='let the program end in detections, not in logits and boxes',
    )
    flag(
        '--half', action='store_true', help='compute products of an ONNX file in fp16; the rest stays float32'
    )
    group = parser.add_argument_group('AP of PyTorch and of the program, side by side')
    flag = group.add_argument
    flag('--coco_path', metavar='DIR', help='data in COCO form, as main.py reads it')
    flag('--val_images', metavar='DIR', help='folder of images, instead of --coco_path')
    flag('--val_ann', metavar='FILE', help='file of annotations, instead of --coco_path')
    flag('--allow_outside', action='store_true', help='take file names that lead out of the image folder')
    flag('--limit', type=int_range(1), metavar='N', help='only the first N images (default: all)')
    return parser


class Program(nn.Module):
    """What is exported: images in, tensors in the order of `names` out, and after them perhaps proposals.

    postprocess: module whose detections end the program; None: it ends in logits and boxes.
    """

    def __init__(self, model: nn.Module, postprocess: nn.Module | None) -> None:
        super().__init__()
        self.model, self.postprocess = model, postprocess
        self.names = OUTPUTS if postprocess is None else DETECTIONS
        self.selection: AskedProposals | None = None

    def output_proposals(self) -> None:
        """Add the indices of the proposals to the outputs, if the model has two stages."""
        if (first_stage := getattr(self.model, 'first_stage', None)) is not None:
            self.selection = first_stage.choose = first_stage.choose.exportable()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(images)
        logits, boxes = outputs['pred_logits'], outputs['pred_boxes']
        more = () if self.selection is None else (self.selection.taken,)
        if self.postprocess is None:
            return logits, boxes, *more
        size = torch.stack([boxes.new_full((), side) for side in images.shape[-2:]])
        scores, labels, boxes, _ = self.postprocess.batched(outputs, size.expand(boxes.shape[0], 2))
        return scores, labels, boxes, *more

    @torch.no_grad()
    def expected(self, images: Tensor, proposals: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the outputs of the detector's own modules, from the best proposals or from these."""
        if self.selection is not None:
            self.selection.asked = proposals
        outputs = self.model(images)
        if self.postprocess is None:
            return outputs['pred_logits'], outputs['pred_boxes']
        size = torch.tensor(images.shape[-2:]).expand(len(images), 2)
        found = self.postprocess(outputs, size)
        return tuple(torch.stack([one[name] for one in found]) for name in self.names)


def make_program(detector: Detector, postprocess: bool) -> Program:
    """Return what to export of a detector.

    Raises:
        UserError: its detections cannot be computed inside a program.
    """
    module = detector.postprocessors['bbox']
    if postprocess and not isinstance(module, SoftmaxPostProcess | TopKPostProcess):
        raise UserError(
            f'--postprocess: {type(module).__name__} keeps another number of detections in each image, which '
            'cannot be exported: leave the flag out'
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
    more = [] if program.selection is None else [PROPOSALS]
    names = {'input_names': ['images'], 'output_names': program.names + more}
    torch.onnx.export(exported, **names, opset_version=OPSET, dynamo=True, verbose=False).save(path)
    if (weights := path.with_name(f'{path.name}.data')).exists():
        weights.unlink()
        raise UserError('--format onnx: these weights do not fit into one file: take --format pt2')


def halve(path: Path) -> None:
    """Let HALVED operators of an ONNX file, and their weights, be fp16; all other tensors stay float32."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(path)
    graph, nodes, made = model.graph, [], set()
    weights = {weight.name: weight for weight in graph.initializer}
    for node in graph.node:
        if node.op_type not in HALVED:
            nodes.append(node)
            continue
        for place, name in enumerate(node.input):
            if not name:  # an input that is left out
                continue
            half = f'{name}.half'
            if half not in made and name in weights:
                values = numpy_helper.to_array(weights[name]).astype(np.float16)
                graph.initializer.append(numpy_helper.from_array(values, half))
            elif half not in made:
                nodes.append(helper.make_node('Cast', [name], [half], to=onnx.TensorProto.FLOAT16))
            made.add(half)
            node.input[place] = half
        name = node.output[0]
        node.output[0] = f'{name}.half'
        made.add(f'{name}.half')
        nodes += [node, helper.make_node('Cast', [f'{name}.half'], [name], to=onnx.TensorProto.FLOAT)]
    used = {name for node in nodes for name in node.input}
    kept = [weight for weight in graph.initializer if weight.name in used]
    for field, values in ((graph.node, nodes), (graph.initializer, kept)):
        del field[:]
        field.extend(values)
    onnx.save(model, path)


def drop_proposals(path: Path) -> None:
    """Take the output of proposals out of an ONNX file that has it."""
    import onnx

    model = onnx.load(path)
    if model.graph.output[-1].name == PROPOSALS:
        del model.graph.output[-1]
        onnx.save(model, path)


def load(path: Path) -> Run:
    """Load a program that `export` has written."""
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


def sizes(detector: Detector) -> list[tuple[int, int, int]]:
    """Return number, height and width of the images of the example, and of those to compare."""
    side, multiple = max(256, detector.args.img_size // 2), detector.model.multiple
    wide = side * 5 // 4
    chosen = [(2, side, wide), (1, side + 37, side - 19), (2, wide, side), (2, side - 51, side + 62)]
    return [(number, *(-(-edge // multiple) * multiple for edge in edges)) for number, *edges in chosen]


def rows_of(program: Program, outputs: tuple[Tensor, ...], size: tuple[int, int], softmax: bool) -> Tensor:
    """Return what is compared, [B, N, D]: the label of detections, then scores, then a box in [0, 1].

    size: height and width of the images.
    """
    if program.postprocess is None:
        logits, boxes = outputs
        return torch.cat([logits.softmax(-1) if softmax else logits.sigmoid(), boxes], dim=-1)
    scores, labels, boxes = outputs
    return torch.cat(
        [labels[..., None], scores[..., None], boxes / torch.tensor(size).flip(0).repeat(2)], dim=-1
    )


def largest_differences(ours: Tensor, theirs: Tensor, cut: bool, tolerance: float) -> tuple[float, float]:
    """Return the largest difference of scores (and labels), and of boxes, between rows and their nearest
    others.

    The order may differ, because rounding chooses between detections whose scores are almost equal.

    Args:
        cut: rows are the best of more, by score; those near the last one, within the tolerance, may be
        others.
    """
    gaps = []
    for these, others in ((ours, theirs), (theirs, ours)):
        nearest = torch.cdist(these, others, p=torch.inf).argmin(2, keepdim=True)
        gap = (these - others.gather(1, nearest.expand_as(these))).abs()
        if cut:
            scores = these[..., -5:-4]
            gap *= scores > scores.amin(1, keepdim=True) + tolerance
            gap[..., -5] = (ours - theirs)[..., -5].abs()
        gaps.append(gap)
    rows = torch.cat(gaps, dim=1)
    return rows[..., :-4].amax().item(), rows[..., -4:].amax().item()


def verify(detector: Detector, program: Program, run: Run, half: bool = False) -> None:
    """Compare a program in a file with the detector at several sizes, and print the largest differences.

    Raises:
        UserError: one is above TOLERANCE (HALF_TOLERANCE).
    """
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    module = detector.postprocessors['bbox']
    softmax, cut = isinstance(module, SoftmaxPostProcess), isinstance(program.postprocess, TopKPostProcess)
    for number, height, width in sizes(detector)[1:]:
        images = draw_images(number, height, width)
        theirs = run(images)
        ours = program.expected(images, *theirs[len(program.names) :])
        outputs = ours, theirs[: len(program.names)]
        rows = [rows_of(program, each, (height, width), softmax) for each in outputs]
        scores, boxes = largest_differences(*rows, cut, tolerance)
        if program.selection is not None:
            scores = max(scores, program.selection.difference)
        line = f'largest difference of scores {scores:.1e}, of boxes {boxes:.1e}'
        print(f'{number} x {height} x {width}: {line}', flush=True)
        if not (scores <= tolerance and boxes <= tolerance):
            raise UserError(
                f'the exported program is not the detector ({line}; at most {tolerance} is allowed): no file '
                'is kept: ' + ('leave --half out' if half else 'try the other --format')
            )


def read_data(detector: Detector, args: Namespace) -> ImageDataset:
    """Build the validation data of the command line, prepared as those of the detector's run."""
    kind = 'lvis' if getattr(detector.args, 'dataset_file', '') == 'lvis' else 'coco'
    given = {name: getattr(args, name) for name in ('coco_path', 'val_images', 'val_ann', 'allow_outside')}
    flags = Namespace(**vars(detector.args) | given | {'dataset_file': kind, 'seed': 0, 'eval': True})
    return build_dataset('val', data_settings(flags, masks=False), detector.class_map)


@torch.no_grad()
def average_precision(
    detector: Detector, program: Program, runs: dict[str, Run], dataset: ImageDataset, limit: int | None
) -> str:
    """Return a line with AP and AP50 of each way to run a program, image by image."""
    kind = 'lvis' if dataset.federated else 'coco'
    evaluators = {name: build_evaluator(kind, dataset) for name in runs}
    count = min(limit or len(dataset), len(dataset))
    for index in range(count):
        image, target = dataset[index]
        size = frame_size(target)
        for name, run in runs.items():
            found = dict(zip(program.names, run(image[None]), strict=True))
            if program.postprocess is None:
                result = detector.postprocessors['bbox'](found, size[None])[0]
            else:
                result = {key: value[0] for key, value in found.items()}
                result['boxes'] *= (size / torch.tensor(image.shape[-2:])).flip(0).repeat(2)
            evaluators[name].update({int(target['image_id']): result})
    found = {name: evaluator.summarize().numbers for name, evaluator in evaluators.items()}
    lines = [f'{name} AP {100 * n["AP"]:.2f}, AP50 {100 * n["AP50"]:.2f}' for name, n in found.items()]
    return f'{count} images: {"; ".join(lines)}'


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
    program = make_program(detector, args.postprocess)
    if args.format == 'onnx':
        program.output_proposals()
    dataset = read_data(detector, args) if args.coco_path or args.val_ann else None

    def save(partial: Path) -> None:
        export(program, draw_images(*sizes(detector)[0]), partial)
        if args.half:
            halve(partial)
        verify(detector, program, load(partial), args.half)
        if args.format == 'onnx':
            drop_proposals(partial)

    logging.getLogger('onnxscript').setLevel(logging.ERROR)  # else it names each operator that it keeps
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        save_atomically(path, save)
    if dataset is not None:
        runs = {'PyTorch': program.expected, 'exported': load(path)}
        print(average_precision(detector, program, runs, dataset, args.limit))
    return f'{path}: {path.stat().st_size / 1e6:.1f} MB'


if __name__ == '__main__':
    run_command(main, get_args_parser())
