"""
Feed damaged files to the readers of annotations and of weights, guided by coverage. Every file must be read,
or refused by a ValueError. Not a part of the test suite.

  pip install atheris
  python tests/fuzz.py annotations --minutes 10
  python tests/fuzz.py weights --minutes 10
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

with atheris.instrument_imports(include=['datasets', 'models.weights', 'util']):
    from datasets.annotations import AnnotationTable
    from datasets.coco_json import read_annotations
    from models.weights.read import extract_weights, read_checkpoint
    from models.weights.write import write_safetensors

IMAGES = [
    {'id': 1, 'file_name': 'a.jpg', 'height': 9, 'width': 8},
    {'id': '2', 'file_name': 'b.jpg'},
]
POLYGON = [[1, 2, 3, 4, 5, 6]]
COUNTS, COMPRESSED = {'size': [9, 8], 'counts': [30, 12, 30]}, {'size': [9, 8], 'counts': 'd02e0'}
BOX, EMPTY = [1, 2, 3.5, 4], [0, 0, 0, 0]
ANNOTATIONS = [
    {
        'id': 1,
        'image_id': 1,
        'category_id': 3,
        'bbox': BOX,
        'area': 14,
        'iscrowd': 0,
        'segmentation': POLYGON,
    },
    {'id': 2, 'image_id': '2', 'category_id': 3, 'segmentation': COUNTS},
    {'id': 3, 'image_id': 1, 'category_id': 3.0, 'bbox': EMPTY, 'iscrowd': 1, 'segmentation': COMPRESSED},
]
WEIGHTS = {'a.weight': torch.ones(2, 3), 'b': torch.zeros(4, dtype=torch.int64)}
SEEDS = {
    'annotations': {
        'images': IMAGES,
        'annotations': ANNOTATIONS,
        'categories': [{'id': 3, 'name': 'cat'}],
    },
    'weights': {'model': WEIGHTS, 'epoch': 3, 'args': {'lr': 1e-4}},
}


def read_annotation_file(path: Path) -> None:
    AnnotationTable(path, with_masks=True)
    read_annotations(path)


def read_weight_file(path: Path) -> None:
    extract_weights(read_checkpoint(path))


def seeds(kind: str, folder: Path) -> None:
    """Write whole files to begin with."""
    seed = SEEDS[kind]
    if kind == 'annotations':
        (folder / '0.json').write_text(json.dumps(seed))
        (folder / '0.indented.json').write_text(json.dumps(seed, indent=1))
    else:
        torch.save(seed, folder / '0.pth')
        torch.save(seed, folder / '0.old.pth', _use_new_zipfile_serialization=False)
        write_safetensors(folder / '0.safetensors', seed)


def checked(read: Callable[[Path], None], path: Path) -> Callable[[bytes], None]:
    def one(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(ValueError):
            read(path)

    return one


def main() -> None:
    parser = argparse.ArgumentParser('fuzz.py')
    parser.add_argument('kind', choices=SEEDS)
    parser.add_argument('--minutes', type=float, default=10)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix='fuzz'))
    (folder / 'corpus').mkdir()
    seeds(args.kind, folder / 'corpus')
    read = read_annotation_file if args.kind == 'annotations' else read_weight_file
    options = [
        f'-max_total_time={round(60 * args.minutes)}',
        '-max_len=4096',
        '-rss_limit_mb=6000',
        f'-artifact_prefix={folder}/',
    ]
    atheris.Setup([sys.argv[0], *options, str(folder / 'corpus')], checked(read, folder / 'file'))
    atheris.Fuzz()


if __name__ == '__main__':
    main()
