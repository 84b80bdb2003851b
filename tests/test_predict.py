"""tools/predict.py: images, URLs and videos in; drawings, JSON, CSV and YOLO's text out."""

import csv
import functools
import http.server
import json
import os
import shutil
import signal
import tracemalloc
from pathlib import Path

import PIL.ExifTags
import PIL.Image
import pytest
import torch

import main
from datasets.coco_json import Issues
from datasets.shapes import ShapesDetection
from datasets.yolo import read_yolo
from models.detector import Detector, load_detector
from tests.processes import start
from tests.runs import TINY, fill_disk, load, run
from tests.web import served
from tools import predict
from util.command_line import run_command
from util.errors import FileError
from util.files import GrowingFile, save_atomically

TOP = 60  # detections of an image: 10 queries of 6 classes


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and a folder of images of two sizes."""
    folder = tmp_path_factory.mktemp('trained')
    run(folder, '--epochs', '1', '--eval_every', '0')
    (folder / 'images/more').mkdir(parents=True)
    for number, place in enumerate(('images/1.png', 'images/2.jpg', 'images/more/1.png')):
        image = ShapesDetection(3, 'val', image_size=64)[number][0].permute(1, 2, 0).numpy()
        PIL.Image.fromarray(image).save(folder / place)
    return folder


def words(folder: Path, source: object, out: Path, *more: str) -> list[str]:
    return [
        '--checkpoint',
        str(folder / 'checkpoint.pth'),
        '--source',
        str(source),
        '--output_dir',
        str(out),
        '--device',
        'cpu',
        *more,
    ]


def predicted(*argv: str) -> None:
    run_command(predict.main, predict.get_args_parser(), argv)


def test_all_formats_hold_the_same(trained: Path, tmp_path: Path) -> None:
    predicted(*words(trained, f'{trained}/images/**/*.*', tmp_path, '--formats', 'json', 'csv', 'yolo'))
    rows = json.loads((tmp_path / 'predictions.json').read_text())
    with (tmp_path / 'predictions.csv').open() as file:
        table = list(csv.DictReader(file))
    assert len(rows) == len(table) == 3 * TOP
    for row, line in zip(rows, table, strict=True):
        assert (row['file_name'], row['category_name'], str(row['score'])) == (
            line['file_name'],
            line['category_name'],
            line['score'],
        )
        assert [float(line[key]) for key in ('x', 'y', 'width', 'height')] == row['bbox']
    for name in ('1.png', '2.jpg', 'more/1.png'):
        with PIL.Image.open(trained / 'images' / name) as image:
            width, height = image.size
        own = [row['bbox'] for row in rows if row['file_name'] == name]
        file, issues = (tmp_path / 'labels' / name).with_suffix('.txt'), Issues()
        found = [each['bbox'] for each in read_yolo(file, height, width, range(6), issues)]
        assert issues.counts.total() == TOP  # scores
        torch.testing.assert_close(torch.tensor(found), torch.tensor(own), atol=1e-3, rtol=1e-4)


def predict_until_killed(images: int, words: list[str]) -> None:
    """Predict, and be killed when so many images have been seen."""
    original, seen = Detector.detect_batch, [0]

    def detect_batch(detector: Detector, batch: list[torch.Tensor], *more: object) -> list[dict]:
        if seen[0] == images:
            os.kill(os.getpid(), signal.SIGKILL)
        seen[0] += len(batch)
        return original(detector, batch, *more)

    Detector.detect_batch = detect_batch
    predicted(*words)


def test_a_kill_keeps_what_was_done(trained: Path, tmp_path: Path) -> None:
    """Also beside the results of later and earlier programs."""
    (tmp_path / 'predictions.unfinished.json').write_text('of an earlier one')
    argv = words(trained, f'{trained}/images/**/*.*', tmp_path, '--formats', 'json', 'csv', 'yolo')
    process = start({}, predict_until_killed, 2, argv)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    left = {path.name: path.read_text() for path in tmp_path.glob('predictions*')}
    assert left.keys() == {
        'predictions.unfinished.json',
        'predictions.unfinished2.json',
        'predictions.unfinished.csv',
    }
    assert len(list(tmp_path.glob('labels/*.txt'))) == 2
    predicted(*argv)
    for name, text in left.items():
        assert (tmp_path / name).read_text() == text
    whole = [(tmp_path / f'predictions.{suffix}').read_text() for suffix in ('json', 'csv')]
    assert len(list(tmp_path.glob('predictions*'))) == len(left) + 2
    assert json.loads(left['predictions.unfinished2.json']) == json.loads(whole[0])[: 2 * TOP]
    assert left['predictions.unfinished.csv'].splitlines() == whole[1].splitlines()[: 2 * TOP + 1]


def test_a_message_names_one_file(tmp_path: Path) -> None:
    """A video is written while its results are."""

    def write(path: Path) -> None:
        raise FileError('predictions.json could not be written')

    with pytest.raises(FileError, match=r'^predictions.json could not be written$'):
        save_atomically(tmp_path / 'video.mp4', write)


def test_a_full_disk_keeps_what_was_written(small_disk: Path) -> None:
    file = GrowingFile(small_disk / 'a.json', '[', ', ', ']')
    for pieces in ([], ['1', '2'], [], ['3']):
        file.add(pieces)
    fill_disk(small_disk)
    with pytest.raises(FileError, match=r'a\.json could not be written .*No space'):
        file.add([json.dumps('x' * 10**5)])
    assert (small_disk / 'a.unfinished.json').read_text() == '[1, 2, 3]'
    (small_disk / 'filler').unlink()
    file.add(['4'])
    file.finish()
    assert [path.name for path in small_disk.iterdir()] == ['a.json']
    assert json.loads((small_disk / 'a.json').read_text()) == [1, 2, 3, 4]


def test_memory_does_not_grow_with_the_images(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, kept = Detector.detect_batch, []

    def detect_batch(*args: object) -> list[dict]:
        kept.append(tracemalloc.get_traced_memory()[0])
        return original(*args)

    for number in range(16):
        shutil.copy(trained / 'images/1.png', tmp_path / f'{number:02}.png')
    monkeypatch.setattr(Detector, 'detect_batch', detect_batch)
    tracemalloc.start()
    predicted(*words(trained, tmp_path, tmp_path.with_name('out'), '--formats', 'json', 'csv'))
    tracemalloc.stop()
    assert kept[-1] - kept[5] < 10 * 5000, 'bytes of 10 images'


def test_weights_that_are_no_numbers_are_named(trained: Path, tmp_path: Path) -> None:
    checkpoint = load(trained)
    checkpoint['model']['class_embed.bias'][0] = float('nan')
    torch.save(checkpoint, tmp_path / 'bad.pth')
    message = r'^error: .*bad\.pth: 1 of \d+ entries are not finite \(class_embed\.bias\): '
    with pytest.raises(SystemExit, match=message):
        predicted(*words(trained, trained / 'images', tmp_path, '--checkpoint', str(tmp_path / 'bad.pth')))
    argv = [*TINY.split(), '--eval', '--resume', str(tmp_path / 'bad.pth')]
    with pytest.raises(SystemExit, match=message):
        run_command(main.main, main.get_args_parser(), argv)


def test_thresholds_of_classes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = trained / 'images/1.png'
    for more, expected in (
        (['--score_thr', '0'], TOP),
        (['--score_thr', '1', '--class_thresholds', 'disc=0'], None),
    ):
        predicted(*words(trained, source, tmp_path, *more))
        rows = json.loads((tmp_path / 'predictions.json').read_text())
        number = expected or sum(row['category_name'] == 'disc' for row in rows)
        assert f'1.png: {number} objects' in capsys.readouterr().out
    for bad, message in (
        ('dog=0.5', "no class is named 'dog'"),
        ('disc=high', "'high' is not a score"),
        ('disc=nan', 'disc=nan: a score must be a finite number'),
        ('disc=99', 'a score must be at most 1, not 99'),
    ):
        with pytest.raises(SystemExit, match=message):
            predicted(*words(trained, source, tmp_path, '--class_thresholds', bad))


@pytest.mark.parametrize('flag', ['--batch_size=0', '--score_thr=5', '--json_score_thr=nan'])
def test_numbers_out_of_bounds_are_refused(flag: str, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f'error: {flag.split("=")[0]} must be'):
        predicted(*words(trained, trained / 'images', tmp_path, flag))
    assert not any(tmp_path.iterdir())


def test_nothing_is_written_among_the_images(trained: Path, tmp_path: Path) -> None:
    (tmp_path / 'images').symlink_to(trained / 'images')
    before = {path: path.read_bytes() for path in trained.rglob('*') if path.is_file()}
    (tmp_path / 'links').mkdir()
    (tmp_path / 'links/1.png').symlink_to(trained / 'images/1.png')
    for source, out in (
        (trained / 'images', trained),
        (tmp_path / 'images/1.png', trained / 'images'),
        (tmp_path / 'links', tmp_path / 'links'),
    ):
        with pytest.raises(SystemExit, match='where the source lies: choose a folder of its own'):
            predicted(*words(trained, source, out, '--formats', 'yolo'))
    with pytest.raises(SystemExit, match=r'cannot be an output folder, since .*1\.png is a file'):
        predicted(*words(trained, trained / 'images', tmp_path / 'images/1.png/more'))
    assert {path: path.read_bytes() for path in trained.rglob('*') if path.is_file()} == before


def test_an_unreadable_image_costs_no_other(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (trained / 'images/2.jpg').read_bytes()
    for name, data in (('1.jpg', whole), ('2.jpg', whole[:200]), ('3.jpg', whole), ('read.me', b'text')):
        (tmp_path / name).write_bytes(data)
    for number in ('1', '3'):
        with pytest.raises(
            SystemExit, match=r'1 of 3 images were left out, the first because .*2\.jpg is not'
        ):
            predicted(*words(trained, f'{tmp_path}/*', tmp_path / number, '--batch_size', number))
        rows = json.loads((tmp_path / number / 'predictions.json').read_text())
        assert [row['image_id'] for row in rows] == [1] * TOP + [3] * TOP
        assert {path.name for path in (tmp_path / number).glob('*.png')} == {'1.png', '3.png'}
    assert '2 drawn images' in capsys.readouterr().out
    (tmp_path / '2.jpg').unlink()
    (tmp_path / '2.jpg').symlink_to('nowhere')
    with pytest.raises(SystemExit, match=r'1 of 3 images were left out, the first because .*No such file'):
        predicted(*words(trained, f'{tmp_path}/*', tmp_path / 'link'))
    (tmp_path / '4.jfif').write_bytes(whole)
    predicted(*words(trained, f'{tmp_path}/*.jfif', tmp_path / 'jfif'))
    (tmp_path / '5.jpg').write_bytes(whole[:200])
    with pytest.raises(SystemExit, match=r'error: .*5\.jpg is not a readable image'):
        predicted(*words(trained, tmp_path / '5.jpg', tmp_path / 'out'))
    with pytest.raises(SystemExit, match='no image there'):
        predicted(*words(trained, f'{tmp_path}/*m*', tmp_path / 'out'))


def test_labels_belong_to_the_image_as_it_is_read(trained: Path, tmp_path: Path) -> None:
    """Upright by default."""
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    with PIL.Image.open(trained / 'images/2.jpg') as image:
        image.save(tmp_path / 'a.jpg', exif=exif)
        width, height = image.size
    predicted(*words(trained, tmp_path / 'a.jpg', tmp_path / 'out', '--formats', 'json', 'yolo'))
    row = json.loads((tmp_path / 'out/predictions.json').read_text())[0]
    x, y, w, h = row['bbox']
    shares = [float(value) for value in (tmp_path / 'out/labels/a.txt').read_text().split()[1:5]]
    expected = [(x + w / 2) / height, (y + h / 2) / width, w / height, h / width]  # turned by a quarter
    assert shares == pytest.approx(expected, abs=1e-4)


def test_no_two_images_share_a_result() -> None:
    names = ['a.jpg', 'a.png', 'a.jpg.bmp', '1.jpg', 'x/1.jpg', 'b.jpg']
    stems = predict.stems_of(names)
    assert stems['b.jpg'] == 'b' and stems['x/1.jpg'] == 'x/1' and stems['a.png'] == 'a.png'
    assert len(set(stems.values())) == len(names)
    assert predict.ids_of(names) == {name: name for name in names}
    assert predict.ids_of(['007.jpg', 'x/8.png', 'b.jpg']) == {'007.jpg': 7, 'x/8.png': 8, 'b.jpg': 'b.jpg'}


def test_batches_and_16_bits_find_the_same(trained: Path) -> None:
    images = [ShapesDetection(1, 'val', image_size=64)[0][0]] * 3
    single = load_detector(weights=trained / 'checkpoint.pth')
    expected = single.detect(images[0])
    for found in single.detect_batch(images):
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)
    half = load_detector(weights=trained / 'checkpoint.pth', half=True).detect(images[0])
    assert not torch.equal(half['boxes'], expected['boxes'])
    close = (half['scores'].sort()[0] - expected['scores'].sort()[0]).abs().max()
    assert close < 0.02


def test_images_of_other_sizes_share_a_batch(trained: Path, tmp_path: Path) -> None:
    predicted(*words(trained, f'{trained}/images/**/*.*', tmp_path, '--batch_size', '2', '--half'))
    rows = json.loads((tmp_path / 'predictions.json').read_text())
    assert [row['file_name'] for row in rows] == [
        name for name in ('1.png', '2.jpg', 'more/1.png') for _ in range(TOP)
    ]
    assert len(list(tmp_path.rglob('*.png'))) == 3


def test_a_url(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(trained))
    with served(handler) as server:
        url = f'{server}/images'
        for checkpoint in (trained / 'checkpoint.pth', f'{server}/checkpoint.pth'):
            with pytest.raises(SystemExit, match=r'http://.* is not downloaded, since .*add --allow_http'):
                predicted(*words(trained, f'{url}/2.jpg', tmp_path, '--checkpoint', str(checkpoint)))
        monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'hub'))
        weights = ['--checkpoint', f'{server}/checkpoint.pth', '--allow_http']
        predicted(*words(trained, f'{url}/2.jpg', tmp_path, *weights))
        assert {row['file_name'] for row in json.loads((tmp_path / 'predictions.json').read_text())} == {
            '2.jpg'
        }
        with pytest.raises(SystemExit, match=r'gone\.jpg could not be downloaded'):
            predicted(*words(trained, f'{url}/gone.jpg', tmp_path, '--allow_http'))


def test_a_video(trained: Path, tmp_path: Path) -> None:
    av = pytest.importorskip('av')
    shapes = ShapesDetection(5, 'val', image_size=64)
    with av.open(str(tmp_path / 'video.mp4'), 'w') as output:
        stream = output.add_stream('libx264', rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        for number in range(5):
            image = PIL.Image.fromarray(shapes[number][0].permute(1, 2, 0).numpy()).resize((64, 48))
            output.mux(stream.encode(av.VideoFrame.from_image(image)))
        output.mux(stream.encode())
    predicted(
        *words(
            trained, tmp_path / 'video.mp4', tmp_path / 'out', '--formats', 'json', 'csv', '--batch_size', '2'
        )
    )
    rows = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert [row['frame'] for row in rows] == [frame for frame in range(5) for _ in range(TOP)]
    with av.open(str(tmp_path / 'out/video.mp4')) as video:
        frames = [frame.to_ndarray(format='rgb24').shape for frame in video.decode(video=0)]
        assert frames == [(384, 512, 3)] * 5 and video.streams.video[0].average_rate == 5
    (tmp_path / 'broken.mp4').write_bytes(b'no video')
    with pytest.raises(SystemExit, match=r'broken\.mp4 is not a readable video'):
        predicted(*words(trained, tmp_path / 'broken.mp4', tmp_path / 'out'))
    with pytest.raises(SystemExit, match='--formats yolo is for images'):
        predicted(*words(trained, tmp_path / 'video.mp4', tmp_path / 'out', '--formats', 'yolo'))
    with pytest.raises(SystemExit, match='no video there'):
        predicted(*words(trained, tmp_path / 'gone.mp4', tmp_path / 'out'))


def test_a_webcam_until_ctrl_c(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless generated source replaces the device. All frames before the interrupt are in the video."""
    av = pytest.importorskip('av')
    opened, drawn, frames = av.open, predict.draw_detections, iter(range(5))

    def open_source(path: str, *args: str, **options: str) -> object:
        if options.get('format') != 'v4l2':
            return opened(path, *args, **options)
        assert path == '/dev/video1'
        return opened('testsrc=size=64x48:rate=5', format='lavfi')

    def draw(*args: object) -> object:
        if next(frames, None) is None:
            raise KeyboardInterrupt
        return drawn(*args)

    monkeypatch.setattr(av, 'open', open_source)
    monkeypatch.setattr(predict, 'draw_detections', draw)
    predicted(*words(trained, 'webcam:1', tmp_path))
    rows = json.loads((tmp_path / 'predictions.json').read_text())
    assert [row['frame'] for row in rows] == [frame for frame in range(5) for _ in range(TOP)]
    with opened(str(tmp_path / 'webcam.mp4')) as video:
        assert len(list(video.decode(video=0))) == 5
    monkeypatch.setattr(av, 'open', opened)
    with pytest.raises(SystemExit, match='webcam:99 is no webcam that Linux can read'):
        predicted(*words(trained, 'webcam:99', tmp_path))
