"""Photographs that EXIF data turn, annotated as they are shown and as they are stored: boxes, masks, metrics and
drawings lie on the objects in every format.
"""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from torch import Tensor

from datasets.build import data_settings
from datasets.class_map import ClassMap
from datasets.coco_eval import CocoEvaluator
from datasets.image_dataset import ImageDataset
from datasets.image_io import ImageReader, read_header, turned, turned_boxes
from datasets.loaders import build_datasets
from datasets.readers import build_reader
from datasets.results import ResultFiles
from datasets.survey import settle_reading
from engine import sample_detections
from models.detector import load_detector
from tests.runs import TINY, load, run
from tools import make_shards, predict
from util.command_line import run_command
from util.config.recorded import data_of, training_flags
from util.config.settle import DATA, RUN, settle
from util.errors import UserError

COLOURS = np.array([(40, 40, 40), (250, 30, 30), (30, 30, 250)], dtype=np.uint8)  # ground, one, two
CLASSES = ('one', 'two')
INVERSE = (1, 2, 3, 4, 5, 8, 7, 6)
WAYS = ('shown', 'stored')
KINDS = ('coco', 'voc', 'yolo', 'shards')


def picture(height: int = 48, width: int = 72) -> np.ndarray:
    """Class numbers [height, width]: two rectangles, which no turn maps to each other."""
    labels = np.zeros((height, width), dtype=np.uint8)
    labels[6:18, 10:34] = 1
    labels[20:41, 38:45] = 2
    return labels


def turned_by_pillow(labels: np.ndarray, orientation: int) -> np.ndarray:
    image = PIL.Image.fromarray(labels)
    image.getexif()[PIL.ExifTags.Base.Orientation] = orientation
    return np.array(PIL.ImageOps.exif_transpose(image))


def save_photograph(path: Path, stored: np.ndarray, orientation: int, **options: object) -> None:
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = orientation
    PIL.Image.fromarray(COLOURS[stored]).save(path, exif=exif, **options)


def boxes_in(labels: np.ndarray) -> list[list[int]]:
    """x, y, width and height of both rectangles."""
    boxes = []
    for label in (1, 2):
        rows, columns = np.nonzero(labels == label)
        low, high = (columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)
        boxes.append([int(value) for value in (*low, high[0] - low[0], high[1] - low[1])])
    return boxes


def write_photographs(root: Path, way: str, sizes: tuple[tuple[int, int], ...] = ((48, 72),)) -> dict:
    """A photograph of each orientation and size that is shown as `picture`, and its annotations in COCO form."""
    data: dict = {'images': [], 'annotations': [], 'categories': []}
    data['categories'] = [{'id': number, 'name': name} for number, name in enumerate(CLASSES, start=1)]
    (root / 'images/train').mkdir(parents=True)
    for number, (size, orientation) in enumerate(((s, o) for s in sizes for o in range(1, 9)), start=1):
        stored = turned_by_pillow(picture(*size), INVERSE[orientation - 1])
        save_photograph(root / f'images/train/{number:02d}.png', stored, orientation)
        meant = picture(*size) if way == 'shown' else stored
        height, width = meant.shape
        image = {'id': number, 'file_name': f'{number:02d}.png', 'height': height, 'width': width}
        data['images'].append(image)
        for label, (x, y, w, h) in enumerate(boxes_in(meant), start=1):
            data['annotations'].append(
                {
                    'id': len(data['annotations']) + 1,
                    'image_id': number,
                    'category_id': label,
                    'bbox': [x, y, w, h],
                    'area': w * h,
                    'iscrowd': 0,
                    'segmentation': [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    return data


def objects_of(data: dict, image: dict) -> list[tuple[str, list[int]]]:
    rows = [row for row in data['annotations'] if row['image_id'] == image['id']]
    return [(CLASSES[row['category_id'] - 1], row['bbox']) for row in rows]


def write_coco(root: Path, data: dict, way: str) -> list[str]:
    (root / 'train.json').write_text(json.dumps(data))
    places = {'images': root / 'images/train', 'ann': root / 'train.json'}
    return [f'--{part}_{kind}={path}' for part in ('train', 'val') for kind, path in places.items()]


def write_voc(root: Path, data: dict, way: str) -> list[str]:
    for folder in ('Annotations', 'ImageSets/Main'):
        (root / folder).mkdir(parents=True)
    (root / 'JPEGImages').symlink_to(root / 'images/train')
    for image in data['images']:
        objects = ''
        for name, (x, y, w, h) in objects_of(data, image):
            corners = zip(('xmin', 'ymin', 'xmax', 'ymax'), (x + 1, y + 1, x + w, y + h), strict=True)
            box = ''.join(f'<{key}>{value}</{key}>' for key, value in corners)
            objects += f'<object><name>{name}</name><bndbox>{box}</bndbox></object>'
        size = f'<size><width>{image["width"]}</width><height>{image["height"]}</height></size>'
        text = f'<annotation><filename>{image["file_name"]}</filename>{size}{objects}</annotation>'
        (root / f'Annotations/{image["id"]:02d}.xml').write_text(text)
    names = ''.join(f'{image["id"]:02d}\n' for image in data['images'])
    for part in ('train', 'val'):
        (root / f'ImageSets/Main/{part}.txt').write_text(names)
    return ['--dataset_file=voc', f'--coco_path={root}']


def write_yolo(root: Path, data: dict, way: str) -> list[str]:
    (root / 'labels/train').mkdir(parents=True)
    for image in data['images']:
        lines = ''
        for name, (x, y, w, h) in objects_of(data, image):
            height, width = image['height'], image['width']
            shares = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
            lines += ' '.join(map(str, (CLASSES.index(name), *shares))) + '\n'
        (root / f'labels/train/{image["id"]:02d}.txt').write_text(lines)
    (root / 'data.yaml').write_text('train: images/train\nval: images/train\nnames: [one, two]\n')
    return ['--dataset_file=yolo', f'--coco_path={root}', *(['--exif=stored'] if way == 'stored' else [])]


def write_shards(root: Path, data: dict, way: str) -> list[str]:
    pytest.importorskip('webdataset')
    write_coco(root, data, way)
    words = ['--images', str(root / 'images/train'), '--ann', str(root / 'train.json')]
    run_command(
        make_shards.make_shards,
        make_shards.get_args_parser(),
        [*words, '--output', str(root / 'shards'), '--shard_size', '3'],
    )
    return [f'--{part}_ann={root / "shards"}' for part in ('train', 'val')]


WRITE: dict[str, Callable[[Path, dict, str], list[str]]] = {
    'coco': write_coco,
    'voc': write_voc,
    'yolo': write_yolo,
    'shards': write_shards,
}


def datasets_of(words: list[str], root: Path, *more: str) -> dict[str, ImageDataset]:
    """The datasets of a run with these flags, as main.py lets them read."""
    from main import get_args_parser

    args = get_args_parser().parse_args([*words, '--img_size=64', '--aug=none', *more])
    settled = settle(args, (DATA, RUN))
    datasets = build_datasets(settled, None)
    settle_reading(settled, datasets)
    return datasets


def pixels_of(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(COLOURS[labels]).permute(2, 0, 1)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_and_boxes_turn_as_pillow_turns(orientation: int) -> None:
    labels = picture()
    expected = turned_by_pillow(labels, orientation)
    image = turned(pixels_of(labels), orientation)
    assert torch.equal(image, pixels_of(expected)) and image.permute(1, 2, 0).is_contiguous()
    boxes, shown = (torch.tensor(boxes_in(each)).float() for each in (labels, expected))
    for each in (boxes, shown):
        each[:, 2:] += each[:, :2]
    assert torch.equal(turned_boxes(boxes, orientation, labels.shape), shown)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('kind', KINDS)
def test_boxes_lie_on_the_same_pixels_in_every_format(
    kind: str, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of squares, half turns and mirrored images, in which no size shows what is meant."""
    data = write_photographs(tmp_path, way, ((48, 72), (48, 48)))
    datasets = datasets_of(WRITE[kind](tmp_path, data, way), tmp_path)
    said = capsys.readouterr().out
    for idx, (image, target) in enumerate(datasets['train'].untransformed(i) for i in range(16)):
        shown = picture(48, 72 if idx < 8 else 48)
        stored = turned_by_pillow(shown, INVERSE[idx % 8])
        meant = shown if way == 'shown' else stored
        assert torch.equal(image, pixels_of(meant)), idx
        assert image.permute(1, 2, 0).is_contiguous()
        expected = torch.tensor(boxes_in(meant)).float()
        found = target['boxes'].clone()
        found[:, 2:] -= found[:, :2]
        assert torch.allclose(found, expected, atol=1e-4), idx
        assert target['orig_size'].tolist() == list(meant.shape)
        left = datasets['train'].turn_left(idx)
        assert torch.equal(turned(image, left), pixels_of(shown)), idx
    assert datasets['train'].image_sizes().tolist()[5] == ([48, 72] if way == 'shown' else [72, 48])
    number, fits = (14 if kind == 'yolo' else 10), 'as their annotated sizes ask for'
    if kind != 'shards':  # tools/make_shards.py says it
        turn = 'turned by' if way == 'shown' else 'as they are stored, not turned by'
        assert f'train {number} images {turn} their EXIF data' in said
        assert (f'train 4 images {turn} their EXIF data, {fits} (05.png' in said) == (kind != 'yolo')


@pytest.mark.parametrize('way', WAYS)
def test_metrics_are_the_same_to_the_last_digit(way: str, tmp_path: Path) -> None:
    """Of the same detections, turned with the images."""
    numbers = []
    for kind in KINDS:
        root = tmp_path / kind
        data = write_photographs(root, way)
        dataset = datasets_of(WRITE[kind](root, data, way), root)['val']
        evaluator = CocoEvaluator(dataset.ground_truth, dataset.class_map)
        for idx, image_id in enumerate(dataset.ids):
            shift = torch.tensor([idx % 4, idx % 3, idx % 2, idx // 3]).float()
            boxes = torch.tensor(boxes_in(picture())).float()
            boxes[:, 2:] += boxes[:, :2]
            boxes = turned_boxes(boxes + shift, INVERSE[idx], (48, 72)) if way == 'stored' else boxes + shift
            labels = torch.tensor([dataset.class_map.names.index(name) for name in CLASSES])
            evaluator.update(
                {image_id: {'boxes': boxes, 'labels': labels, 'scores': torch.tensor([0.9, 0.8])}}
            )
        numbers.append(evaluator.summarize().numbers)
    assert all(each == numbers[0] for each in numbers) and 0.3 < numbers[0]['AP'] < 0.9


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'webp', 'tif', 'mpo'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_all_formats_with_exif_data(suffix: str, orientation: int, tmp_path: Path) -> None:
    """Pillow turns TIFF by itself, before or after it says their size."""
    stored = turned_by_pillow(picture(), INVERSE[orientation - 1])
    options = {'webp': {'lossless': True}, 'jpg': {'quality': 100}, 'mpo': {'quality': 100}}.get(suffix, {})
    save_photograph(tmp_path / f'a.{suffix}', stored, orientation, **options)
    header = read_header(tmp_path / f'a.{suffix}')
    assert (header.height, header.width, header.orientation) == (*stored.shape, orientation)
    for exif, expected in (('stored', stored), ('upright', picture())):
        reader = ImageReader(exif)
        image = reader.read(tmp_path / f'a.{suffix}')
        assert image.shape[1:] == expected.shape == reader.size(tmp_path / f'a.{suffix}')
        assert (image.int() - pixels_of(expected).int()).abs().float().mean() < 8
        assert reader.turn_left(tmp_path / f'a.{suffix}') == (orientation if exif == 'stored' else 1)


def detector_of_colours(reader: ImageReader) -> Namespace:
    """A detector that finds both rectangles in pixels."""

    def detect_batch(images: list[Tensor], encode: object = None) -> list[dict]:
        results = []
        for image in images:
            distances = (image.permute(1, 2, 0).numpy().astype(int)[:, :, None] - COLOURS).__abs__().sum(-1)
            boxes = torch.tensor(boxes_in(distances.argmin(-1))).float()
            boxes[:, 2:] += boxes[:, :2]
            results.append(
                {'boxes': boxes, 'labels': torch.tensor([0, 1]), 'scores': torch.tensor([0.9, 0.8])}
            )
        return results

    categories = [{'id': number, 'name': name} for number, name in enumerate(CLASSES, start=1)]
    return Namespace(reader=reader, class_map=ClassMap.from_categories(categories), detect_batch=detect_batch)


@pytest.mark.parametrize('exif', (*WAYS[1:], 'upright'))
def test_drawings_of_predictions_stand_upright(exif: str, tmp_path: Path) -> None:
    """The box in the drawing surrounds the colour; files have it in the image as it was read."""
    write_photographs(tmp_path, 'shown')
    detector = detector_of_colours(ImageReader(exif))
    files = ResultFiles(tmp_path / 'out', ('json', 'yolo'), detector.class_map)
    (tmp_path / 'out').mkdir()
    images = sorted((tmp_path / 'images/train').iterdir())
    args = Namespace(batch_size=3, score_thr=0.3, json_score_thr=0.0)
    predict.detect_images(detector, images, files, torch.tensor([0.3, 0.3]), args)
    files.finish()
    rows = json.loads((tmp_path / 'out/predictions.json').read_text())
    for number in range(1, 9):
        with PIL.Image.open(tmp_path / f'out/{number:02d}.png') as drawing:
            pixels = np.array(drawing)
        factor = pixels.shape[0] // 48
        assert pixels.shape == (48 * factor, 72 * factor, 3)
        for label, (x, y, w, h) in enumerate(boxes_in(picture()), start=1):
            inside = pixels[factor * y + 40 : factor * (y + h) - 20, factor * x + 20 : factor * (x + w) - 20]
            assert (inside == COLOURS[label]).all(), number
            right = pixels[factor * (y + h // 2), factor * (x + w) - 2]  # on the outline
            assert (right != COLOURS[label]).any() and (right != COLOURS[0]).any(), number
        stored = turned_by_pillow(picture(), INVERSE[number - 1])
        read = stored if exif == 'stored' else picture()
        found = [row['bbox'] for row in rows if row['image_id'] == number]
        assert found == boxes_in(read), number
        height, width = read.shape
        shares = np.loadtxt(tmp_path / f'out/labels/{number:02d}.txt')[:, 1:5] * [
            width,
            height,
            width,
            height,
        ]
        shares[:, :2] -= shares[:, 2:] / 2
        assert np.allclose(shares, boxes_in(read), atol=1e-3)


def test_a_checkpoint_keeps_how_images_were_read(tmp_path: Path) -> None:
    """And prediction follows it. Drawings of the run stand upright."""
    flags = TINY.replace('--dataset_file shapes', '')
    readers = {}
    for way in WAYS:
        root = tmp_path / way
        words = write_coco(root, write_photographs(root, way), way)
        run(root / 'out', *words, '--epochs', '1', flags=flags)
        recorded = load(root / 'out')['args']
        assert (recorded['exif'], recorded['upright']) == ('auto', way == 'shown')
        readers[way] = load_detector(weights=root / 'out/checkpoint.pth').reader
        adopted = data_of(Namespace(**recorded), (), recorded)
        assert adopted['upright'] is (way == 'shown') and adopted['exif'] == 'auto'
        other = data_of(Namespace(**recorded | {'dataset_file': 'coco'}), ('coco_path',), recorded)
        assert 'upright' not in other and 'pixel_range' in other
        assert 'upright' in training_flags(Namespace(**recorded), set(), recorded)
        assert 'upright' in training_flags(Namespace(**recorded), {'train_ann'}, recorded)
        other = Namespace(**recorded | {'train_ann': 'other.json'})
        assert 'upright' not in training_flags(other, {'train_ann'}, recorded)
    assert readers == {'shown': ImageReader(), 'stored': ImageReader(upright=False)}
    assert build_reader(Namespace()) == ImageReader()


def test_drawings_of_a_dataset_stand_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = datasets_of(write_coco(tmp_path, write_photographs(tmp_path, 'stored'), 'stored'), tmp_path)[
        'val'
    ]
    model = torch.nn.Linear(1, 1)
    found = {'boxes': torch.tensor([[1.0, 2, 3, 4]]), 'labels': torch.tensor([0]), 'scores': torch.ones(1)}
    monkeypatch.setattr('engine.postprocess_batch', lambda *args: [found])
    monkeypatch.setattr(model, 'forward', lambda samples: {})
    for image, _, truth in sample_detections(model, {}, dataset, count=8):
        scale = image.shape[1] / 48
        assert image.shape[2] == 72 * scale
        expected = torch.tensor(boxes_in(picture())).float()
        expected[:, 2:] += expected[:, :2]
        assert torch.allclose(truth['boxes'], expected * scale, atol=0.05)


@pytest.mark.parametrize('exif', (*WAYS[1:], 'upright'))
def test_sizes_that_contradict_the_flag_are_refused(exif: str, tmp_path: Path) -> None:
    way = 'shown' if exif == 'stored' else 'stored'
    words = write_coco(tmp_path, write_photographs(tmp_path, way), way)
    dataset = datasets_of(words, tmp_path, f'--exif={exif}')['train']
    with pytest.raises(UserError, match=rf'05\.png is .*or give --exif auto instead of {exif}'):
        dataset.untransformed(4)
    settings = data_settings(Namespace(exif='auto'))
    assert build_reader(settings) == ImageReader()


def test_a_size_that_fits_in_no_way_is_refused(tmp_path: Path) -> None:
    data = write_photographs(tmp_path, 'shown')
    data['images'][5]['width'] = 71
    dataset = datasets_of(write_coco(tmp_path, data, 'shown'), tmp_path)['train']
    with pytest.raises(
        UserError, match=r'06\.png is 72 x 48 .* says 71 x 48: the boxes would be wrong; fetch'
    ):
        dataset.untransformed(5)


def test_run_lengths_belong_to_the_image_as_it_is_read(tmp_path: Path) -> None:
    for way in WAYS:
        root = tmp_path / way
        data = write_photographs(root, way)
        for annotation in data['annotations']:
            image = data['images'][annotation['image_id'] - 1]
            x, y, w, h = annotation['bbox']
            mask = np.zeros((image['height'], image['width']), dtype=int)
            mask[y : y + h, x : x + w] = 1
            edges = np.flatnonzero(np.diff(mask.ravel(order='F'), prepend=0, append=-1))
            counts = np.diff(edges, prepend=0).tolist()
            annotation['segmentation'] = {'size': list(mask.shape), 'counts': counts}
        args = write_coco(root, data, way)
        dataset = datasets_of(args, root)['train']
        from datasets.coco import CocoDetection

        masked = CocoDetection(
            dataset.image_dir, dataset.annotation_file, return_masks=True, reader=dataset.reader
        )
        for idx in range(8):
            image, target = masked[idx]
            for mask, label in zip(target['masks'], (1, 2), strict=True):
                assert torch.equal(mask.bool(), (image == torch.tensor(COLOURS[label])[:, None, None]).all(0))
