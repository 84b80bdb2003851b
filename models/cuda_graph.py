"""Inference as one recorded CUDA graph, which starts a detector's thousand small kernels at once."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from util.nested_tensor import NestedTensor


class GraphedDetector:
    """Evaluation of batches of one padded size, recorded once and replayed.

    samples: any batch of that size, on the GPU; padding may differ from batch to batch. context: context of
    the forward pass, such as `Precision.autocast`. Weights may change in place, but may not be replaced.
    Auxiliary heads alone (`--eval_module`) wait for the GPU and cannot be recorded.

    Raises:
        ValueError: the model is in training mode, or not on a GPU.
    """

    warm_up = 3  # runs before the recording, in which kernels are chosen and compiled

    def __init__(
        self,
        model: nn.Module,
        samples: NestedTensor,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        if model.training or not samples.tensors.is_cuda:
            raise ValueError('a CUDA graph records an evaluation on a GPU: call model.eval() and .to("cuda")')
        self.samples = NestedTensor(samples.tensors.clone(), samples.mask.clone())
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(self.warm_up):
                with context():
                    model(self.samples)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad(), torch.cuda.graph(self.graph, capture_error_mode='thread_local'), context():
            self.outputs = model(self.samples)

    def __call__(self, samples: NestedTensor) -> dict[str, Tensor]:
        """Return the model's outputs on the GPU, without waiting for them.

        Raises:
            ValueError: the batch has another size or type.
        """
        recorded, new = self.samples.tensors, samples.tensors
        if new.shape != recorded.shape or new.dtype != recorded.dtype:
            raise ValueError(
                f'this graph is for batches of {tuple(recorded.shape)} {recorded.dtype}, not '
                f'{tuple(new.shape)} {new.dtype}: pad to that size, or record another graph'
            )
        recorded.copy_(new, non_blocking=True)
        self.samples.mask.copy_(samples.mask, non_blocking=True)
        self.graph.replay()
        return {name: value.clone() for name, value in self.outputs.items()}
