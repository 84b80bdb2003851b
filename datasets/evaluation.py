"""
Metrics of the detections of a dataset: a metric is a subclass of `Evaluator`, and an entry in
`datasets.build.EVALUATORS`.

Its numbers have names, under which they reach metrics.csv and log.jsonl (as `test_NAME`), the trackers, the
curves and tools/compare_runs.py. --patience and checkpoint_best.pth depend on its main number.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from datasets.class_map import ClassMap
from datasets.image_dataset import ImageDataset
from util.distributed.collectives import broadcast_object, fail_together, gather_object, is_main_process


@dataclass
class Evaluation:
    """Result of an evaluation.

    numbers: by name. shown: names of those in the line of an epoch. drawn: names of those in the curves.
    text: tables to print. record: further values, which log.jsonl and eval.json keep.
    """

    numbers: dict[str, float]
    shown: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()
    text: str = ''
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, float]:
        """Return the numbers under their names in log files."""
        return {f'test_{name}': value for name, value in self.numbers.items()}

    @property
    def line(self) -> str:
        """Return the most important numbers in one line."""
        return ''.join(f'  {name} {self.numbers[name]:.3f}' for name in self.shown or self.numbers)


class Evaluator(ABC):
    """Evaluator that collects detections, and evaluates all of them at once, on the main process.

    Only images that were passed to `update` are evaluated, each once. Batches, their order and the number of
    processes do not matter. A subclass computes the numbers; labels are class indices, which its class map
    turns into category ids.

    Args:
        ground_truth: annotations in COCO's form (`ImageDataset.ground_truth`).
        kinds: what is evaluated, of 'bbox' and 'segm'.
    """

    main = 'AP'  # name of the main number; a larger one is better

    def __init__(self, ground_truth: dict, class_map: ClassMap, kinds: tuple[str, ...] = ('bbox',)) -> None:
        self.ground_truth, self.class_map, self.kinds = ground_truth, class_map, tuple(kinds)
        self.image_ids = {image['id'] for image in ground_truth['images']}
        self.detections: dict[int, Any] = {}

    @classmethod
    def build(cls, dataset: ImageDataset, kinds: tuple[str, ...]) -> 'Evaluator':
        """Build the evaluator of a dataset."""
        return cls(dataset.ground_truth, dataset.class_map, kinds)

    def update(self, predictions: dict[int, dict]) -> None:
        """Add predictions. Only the first prediction for an image counts.

        predictions: image id to {'scores' [N], 'labels' [N], 'boxes' [N, 4] xyxy in pixels}, or to {} for no
            detection. For masks it also holds 'masks' [N, 1, H, W] (above 0.5 is object) or 'segmentation', a
            list of N run-length masks.
        """
        for image_id, prediction in predictions.items():
            image_id = int(image_id)
            if image_id not in self.image_ids:
                raise ValueError(
                    f'image {image_id} is not among the {len(self.image_ids)} of the ground truth'
                )
            if image_id not in self.detections:
                self.detections[image_id] = self.read(prediction)

    def read(self, prediction: dict) -> Any:
        """Return what `compute` needs of an image's prediction."""
        return prediction

    def synchronize(self) -> None:
        """Gather detections on the main process. If several ranks have an image, the lowest rank's count."""
        merged: dict[int, Any] = {}
        for detections in gather_object(self.detections):
            merged = {**detections, **merged}
        self.detections = merged

    def summarize(self) -> Evaluation:
        """Evaluate the detections on the main process; all ranks must call it, and get the result."""
        with fail_together():
            result = self.compute() if is_main_process() else None
        return broadcast_object(result)

    @abstractmethod
    def compute(self) -> Evaluation:
        """Return the result for `detections`, which `read` made, by image id."""
