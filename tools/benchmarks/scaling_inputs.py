"""What `tools/benchmark.py scaling` measures on this machine: the loader, checkpoints, states of random numbers."""

import copy
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import main
from datasets import build_dataset
from datasets.coco_eval import Detections
from engine import build_optimizer
from models import build_model
from models.training.flags import resolve_all
from tools.benchmarks.data import draw_images, make_target
from tools.benchmarks.train import TRICKS
from util.checkpoint import get_rng_state, read_checkpoint, save_checkpoint
from util.nested_tensor import collate_fn

CO_DINO = {'dino': True, 'num_feature_levels': 5, 'dn_number': 100, 'co_aux_heads': ['faster_rcnn', 'atss']}
MODELS = {
    'detr': {},
    'deformable': {'with_box_refine': True, 'two_stage': True},
    'h_detr': TRICKS | {'hybrid_queries': 1500, 'hybrid_k': 6, 'dropout': 0.0, 'dim_feedforward': 2048},
    'co_dino': CO_DINO,
    'co_dino_swin_l': CO_DINO | {'backbone': 'swin_large_window12', 'drop_path_rate': 0.3},
}


@dataclass(frozen=True)
class ModelFigures:
    """Bytes of tensors, of the file and of pieces of it, as saved; seconds of one build, saving and reading.

    optimizer: AdamW's two moments. averaged: a second copy of the weights (EMA). save: as main.py does it; durable:
    until the bytes are on the disk. read: the file was just written, so it comes from memory.
    """

    parameters: int
    gradients: int
    buffers: int
    optimizer: int
    averaged: int
    file: int
    build: float
    save: float
    durable: float
    read: float

    @property
    def state(self) -> int:
        """What a GPU holds besides activations where nothing is sharded."""
        return self.parameters + self.gradients + self.buffers + self.optimizer + self.averaged


@dataclass(frozen=True)
class LoaderFigures:
    """rate: images a second of processor time of one core, from the file to the padded uint8 batch. stored, sent,
    annotated: bytes an image of the file, of the batch with its mask, and of the annotation file. sizes: [N, 2]
    heights and widths after augmentation.
    """

    name: str
    rate: float
    stored: float
    sent: float
    annotated: float
    sizes: Tensor


def measure_model(flags: dict, folder: str | None) -> ModelFigures:
    """Builds a model on the CPU, gives its optimizer a state, and saves what main.save does and an average."""
    start = time.perf_counter()
    args = resolve_all(Namespace(**{'backbone_weights': 'none'} | flags))
    model = build_model(args)[0]
    build = time.perf_counter() - start
    optimizer = build_optimizer(model, 0.0, 0.0, 0.0)
    trained = [p for group in optimizer.param_groups for p in group['params']]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # moments exist from the first step on
    optimizer.zero_grad(set_to_none=True)
    state = model.state_dict()
    checkpoint = {
        'model': state,
        'optimizer': optimizer.state_dict(),
        'ema': copy.deepcopy(state),
        'args': vars(args),
        'rng': [get_rng_state()],
    }
    file, save, durable, read = time_saving(checkpoint, folder)
    moments = [x for entry in optimizer.state.values() for x in entry.values() if isinstance(x, Tensor)]
    return ModelFigures(
        parameters=total_bytes(model.parameters()),
        gradients=total_bytes(trained),
        buffers=total_bytes(model.buffers()),
        optimizer=total_bytes(moments),
        averaged=total_bytes(checkpoint['ema'].values()),
        file=file,
        build=build,
        save=save,
        durable=durable,
        read=read,
    )


def time_saving(checkpoint: dict, folder: str | None) -> tuple[int, float, float, float]:
    """Bytes of the file; seconds of saving, of saving until it is on the disk, and of reading."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / 'checkpoint.pth'
        start = time.perf_counter()
        save_checkpoint(path, checkpoint)
        save = time.perf_counter() - start
        with path.open('rb') as file:
            os.fsync(file.fileno())
        durable = time.perf_counter() - start
        start = time.perf_counter()
        read_checkpoint(path)
        return path.stat().st_size, save, durable, time.perf_counter() - start


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Each storage once: heads may be shared between layers."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def measure_loader(coco_path: str | None, num_images: int, rounds: int, batch_size: int) -> LoaderFigures:
    """The project's training images, without workers on one thread; every round draws its own augmentation.

    coco_path: None = images are drawn first.
    """
    with tempfile.TemporaryDirectory() as folder:
        if coco_path is None:
            draw_coco(Path(folder), num_images)
        flags = ['--coco_path', coco_path or folder]
        dataset = build_dataset('train', resolve_all(main.get_args_parser().parse_args(flags)))
        chosen = Subset(dataset, range(min(num_images, len(dataset))))
        loader = DataLoader(chosen, batch_size, collate_fn=collate_fn)
        seconds, sent, sizes = [], 0, []
        for epoch in range(rounds + 1):
            dataset.set_epoch(epoch)
            start = time.process_time()
            batches = list(loader)
            seconds.append(time.process_time() - start)
            sent += sum(samples.tensors.nbytes + samples.mask.nbytes for samples, _ in batches)
            sizes += [target['size'] for _, targets in batches for target in targets]
        kept = [image['file_name'] for image in dataset.ground_truth['images']]
        return LoaderFigures(
            name='drawn images' if coco_path is None else 'images of --coco_path',
            rate=len(chosen) / statistics.median(seconds[1:]),
            stored=statistics.mean((dataset.image_dir / name).stat().st_size for name in kept),
            sent=sent / len(sizes),
            annotated=dataset.annotation_file.stat().st_size / len(kept),
            sizes=torch.stack(sizes),
        )


def draw_coco(folder: Path, num_images: int) -> None:
    """A data set of drawn JPEGs in COCO's layout."""
    (folder / 'train2017').mkdir()
    (folder / 'annotations').mkdir()
    paths = draw_images(folder / 'train2017', Namespace(seed=0, num_images=num_images))
    images, annotations = [], []
    for idx, path in enumerate(paths):
        target = make_target(path)
        height, width = target['size'].tolist()
        images.append({'id': idx, 'file_name': path.name, 'height': height, 'width': width})
        for x, y, right, bottom in target['boxes'].tolist():
            box = [x, y, right - x, bottom - y]
            annotations.append({'id': len(annotations), 'image_id': idx, 'category_id': 1, 'bbox': box})
            annotations[-1] |= {'area': box[2] * box[3], 'iscrowd': 0}
    categories = [{'id': 1, 'name': 'shape'}]
    data = {'images': images, 'annotations': annotations, 'categories': categories}
    (folder / 'annotations/instances_train2017.json').write_text(json.dumps(data))


def random_state_bytes(ranks: int = 32) -> float:
    """What one process adds to a checkpoint: the states of its random number generators (on a GPU 16 bytes more)."""
    sizes = []
    for count in (1, 1 + ranks):
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / 'checkpoint.pth'
            save_checkpoint(path, {'rng': [get_rng_state() for _ in range(count)]})
            sizes.append(path.stat().st_size)
    return (sizes[1] - sizes[0]) / ranks


def detection_bytes(detections: int, images: int = 64) -> float:
    """What an image adds to the message that every process sends to all others after an evaluation."""
    found = {index: Detections(np.random.rand(detections, 6)) for index in range(images)}
    return len(pickle.dumps(found)) / images


def import_seconds() -> float:
    """A new Python process until main.py's modules are there; from this machine's disk, or memory."""
    start = time.perf_counter()
    subprocess.run([sys.executable, '-c', 'import main'], cwd=Path(main.__file__).parent, check=True)
    return time.perf_counter() - start


def index_bytes(images: int) -> int:
    """The shuffled order of a sampler: a list of Python integers, in every process."""
    return images * (sys.getsizeof(images) + np.dtype(np.intp).itemsize)
