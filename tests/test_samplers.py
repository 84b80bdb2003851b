"""Which images a process sees: Deformable DETR's samplers, and files kept in memory."""

import json
from pathlib import Path

import PIL.Image
import pytest
import torch

from datasets.coco import CocoDetection
from datasets.samplers import ChunkSampler, NodeSampler
from tests.shared_data import needs_shared, read_shared

RECORDED = read_shared('parity/deformable_detr/samplers.json').get('cases', [])


@needs_shared
@pytest.mark.parametrize(
    'case', RECORDED, ids=lambda case: f'{case["dataset_length"]} on {case["world_size"]}'
)
def test_samplers_draw_the_official_indices(case: dict) -> None:
    data, world, local = range(case['dataset_length']), case['world_size'], case['local_size']
    for rank in range(world):
        chunk = ChunkSampler(data, world, rank, case['shuffle'])
        node = NodeSampler(data, world, rank, rank % local, local, case['shuffle'])
        for sampler, key in ((chunk, 'distributed'), (node, 'node_distributed')):
            sampler.set_epoch(case['epoch'])
            assert list(sampler) == case[key][rank]
            assert len(sampler) == case['num_samples']


def test_every_image_is_seen_once_or_twice() -> None:
    for length, world in ((11, 4), (8, 8), (5, 1)):
        parts = [list(ChunkSampler(range(length), world, rank, seed=3)) for rank in range(world)]
        seen = [index for part in parts for index in part]
        assert set(seen) == set(range(length)) and len(seen) - length < world


def test_kept_files_give_the_same_images(tmp_path: Path) -> None:
    images = []
    for index in range(3):
        pixels = torch.randint(0, 255, (8, 10, 3), dtype=torch.uint8).numpy()
        PIL.Image.fromarray(pixels).save(tmp_path / f'{index}.png')
        images.append({'id': index, 'file_name': f'{index}.png', 'height': 8, 'width': 10})
    file = tmp_path / 'data.json'
    data = {'images': images, 'annotations': [], 'categories': [{'id': 1, 'name': 'thing'}]}
    file.write_text(json.dumps(data))
    dataset = CocoDetection(tmp_path, file)
    expected = [dataset[index][0] for index in range(3)]
    dataset.keep_files(local_rank=0, local_size=2)
    for index in (0, 2):  # this process's share needs no disk any more
        (tmp_path / f'{index}.png').unlink()
    for index, image in enumerate(expected):
        assert torch.equal(dataset[index][0], image)
