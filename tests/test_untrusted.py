"""Files of unknown origin: shards, images, annotations and checkpoints run nothing and take no more memory
than is said.
"""

import io
import json
import os
import struct
import tarfile
import zlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import main
from datasets import shard_index
from datasets.image_io import FORMATS, MAX_PIXELS, ImageReader, read_header
from datasets.shard_index import read_index, read_samples
from datasets.shards import ShardedCoco
from tests.runs import run
from tests.shared_data import EPS, put_ghostscript, rule_image
from tools import compare_runs, make_shards, predict
from util.errors import UserError

pytest.importorskip('webdataset', reason='needs webdataset: pip install webdataset')


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two images of two classes in one shard."""
    (tmp_path / 'images').mkdir()
    boxes = [{'id': n + 1, 'image_id': n, 'category_id': 1 + n, 'bbox': [1, 1, 20, 20]} for n in (0, 1)]
    for number in (0, 1):
        PIL.Image.fromarray(rule_image(f'{number}', 48, 64)).save(tmp_path / f'images/{number}.png')
    images = [{'id': n, 'file_name': f'{n}.png'} for n in (0, 1)]
    content = {'images': images, 'annotations': boxes, 'categories': [{'id': 1}, {'id': 2}]}
    (tmp_path / 'all.json').write_text(json.dumps(content))
    words = f'--images {tmp_path}/images --ann {tmp_path}/all.json --output {tmp_path}/shards'
    make_shards.make_shards(make_shards.get_args_parser().parse_args(words.split()))
    return tmp_path / 'shards'


def change_index(shards: Path, change: Callable[[dict], object]) -> None:
    data = json.loads((shards / 'shards.json').read_text())
    change(data)
    (shards / 'shards.json').write_text(json.dumps(data))


def set_address(shards: Path, url: str) -> None:
    change_index(shards, lambda data: data['shards'][0].update(url=url))


# Shards ----


def test_a_command_in_an_index_needs_the_flag(shards: Path, tmp_path: Path) -> None:
    set_address(shards, f'pipe:touch {tmp_path}/ran; cat {shards}/000000.tar')
    for program in (read_index, ShardedCoco):
        with pytest.raises(UserError, match=r"shards\.json has the shard 'pipe:touch .*--allow_pipe"):
            program(str(shards))
    assert not (tmp_path / 'ran').exists()
    assert len(ShardedCoco(str(shards), allow_pipe=True)[0][1]['boxes']) == 1
    assert (tmp_path / 'ran').exists()


@pytest.mark.parametrize('kind', ['http', 'ftp', 'gs', 'hf', 'PIPE', 's3', 'file', 'scp'])
def test_other_addresses_are_refused(shards: Path, kind: str) -> None:
    set_address(shards, f'{kind}://host/000000.tar')
    with pytest.raises(UserError, match='an https URL, or with --allow_pipe a command'):
        read_index(shards, allow_pipe=True)
    words = ['--ann', 'x', '--images', 'x', '--output', f'{shards}/new', '--url', f'{kind}://host/{{file}}']
    with pytest.raises(UserError, match='an https URL'):
        make_shards.make_shards(make_shards.get_args_parser().parse_args(words))


def test_https_stays_https(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the server sends the client on; curl is told so."""
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/curl').write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/words\ncat {shards}/000000.tar\n')
    (tmp_path / 'bin/curl').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:{os.environ["PATH"]}')
    expected = [sample['__key__'] for sample in read_samples(f'{shards}/000000.tar')]
    assert [sample['__key__'] for sample in read_samples('https://host/000000.tar')] == expected
    words = (tmp_path / 'words').read_text().split()
    assert words[:2] == ['--proto', '=https'] and words[-1] == 'https://host/000000.tar'


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('run')
    run(folder, '--epochs', '1', '--eval_every', '0')
    return folder


def test_a_checkpoint_runs_no_command(trained: Path, shards: Path, tmp_path: Path) -> None:
    """Neither its evaluation nor the comparison of its run, though the file allows commands."""
    set_address(shards, f'pipe:touch {tmp_path}/ran; cat {shards}/000000.tar')
    checkpoint = torch.load(trained / 'checkpoint.pth', weights_only=True)
    more = {'dataset_file': 'coco', 'val_shards': str(shards), 'allow_pipe': True, 'allow_outside': True}
    checkpoint['args'] |= more
    torch.save(checkpoint, tmp_path / 'checkpoint0000.pth')
    args = main.get_args_parser().parse_args(
        ['--eval', '--resume', f'{tmp_path}/checkpoint0000.pth', '--device', 'cpu']
    )
    with pytest.raises(UserError, match='--allow_pipe'):
        main.main(args)
    record = {'epoch': 1, 'images': 5, 'train_seconds': 30, 'coefficients': {'ce': 1}}
    (tmp_path / 'log.jsonl').write_text(json.dumps(record) + '\n')
    args = compare_runs.get_args_parser().parse_args([str(tmp_path), '--device', 'cpu'])
    with pytest.raises(UserError, match='--allow_pipe'):
        compare_runs.main(args)
    assert not (tmp_path / 'ran').exists()


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def sparse_tar(path: Path) -> None:
    """A terabyte of zeros in one block, as GNU tar stores it."""
    header = tarfile.TarInfo('000000000000.png')
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 0
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = tarfile.itn(1 << 40, 12, tarfile.GNU_FORMAT)  # the real size
    block[148:156] = b' ' * 8
    block[148:156] = b'%06o\0 ' % sum(block)
    path.write_bytes(bytes(block) + bytes(10240))


def pax_sparse_tar(path: Path) -> None:
    with tarfile.open(path, 'w', format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo('000000000000.png')
        member.pax_headers = {'GNU.sparse.size': '1099511627776', 'GNU.sparse.map': '0,0'}
        tar.addfile(member)


def compressed_tar(path: Path) -> None:
    with tarfile.open(path, 'w:gz') as tar:
        add_member(tar, '000000000000.png', bytes(10**6))


def large_member_tar(path: Path) -> None:
    with tarfile.open(path, 'w') as tar:
        add_member(tar, '000000000000.png', bytes(4000))


def large_name_tar(path: Path) -> None:
    with tarfile.open(path, 'w', format=tarfile.GNU_FORMAT) as tar:
        add_member(tar, 'x' * 4000, b'')


TARS = {
    sparse_tar: 'is sparse',
    pax_sparse_tar: 'is sparse',
    compressed_tar: 'cannot be read',
    large_member_tar: 'has 4000 bytes, more than 3000',
    large_name_tar: 'bytes, more than 3000',
}


@pytest.mark.parametrize('write', TARS, ids=lambda write: write.__name__)
def test_tars_that_grow_are_refused(write: Callable, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(shards / '000000.tar')
    monkeypatch.setattr(shard_index, 'LARGEST_MEMBER', 3000)
    change_index(shards, lambda data: data['shards'][0].update(bytes=(shards / '000000.tar').stat().st_size))
    with pytest.raises(UserError, match=r'shard .*000000.tar cannot be read.*make_shards') as refused:
        ShardedCoco(str(shards))[0]
    assert TARS[write] in str(refused.value)


INDICES = {
    'a list': lambda data: [],
    'deep': lambda data: 'deep',
    'no bytes': lambda data: data['shards'][0].pop('bytes'),
    'bytes in words': lambda data: data['shards'][0].update(bytes='many'),
    'half an image': lambda data: data['shards'][0].update(images=2.0),
    'address of a wrong type': lambda data: data['shards'][0].update(url=7),
    'shards are names': lambda data: data.update(shards=['a.tar']),
    'categories are names': lambda data: data.update(categories=['cat']),
    'categories are a mapping': lambda data: data.update(categories={'cat': 1}),
    'ids are fractions': lambda data: data.update(image_ids=[0.5, 1.5]),
    'ids are huge': lambda data: data.update(image_ids=[10**30, 1]),
    'sizes are words': lambda data: data.update(sizes=[['a', 'b'], ['c', 'd']]),
    'unsegmented holds lists': lambda data: data.update(unsegmented=[[1]]),
}


@pytest.mark.parametrize('name', INDICES)
def test_indices_of_wrong_types_get_the_usual_message(name: str, shards: Path) -> None:
    place = shards / 'shards.json'
    data = json.loads(place.read_text())
    returned = INDICES[name](data)
    place.write_text('[' * 100_000 if returned == 'deep' else json.dumps(data if returned != [] else []))
    with pytest.raises(UserError, match=r'shards.json is not an index of shards .*make_shards'):
        read_index(shards)


RECORDS = {
    'deep': b'[' * 100_000,
    'a list': b'[]',
    'a number': b'7',
    'annotations are null': b'{"annotations": null}',
    'annotations are names': b'{"annotations": ["cat"]}',
    'a huge area': b'{"annotations": [{"category_id": 1, "bbox": [0, 0, 1, 1], "area": 1%s}]}' % (b'0' * 400),
    'a number for a mask': b'{"annotations": [{"category_id": 1, "bbox": [0, 0, 1, 1], "segmentation": 7}]}',
}


@pytest.mark.parametrize('name', RECORDS)
def test_records_of_wrong_types_get_the_usual_message(name: str, shards: Path) -> None:
    data = ShardedCoco(str(shards), return_masks=False)
    data.return_masks = True
    stored = next(data.read([0]))
    with pytest.raises(
        UserError, match=r'000000.tar: 000000000000.png has (bad annotations|the segmentation)'
    ):
        data.decoded(type(stored)(0, stored.name, stored.image, RECORDS[name]))


# Images ----


def huge_jpeg(height: int = 65_500, width: int = 65_500) -> bytes:
    """A JPEG of some hundred bytes whose header declares more."""
    stream = io.BytesIO()
    PIL.Image.new('RGB', (8, 8)).save(stream, 'JPEG', progressive=True)
    data = bytearray(stream.getvalue())
    start = data.index(b'\xff\xc2') + 5
    data[start : start + 4] = struct.pack('>HH', height, width)
    return bytes(data)


def huge_png() -> bytes:
    header = b'IHDR' + struct.pack('>IIBBBBB', 20_000, 20_000, 1, 0, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + struct.pack('>I', 13)
        + header
        + struct.pack('>I', zlib.crc32(header))
        + b'\0\0\1\0IDAT'
    )


@pytest.mark.parametrize('make', [huge_jpeg, huge_png])
def test_images_of_too_many_pixels_are_not_decoded(make: Callable, tmp_path: Path) -> None:
    (tmp_path / 'huge.jpg').write_bytes(make())
    assert (tmp_path / 'huge.jpg').stat().st_size < 1000
    for read in (ImageReader().read, ImageReader().size, read_header):
        with pytest.raises(
            UserError, match=r'huge.jpg is not a readable image .*178,956,970 pixels are decoded; cut it'
        ):
            read(tmp_path / 'huge.jpg')


def test_the_limit_does_not_depend_on_what_others_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 2 * PIL.Image.MAX_IMAGE_PIXELS == MAX_PIXELS
    monkeypatch.setattr(PIL.Image, 'MAX_IMAGE_PIXELS', None)
    (tmp_path / 'huge.jpg').write_bytes(huge_jpeg())
    with pytest.raises(UserError, match=r'65500 x 65500 pixels\): at most'):
        ImageReader().read(tmp_path / 'huge.jpg')


def test_formats_that_start_programs_are_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_ghostscript(tmp_path / 'gs', monkeypatch)
    (tmp_path / 'image.png').write_bytes(EPS)
    with pytest.raises(UserError, match='not a readable image'):
        ImageReader().read(tmp_path / 'image.png')
    assert not (tmp_path / 'ran').exists()


def test_the_usual_formats_are_read(tmp_path: Path) -> None:
    pixels = rule_image('x', 8, 12)
    for kind in FORMATS:
        options = {'quality': 95} if kind == 'JPEG' else {'lossless': True} if kind == 'WEBP' else {}
        PIL.Image.fromarray(pixels).save(tmp_path / 'image', kind, **options)
        found = ImageReader().read(tmp_path / 'image').permute(1, 2, 0).numpy()
        assert found.shape == (8, 12, 3)
        assert kind in ('JPEG', 'GIF') or np.array_equal(found, pixels), kind


def test_frames_of_too_many_pixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip('av')
    frame = av.VideoFrame.from_ndarray(rule_image('x', 8, 12), format='rgb24')
    video = Namespace(streams=Namespace(video=[Namespace(frames=1)]), decode=lambda stream: [frame])
    detector = Namespace(detect_batch=lambda images, encode: [{} for _ in images])
    args = Namespace(source='video.mp4', batch_size=1)
    ((image, _),) = predict.detect_frames(detector, video, args)
    assert image.shape == (3, 8, 12)
    monkeypatch.setattr('datasets.image_io.MAX_PIXELS', 95)
    with pytest.raises(UserError, match=r'video.mp4 .*\(8 x 12 pixels\): at most 95 pixels'):
        list(predict.detect_frames(detector, video, args))
