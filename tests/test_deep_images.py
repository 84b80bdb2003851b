"""Grey images of more than 8 bits: their range from the file, from a flag, from the data, or from the image."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin
import pytest
import torch

import main
from datasets.deep_images import Extremes, fitting_range
from datasets.image_io import ImageReader, is_flat, read_header
from models.detector import load_detector
from tests.runs import TINY, load, run
from tools import make_shards, predict
from util.command_line import run_command
from util.errors import UserError

RAMP = np.linspace(0, 1, 48 * 64).reshape(48, 64)


def encoded(values: np.ndarray, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(values).save(stream, kind, **options)
    return stream.getvalue()


def tiff(values: np.ndarray, **tags: object) -> bytes:
    info = PIL.TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[{name: tag for tag, name in TAGS.items()}[name]] = value
    return encoded(values, 'TIFF', tiffinfo=info)


TAGS = {
    281: 'most',
    280: 'least',
    340: 'float_least',
    341: 'float_most',
    50717: 'white',
    50714: 'black',
    42113: 'none',
}
TWELVE = (RAMP * 4095).round().astype(np.uint16)
FULL = (RAMP * 65535).round().astype(np.uint16)
GREY = (RAMP * 255).round().astype(np.uint8)


def inverted_tiff() -> bytes:
    entry = struct.pack('<HHI', 262, 3, 1)  # PhotometricInterpretation, a number of 16 bits
    return tiff(TWELVE).replace(entry + b'\1', entry + b'\0')


def pgm(values: np.ndarray, white: int) -> bytes:
    return f'P5 64 48 {white}\n'.encode() + values.astype('>u2').tobytes()


# File, range that it states, and the pixels that its own values give.
FILES = {
    'png of 16 bits': (encoded(FULL, 'PNG'), False, FULL >> 8),
    'png of 12 bits': (encoded(TWELVE, 'PNG'), False, TWELVE >> 4),
    'tiff of 12 bits': (tiff(TWELVE), False, TWELVE >> 4),
    'tiff that says its white': (tiff(TWELVE // 2, white=2047), True, TWELVE >> 4),
    'tiff that says its largest value': (tiff(TWELVE // 2, most=2047), True, TWELVE >> 4),
    'tiff that says the largest value of its type': (tiff(TWELVE, most=65535), False, TWELVE >> 4),
    'tiff of floats': (tiff(RAMP.astype(np.float32)), False, GREY),
    'tiff of floats as bytes': (tiff((RAMP * 255).astype(np.float32)), False, GREY),
    'tiff of floats that says its range': (
        tiff((RAMP * 30 - 10).astype(np.float32), float_least=-10.0, float_most=20.0),
        True,
        GREY,
    ),
    'tiff of any floats': (tiff((RAMP * 30 - 10).astype(np.float32)), False, GREY),
    'tiff of signed integers': (tiff((RAMP * 3000 - 1000).round().astype(np.int32)), False, GREY),
    'tiff whose black is above': (inverted_tiff(), False, 255 - (TWELVE >> 4)),
    'heat': (encoded((29000 + RAMP * 2000).round().astype(np.uint16), 'PNG'), False, GREY),
    'pgm of 12 bits': (pgm(TWELVE, 4095), True, TWELVE >> 4),
    'pgm of 16 bits': (pgm(FULL, 65535), False, FULL >> 8),
    'jpeg 2000': (encoded(FULL, 'JPEG2000'), True, FULL >> 8),
}


@pytest.mark.parametrize('name', FILES)
def test_files_are_neither_black_nor_white(name: str, tmp_path: Path) -> None:
    data, is_stated, expected = FILES[name]
    (tmp_path / 'image').write_bytes(data)
    header = read_header(tmp_path / 'image')
    assert header.is_deep is not is_stated
    image = ImageReader().read(tmp_path / 'image')
    assert image.shape == (3, 48, 64) and image.dtype == torch.uint8
    assert image.permute(1, 2, 0).is_contiguous() and not is_flat(image)
    difference = np.abs(image[0].numpy().astype(int) - expected.astype(int))
    assert difference.max() <= (0 if name.startswith('png') else 1)
    given = ImageReader(pixel_range=(0, 65535)).read(tmp_path / 'image')
    assert torch.equal(given, image) is (is_stated or 'of 16 bits' in name)


def test_values_that_are_not_finite_or_mean_no_data_are_black(tmp_path: Path) -> None:
    values = (0.5 + RAMP / 2).astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    values[0, 3] = -9999
    (tmp_path / 'image.tif').write_bytes(tiff(values, none='-9999'))
    image = ImageReader().read(tmp_path / 'image.tif')
    assert image[:, 0, :4].max() == 0 and image[0, 0, 4] == 128 and image.max() == 255
    values[:] = np.nan
    (tmp_path / 'image.tif').write_bytes(tiff(values))
    assert ImageReader().read(tmp_path / 'image.tif').max() == 0


@pytest.mark.parametrize(
    ('extremes', 'expected'),
    [
        ([(0, 65535, True)], (0, 65535)),
        ([(3, 4012, True)], (0, 4095)),
        ([(3, 900, True), (0, 4012, True)], (0, 4095)),
        ([(0, 200, True)], (0, 255)),
        ([(0, 1, True)], (0, 1)),
        ([(29000, 31000, True)], (29000, 31000)),
        ([(-1024, 3071, True)], (-1024, 3071)),
        ([(0, 70000, True)], (0, 131071)),
        ([(0.0, 0.98, False)], (0, 1)),
        ([(0.0, 0.1, False)], (0, 0.1)),
        ([(0.0, 251.0, False)], (0, 255)),
        ([(0.0, 3.5, False)], (0, 3.5)),
        ([], None),
    ],
)
def test_the_smallest_usual_range_is_taken(extremes: list[tuple], expected: tuple | None) -> None:
    assert fitting_range(Extremes(*each) for each in extremes) == expected
    for constant in (0.0, 7.0, -3e9):
        low, high = fitting_range([Extremes(constant, constant, True)])
        assert low == constant < high


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Flags of four images of 12 bits, of which each is darker than the last."""
    (tmp_path / 'images').mkdir()
    for number in range(4):
        values = TWELVE >> number
        PIL.Image.fromarray(values).save(tmp_path / f'images/{number}.png')
    content = {
        'images': [{'id': n, 'file_name': f'{n}.png', 'height': 48, 'width': 64} for n in range(4)],
        'annotations': [
            {'id': n + 1, 'image_id': n, 'category_id': 1, 'bbox': [2, 3, 20, 20], 'area': 400, 'iscrowd': 0}
            for n in range(4)
        ],
        'categories': [{'id': 1, 'name': 'one'}],
    }
    (tmp_path / 'ann.json').write_text(json.dumps(content))
    places = {'images': tmp_path / 'images', 'ann': tmp_path / 'ann.json'}
    return [f'--{part}_{kind}={path}' for part in ('train', 'val') for kind, path in places.items()]


def test_a_run_finds_one_range_and_keeps_it(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = TINY.replace('--dataset_file shapes', '')
    run(tmp_path / 'out', *data, '--epochs', '1', flags=flags)
    said = capsys.readouterr().out
    assert (
        'train 4 images of more than 8 bits: 0 is black and 4095 white in them (0.png, 1.png, 2.png, ...)'
        in said
    )
    assert 'nearly of one value' not in said
    assert load(tmp_path / 'out')['args']['pixel_range'] == [0, 4095]
    reader = load_detector(weights=tmp_path / 'out/checkpoint.pth').reader
    assert reader.pixel_range == (0, 4095)
    assert np.array_equal(reader.read(tmp_path / 'images/3.png')[0].numpy(), TWELVE >> 7)
    words = ['--checkpoint', str(tmp_path / 'out/checkpoint.pth'), '--source', str(tmp_path / 'images/3.png')]
    words += ['--output_dir', str(tmp_path / 'found'), '--device', 'cpu', '--score_thr', '1']
    for more, most in (((), 31), (('--pixel_range', '0', '511'), 255)):
        run_command(predict.main, predict.get_args_parser(), [*words, *more])
        with PIL.Image.open(tmp_path / 'found/3.png') as drawing:
            assert drawing.getextrema()[0] == (0, most)


def test_images_of_one_value_are_named(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = TINY.replace('--dataset_file shapes', '')
    with pytest.raises(UserError, match='--pixel_range 5 5: give the value of black, and a larger one'):
        run(tmp_path / 'out', *data, '--pixel_range', '5', '5', flags=flags)
    words = [*flags.split(), *data, '--check_data', '--pixel_range', '0', '65535']
    main.main(main.get_args_parser().parse_args(words))
    assert (
        'warning: train 4 of 4 images that were looked at are nearly of one value' in capsys.readouterr().out
    )


def test_shards_keep_the_range(data: list[str], tmp_path: Path) -> None:
    pytest.importorskip('webdataset')
    words = ['--images', str(tmp_path / 'images'), '--ann', str(tmp_path / 'ann.json')]
    output = ['--output', str(tmp_path / 'shards')]
    run_command(make_shards.make_shards, make_shards.get_args_parser(), [*words, *output])
    from datasets.shards import ShardedCoco

    image, _ = ShardedCoco(str(tmp_path / 'shards')).untransformed(1)
    assert np.array_equal(image[0].numpy(), TWELVE >> 5)
    index = json.loads((tmp_path / 'shards/shards.json').read_text())
    assert index['pixel_range'] == [0, 4095] and index['upright'] is None
    for name in ('pixel_range', 'upright'):
        del index[name]
    (tmp_path / 'shards/shards.json').write_text(json.dumps(index))  # as it was before
    image, _ = ShardedCoco(str(tmp_path / 'shards')).untransformed(1)
    assert np.array_equal(image[0].numpy(), TWELVE >> 9)
