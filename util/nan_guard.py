"""
A guard against steps whose loss or gradient is not finite. Such a step is skipped, the first value that is
not finite is reported, and the batch is saved, so that `tools/replay.py` can run it again.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from util.distributed.collectives import all_gather_object, get_rank, is_main_process
from util.errors import UserError
from util.files import save_checkpoint
from util.nested_tensor import NestedTensor
from util.seeding import get_rng_state, set_rng_state

NOT_FOUND = 'not found, since running the batch again gives finite values'
MAX_FILES = 3  # of a run; each holds the weights
Batch = tuple[NestedTensor, list[dict[str, Tensor]]]
LossOf = Callable[[NestedTensor, list[dict[str, Tensor]]], tuple[Any, dict[str, Tensor], Tensor]]


@dataclass
class Diagnosis:
    """Where the first value that is not finite appears, and in which images.

    place: weight, image, output, loss or gradient, with its name. images: ids of the images with such values;
    of all images of the batch if these are not known.
    """

    place: str = NOT_FOUND
    images: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        images = [*map(str, self.images[:8]), *(['...'] if len(self.images) > 8 else [])]
        return f'{self.place}; images {", ".join(images)}'


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield floating-point tensors in nested outputs of modules."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for element in value:
            yield from tensors_in(element)
    elif is_dataclass(value):
        yield from tensors_in(vars(value))


def count_bad(tensor: Tensor) -> int:
    return int((~tensor.detach().isfinite()).sum())


@contextmanager
def watch(model: nn.Module, outputs: list[str], gradients: list[str]) -> Iterator[None]:
    """Append descriptions of values that are not finite to two lists.

    outputs: of modules, in the order of the forward pass. gradients: at finite outputs, in the order of the
    backward pass.
    """

    def check_gradient(name: str, gradient: Tensor) -> None:
        if number := count_bad(gradient):
            gradients.append(f'gradient at the output of {name}, {number:,} of {gradient.numel():,} values')

    def check_output(name: str, module: nn.Module, inputs: object, output: object) -> None:
        for tensor in tensors_in(output):
            if number := count_bad(tensor):
                text = f'output of {name} ({type(module).__name__}), {number:,} of {tensor.numel():,} values'
                outputs.append(text)
                return
            if tensor.requires_grad:
                tensor.register_hook(partial(check_gradient, name))

    leaves = [
        (name, module) for name, module in model.named_modules() if name and not list(module.children())
    ]
    handles = [module.register_forward_hook(partial(check_output, name)) for name, module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def image_ids(targets: list[dict[str, Tensor]]) -> list[int]:
    return [int(target.get('image_id', index)) for index, target in enumerate(targets)]


def bad_images(outputs: Any, images: list[int]) -> list[int]:
    """Return the ids of images whose predictions are not finite; all ids if there are no such images."""
    finite = [outputs[name].flatten(1).isfinite().all(1) for name in ('pred_logits', 'pred_boxes')]
    good = torch.stack(finite).all(0).tolist()
    return [image_id for image_id, is_good in zip(images, good, strict=True) if not is_good] or images


def diagnose(model: nn.Module, batches: list[Batch], loss_of: LossOf) -> Diagnosis:
    """Run batches again, and find the first value that is not finite. All ranks must call it.

    The gradients of the model are lost.
    """
    ids = [image_ids(targets) for _, targets in batches]
    all_images = [image_id for batch in ids for image_id in batch]
    causes = [  # in the order in which they act
        Diagnosis(f'{kind} {name}, {number:,} of {tensor.numel():,} values', all_images)
        for kind, tensors in (('weight', model.named_parameters()), ('buffer', model.named_buffers()))
        for name, tensor in tensors
        if tensor.is_floating_point() and (number := count_bad(tensor))
    ]
    for (samples, targets), images in zip(batches, ids, strict=True):
        values = zip(images, samples.tensors, strict=True)
        if bad_inputs := [image_id for image_id, image in values if count_bad(image.float())]:
            causes.append(Diagnosis('the image itself', bad_inputs))
        bad_outputs: list[str] = []
        bad_gradients: list[str] = []
        model.zero_grad(set_to_none=True)
        with watch(model, bad_outputs, bad_gradients):
            outputs, losses, loss = loss_of(samples, targets)
            loss.backward()
        places = bad_outputs[:1]
        places += [f'{name}, from finite outputs' for name, value in losses.items() if count_bad(value)]
        places += bad_gradients[:1]
        places += [
            f'gradient of {name}'
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and count_bad(parameter.grad)
        ]
        images = bad_images(outputs, images)
        causes += [Diagnosis(place, images) for place in places]
    return causes[0] if causes else Diagnosis(images=all_images)


class NonFiniteGuard:
    """Guard of the steps of a run.

    folder: where batches are saved; None saves nothing. limit: number of steps in a row that may be skipped.
    flags: settled flags of the run, which are saved with a batch.
    """

    def __init__(self, folder: Path | None = None, limit: int = 3, flags: dict | None = None) -> None:
        self.folder, self.limit, self.flags = folder, limit, flags
        self.skipped = self.num_files = 0  # steps in a row, files
        self.model: nn.Module | None = None

    def before_step(self, model: nn.Module) -> None:
        """Copy random states, and statistics of batch norms, before a step."""
        if self.model is not model:  # a walk through all modules takes long
            self.model = model
            self.norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.rng = get_rng_state()
        norms = [norm for norm in self.norms if norm.training]
        self.statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]

    def after_step(
        self, finite: bool, model: nn.Module, batches: list[Batch], loss_of: LossOf, title: str
    ) -> None:
        """Report a step that was skipped since it is not finite. All ranks must call this.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        if finite:
            self.skipped = 0
            return
        self.skipped += 1
        rng = get_rng_state()
        self.restore(self.rng)
        file = self.save(model, batches, title)
        diagnosis = diagnose(model, batches, loss_of)
        model.zero_grad(set_to_none=True)
        self.restore(rng)
        diagnoses = all_gather_object(diagnosis)
        known = [each for each in diagnoses if each.place != NOT_FOUND] or diagnoses[:1]
        text = '; '.join(dict.fromkeys(map(str, known)))
        if is_main_process():
            remedy = f'. Saved: python tools/replay.py {file} runs it again' if file else ''
            print(f'warning: {title} is left out, it is not finite: {text}{remedy}', flush=True)
        if self.skipped >= self.limit:
            raise UserError(
                f'{self.skipped} steps in a row are not finite ({text}), stopping training; the last '
                'checkpoint is untouched. A lower --lr or --clip_max_norm usually helps, or --amp bf16 in '
                'place of fp16'
            )

    @torch.no_grad()
    def restore(self, rng: dict) -> None:
        """Restore random states, and the statistics of batch norms."""
        set_rng_state(rng)
        for buffer, value in self.statistics:
            buffer.copy_(value)

    def save(self, model: nn.Module, batches: list[Batch], title: str) -> Path | None:
        """Save batch, random states, flags and weights of this rank; return the file, or None."""
        if self.folder is None or self.flags is None or self.num_files >= MAX_FILES:
            return None
        self.num_files += 1
        name = re.sub(r'\W+', '_', title)
        file = self.folder / 'black_box' / f'{name}_rank{get_rank()}.pth'
        content = {
            'model': model.state_dict(),
            'args': self.flags,
            'rng': self.rng,
            'batches': [
                {
                    'tensors': samples.tensors.cpu(),
                    'mask': samples.mask.cpu(),
                    'targets': [{name: value.cpu() for name, value in target.items()} for target in targets],
                }
                for samples, targets in batches
            ],
            'where': title,
        }
        try:
            save_checkpoint(file, content)
        except OSError as error:  # the run goes on without the file
            print(f'warning: {error}', flush=True)
            return None
        return file
