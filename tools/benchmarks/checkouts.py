"""
Comparison of this checkout with another one of this repository (`--against DIR`).

Each checkout runs the same case, with the same weights and inputs, in its own process and on its own modules.
Both must agree in their results; then their rounds alternate. This file is also the program of these
processes. It imports from a checkout only what all versions have: `models.build_model` and the operator.
"""

import contextlib
import dataclasses
import math
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-3  # largest difference of results, as a share of the largest number
ROUND = (
    300  # milliseconds of a round at least, so that what other processes leave in the caches counts little
)
FLUSHED_BYTES = 2**29  # more than any cache holds; writing them takes 0.1 to 0.2 ms

Call = Callable[[], tuple[Tensor, ...]]


def operator_case(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor, grad: Tensor) -> Call:
    """Return the forward and backward pass of deformable attention; shapes: heights and widths in turn."""
    import models.ops.functions  # noqa: F401

    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]

    def call() -> tuple[Tensor, ...]:
        output = torch.ops.detr.ms_deform_attn(value, shapes, locations, weights)
        return output.detach(), *torch.autograd.grad(output, leaves, grad)

    return call


def detector_case(task: str, flags: dict, weights: dict | None, images: Tensor, targets: list[dict]) -> Call:
    """Return inference (`model`), a training step without optimizer (`train`) or its losses (`criterion`).

    Args:
        flags: flags of the model; they turn dropout off.
        weights: state dict; None: the random weights of this checkout.
        images: [B, 3, H, W], on the device of the case.
    """
    from models import build_model

    torch.manual_seed(0)
    model, criterion, _ = build_model(Namespace(**flags))
    if weights is not None:
        model.load_state_dict(weights)
    model.to(images.device).train(task != 'model')

    @torch.no_grad()
    def infer() -> tuple[Tensor, ...]:
        outputs = model(images)
        return outputs['pred_logits'], outputs['pred_boxes']

    def total_loss(outputs: dict) -> Tensor:
        losses = criterion(outputs, targets)
        return sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses)

    def step() -> tuple[Tensor, ...]:
        torch.manual_seed(0)  # queries may be drawn at random
        loss = total_loss(model(images, targets))
        loss.backward()
        model.zero_grad(set_to_none=True)
        return (loss.detach(),)

    if task in ('model', 'train'):
        return infer if task == 'model' else step
    with torch.no_grad():
        outputs = model(images, targets)
    leaves: list[Tensor] = []
    outputs = as_leaves(outputs, leaves)

    def losses() -> tuple[Tensor, ...]:
        loss = total_loss(outputs)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        norm = sum(gradient.square().sum() for gradient in gradients if gradient is not None)
        return loss.detach(), norm

    return losses


def loading_case(paths: list[str], part: str, seed: int) -> Call:
    """Return the loading of image files to the network's input; it is uint8, the model normalizes it.

    part: 'train' or 'val'. Each image has seven boxes, the average of COCO.
    """
    from datasets import image_io
    from datasets.augmentations import DETRAugmentation
    from util.seeding import local_seed

    read = image_io.ImageReader().read if hasattr(image_io, 'ImageReader') else image_io.read_image
    transforms = DETRAugmentation().transforms(part)

    def load(path: str) -> Tensor:
        image = read(path)
        height, width = image.shape[-2:]
        corners = torch.rand(7, 2, 2, generator=torch.Generator().manual_seed(0)).sort(dim=1).values
        target = {
            'boxes': (corners * torch.tensor([width, height])).flatten(1),
            'labels': torch.arange(7),
            'area': torch.ones(7),
            'iscrowd': torch.zeros(7, dtype=torch.int64),
            'size': torch.tensor([height, width]),
        }
        with local_seed(seed, 0):
            return transforms(image, target)[0]

    return lambda: tuple(map(load, paths))


def as_leaves(outputs: Any, leaves: list[Tensor]) -> Any:
    """Copy nested outputs with tensors that ask for gradients; also append these to `leaves`."""
    if isinstance(outputs, Tensor):
        if not outputs.is_floating_point():
            return outputs
        leaves.append(outputs.detach().clone().requires_grad_())
        return leaves[-1]
    if isinstance(outputs, dict):
        return {name: as_leaves(value, leaves) for name, value in outputs.items()}
    if isinstance(outputs, list):
        return [as_leaves(value, leaves) for value in outputs]
    if dataclasses.is_dataclass(outputs):
        return dataclasses.replace(outputs, **as_leaves(dict(vars(outputs)), leaves))
    return outputs


def build_case(inputs: dict) -> Call:
    if 'paths' in inputs:
        return loading_case(**inputs)
    return operator_case(**inputs) if 'value' in inputs else detector_case(**inputs)


def time_once(call: Callable[[], object], device: str) -> float:
    """Return the milliseconds of one call; on a GPU by events, with empty caches.

    While the caches are emptied, the host gets ahead. A single kernel is thus timed without its launch, and a
    step of many kernels with all its waits for the host.
    """
    if device != 'cuda':
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    flushed().zero_()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


@cache
def flushed() -> Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device='cuda')


class Worker:
    """A case in a process on the modules of a checkout.

    Attributes:
        kernels: description of the operator's implementation.
        results: arrays that the case has computed.

    Raises:
        UserError: the process has ended; it has printed the reason.
    """

    def __init__(self, checkout: Path, inputs: Path, args: Namespace) -> None:
        self.checkout = checkout
        self.connection, end = Pipe()
        words = map(str, (checkout, inputs, args.device, args.threads, end.fileno()))
        command = [sys.executable, __file__, *words]
        self.process = subprocess.Popen(command, cwd=checkout, pass_fds=[end.fileno()])
        end.close()
        self.kernels, self.results = self.ask()

    def ask(self) -> Any:
        """Ask for the next message: kernels and results, then the median milliseconds of a round."""
        from util.errors import UserError

        try:
            self.connection.send(None)
            return self.connection.recv()
        except (EOFError, OSError):
            raise UserError(
                f'{self.checkout} does not run this benchmark, its error is above: name a checkout of this '
                'repository that has these flags'
            ) from None

    def __enter__(self) -> 'Worker':
        return self

    def __exit__(self, *exception: object) -> None:
        self.connection.close()
        self.process.wait()


def check_results(name: str, results: list[np.ndarray], others: list[np.ndarray]) -> None:
    """Raise a ValueError if the results of two checkouts differ."""
    for number, (result, other) in enumerate(zip(results, others, strict=True)):
        difference = abs(result - other).max() / abs(other).max()
        if not difference <= TOLERANCE:
            raise ValueError(
                f'{name}: result {number} of the checkouts differs by {difference:.1e} of its largest'
            )


def main() -> None:
    """Build a case on the modules of a checkout, and answer each message (see `Worker.ask`)."""
    checkout, inputs, device, threads, end = sys.argv[1:]
    sys.path[0] = checkout
    torch.set_num_threads(int(threads))
    call = build_case(torch.load(inputs, weights_only=True, map_location=device))
    from models.ops.functions import describe

    connection = Connection(int(end))
    with contextlib.suppress(EOFError):
        connection.recv()
        connection.send((describe(device), [result.cpu().numpy() for result in call()]))
        repeats = math.ceil(ROUND / time_once(call, device))
        while True:
            connection.recv()
            connection.send(statistics.median(time_once(call, device) for _ in range(repeats)))


if __name__ == '__main__':
    main()
