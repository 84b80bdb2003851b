"""Detections as files: COCO's result form, CSV, and YOLO's text."""

import csv
import io
import json
from collections.abc import Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

from torch import Tensor

from datasets.class_map import ClassMap
from util.files import GrowingFile, save_atomically

# Of predictions.csv, before the four columns of the box.
COLUMNS = ('image_id', 'file_name', 'frame', 'category_id', 'category_name', 'score')


def select(result: dict, threshold: float | Tensor) -> dict:
    """Keep detections from a score on. threshold: one for all, or one for each class [K]."""
    keep = result['scores'] >= (threshold[result['labels']] if isinstance(threshold, Tensor) else threshold)
    return {
        key: value[keep] if isinstance(value, Tensor) else list(compress(value, keep.tolist()))
        for key, value in result.items()
    }


def coco_results(name: str, image_id: int | str, result: dict, class_map: ClassMap) -> list[dict]:
    """Return detections in COCO's result form.

    result: `scores`, `labels` [N], `boxes` [N, 4] xyxy in pixels, and perhaps `segmentation`, N run lengths.
    """
    columns = [result[key].tolist() for key in ('scores', 'labels', 'boxes')]
    masks = result.get('segmentation', [None] * len(columns[0]))
    return [
        {
            'image_id': image_id,
            'file_name': name,
            'category_id': class_map.category_ids[label],
            'category_name': class_map.names[label],
            'bbox': [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
            'score': round(score, 5),
            **({'segmentation': mask} if mask else {}),
        }
        for score, label, (x0, y0, x1, y1), mask in zip(*columns, masks, strict=True)
        if class_map.names[label] is not None
    ]


class ResultFiles:
    """Rows of detections in the chosen formats. Each is written at once, so a killed program loses none."""

    def __init__(self, folder: Path, formats: Sequence[str], class_map: ClassMap) -> None:
        self.folder, self.formats, self.class_map, self.number = folder, formats, class_map, 0
        self.json = GrowingFile(folder / 'predictions.json', '[', ', ', ']')
        self.csv = GrowingFile(folder / 'predictions.csv', csv_line([*COLUMNS, 'x', 'y', 'width', 'height']))

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Add detections in COCO's result form; those of a video have their `frame`."""
        if 'json' in self.formats:
            self.json.add([json.dumps(row) for row in rows])
        if 'csv' in self.formats:
            self.csv.add([csv_line([*(row.get(key, '') for key in COLUMNS), *row['bbox']]) for row in rows])
        self.number += len(rows)

    def add_image(self, rows: list[dict], stem: str, size: tuple[int, int]) -> None:
        """Add all detections of an image. stem: name of its label file. size: (height, width)."""
        self.add(rows)
        if 'yolo' not in self.formats:
            return
        (height, width), text = size, ''
        for row in rows:
            x, y, w, h = row['bbox']
            box = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
            values = ' '.join(f'{value:.6g}' for value in (*box, row['score']))
            text += f'{self.class_map.label_of[row["category_id"]]} {values}\n'
        save_atomically(self.folder / 'labels' / f'{stem}.txt', partial(Path.write_text, data=text))

    def finish(self) -> None:
        """Give the files their names, in place of earlier ones."""
        for file in (self.json, self.csv):
            file.finish()


def csv_line(values: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerow(values)
    return text.getvalue()
