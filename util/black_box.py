"""
A black box for steps whose gradient is not finite: such a step is left out, the first bad value is looked for, and the
batch is saved so that `tools/replay.py` can run it again.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from util.distributed.collectives import all_gather_object, get_rank, is_main_process
from util.errors import UserError
from util.files import save_checkpoint
from util.nested_tensor import NestedTensor
from util.seeding import get_rng_state, set_rng_state

NOT_FOUND = 'not found, since running the batch again gives finite values'
FILES_KEPT = 3  # saved by a run; each holds the weights
Batch = tuple[NestedTensor, list[dict[str, Tensor]]]
LossOf = Callable[[NestedTensor, list[dict[str, Tensor]]], tuple[Any, dict[str, Tensor], Tensor]]


@dataclass
class Diagnosis:
    """Where the first value that is not finite came up, and in which images.

    place: weights, input, output, loss or gradient, and of what. images: ids of images whose own values are bad; of all
    images of the batch if that cannot be told.
    """

    place: str = NOT_FOUND
    images: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        return f'{self.place}; images {", ".join(map(str, self.images[:8]))}{", ..." if len(self.images) > 8 else ""}'


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield floating-point tensors in nested outputs of modules."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, NestedTensor):
        yield from tensors_in(value.tensors)
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
    elif hasattr(value, '__dataclass_fields__'):
        yield from tensors_in(vars(value))


def bad_count(tensor: Tensor) -> int:
    return int((~tensor.detach().isfinite()).sum())


@contextmanager
def watching(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Note modules whose outputs are not finite, in order; then those whose gradient is not, in order of the backward."""
    handles: list[RemovableHandle] = []

    def watch(name: str) -> Callable:
        def check(module: nn.Module, inputs: object, outputs: object) -> None:
            for tensor in tensors_in(outputs):
                if number := bad_count(tensor):
                    found.append(
                        f'output of {name} ({type(module).__name__}), {number:,} of {tensor.numel():,} values'
                    )
                    return
                if tensor.requires_grad:
                    size = tensor.numel()

                    def check_gradient(gradient: Tensor, size: int = size) -> None:
                        if number := bad_count(gradient):
                            found.append(f'gradient at the output of {name}, {number:,} of {size:,} values')

                    tensor.register_hook(check_gradient)

        return check

    for name, module in model.named_modules():
        if name and not list(module.children()):
            handles.append(module.register_forward_hook(watch(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ids_of(targets: list[dict[str, Tensor]]) -> list[int]:
    return [int(target.get('image_id', index)) for index, target in enumerate(targets)]


def bad_images(outputs: Any, images: list[int]) -> list[int]:
    """Return ids of images whose own outputs are not finite; of all, if those of none are."""
    values = [outputs[name].flatten(1).isfinite().all(1) for name in ('pred_logits', 'pred_boxes')]
    good = torch.stack(values).all(0).tolist()
    return [image_id for image_id, is_good in zip(images, good, strict=True) if not is_good] or images


def diagnose(model: nn.Module, batches: list[Batch], loss_of: LossOf) -> Diagnosis:
    """Run batches forward and backward again, and find the first value that is not finite. All ranks must call it.

    The gradients of the model are lost.
    """
    ids = [ids_of(targets) for _, targets in batches]
    diagnosis = Diagnosis(images=[image_id for batch in ids for image_id in batch])
    causes = [  # in the order in which they act
        Diagnosis(f'{kind} {name}, {number:,} of {tensor.numel():,} values', diagnosis.images)
        for kind, tensors in (('weight', model.named_parameters()), ('buffer', model.named_buffers()))
        for name, tensor in tensors
        if tensor.is_floating_point() and (number := bad_count(tensor))
    ]
    for (samples, targets), images in zip(batches, ids, strict=True):
        bad = [image_id for image_id, x in zip(images, samples.tensors, strict=True) if bad_count(x.float())]
        if bad:
            causes.append(Diagnosis('the image itself', bad))
        found: list[str] = []
        model.zero_grad(set_to_none=True)
        with watching(model, found):
            outputs, losses, loss = loss_of(samples, targets)
            loss.backward()
        wrong = bad_images(outputs, images)
        forward = [text for text in found if text.startswith('output')]
        causes += [Diagnosis(text, wrong) for text in forward[:1]]
        causes += [
            Diagnosis(f'{name}, from finite outputs', wrong) for name, x in losses.items() if bad_count(x)
        ]
        causes += [Diagnosis(text, wrong) for text in found[len(forward) :][:1]]
        causes += [
            Diagnosis(f'gradient of {name}', wrong)
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and bad_count(parameter.grad)
        ]
    return causes[0] if causes else diagnosis


class BlackBox:
    """Watches over the steps of a run.

    folder: where to save batches; None saves nothing. limit: number of steps in a row that may be left out.
    """

    def __init__(self, folder: Path | None = None, limit: int = 3, flags: dict | None = None) -> None:
        self.folder, self.limit, self.flags = folder, limit, flags
        self.in_a_row = self.saved = 0
        self.model: nn.Module | None = None

    def before(self, model: nn.Module) -> None:
        """Remember random states, and statistics of batch norms, before a step."""
        if self.model is not model:  # a walk through all modules takes long
            self.model = model
            self.norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.rng = get_rng_state()
        norms = [norm for norm in self.norms if norm.training]
        self.statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]

    def after(
        self, finite: bool, model: nn.Module, batches: list[Batch], loss_of: LossOf, where: str
    ) -> None:
        """Look at a step that was left out because gradient or loss are not finite; all ranks must call this.

        Raises:
            UserError: these were too many in a row.
        """
        if finite:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        now = get_rng_state()
        self.put_back(self.rng)
        file = self.save(model, batches, where)
        diagnosis = diagnose(model, batches, loss_of)
        model.zero_grad(set_to_none=True)
        self.put_back(now)
        everyone = all_gather_object(diagnosis)
        known = [each for each in everyone if each.place != NOT_FOUND] or everyone[:1]
        text = '; '.join(dict.fromkeys(map(str, known)))
        if is_main_process():
            more = f'. Saved: python tools/replay.py {file} runs it again' if file else ''
            print(f'warning: {where} is left out, it is not finite: {text}{more}', flush=True)
        if self.in_a_row >= self.limit:
            raise UserError(
                f'{self.in_a_row} steps in a row are not finite ({text}), stopping training; the last checkpoint '
                'is untouched. A lower --lr or --clip_max_norm usually helps, or --amp bf16 in place of fp16'
            )

    @torch.no_grad()
    def put_back(self, rng: dict) -> None:
        """Put back random states, and the statistics of batch norms."""
        set_rng_state(rng)
        for buffer, value in self.statistics:
            buffer.copy_(value)

    def save(self, model: nn.Module, batches: list[Batch], where: str) -> Path | None:
        """Save batch, random states, flags and weights of this rank; return the file, or None if there is none."""
        if self.folder is None or self.flags is None or self.saved >= FILES_KEPT:
            return None
        self.saved += 1
        name = re.sub(r'\W+', '_', where)
        file = self.folder / 'black_box' / f'{name}_rank{get_rank()}.pth'
        plain = [
            {
                'tensors': samples.tensors.cpu(),
                'mask': samples.mask.cpu(),
                'targets': [{k: v.cpu() for k, v in t.items()} for t in targets],
            }
            for samples, targets in batches
        ]
        try:
            save_checkpoint(
                file,
                {
                    'model': model.state_dict(),
                    'args': self.flags,
                    'rng': self.rng,
                    'batches': plain,
                    'where': where,
                },
            )
        except OSError as error:  # the run goes on without the file
            print(f'warning: {error}', flush=True)
            return None
        return file
