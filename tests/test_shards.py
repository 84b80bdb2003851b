"""Images from tar shards: the items of files, each once an epoch, resumable at any batch, clear about what is
wrong.
"""

import io
import json
import random
import sys
import tarfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

import main
from datasets.augmentations import MMDETECTION_MIN_SIDE, CoDETRAugmentation, DETRAugmentation
from datasets.class_map import ClassMap
from datasets.coco import CocoDetection
from datasets.coco_eval import CocoEvaluator
from datasets.copy_paste import LargeScaleJitter
from datasets.shard_index import read_index
from datasets.shards import ShardedCoco, ShardStream, ShufflePool, build_shard_loader
from datasets.targets import Reading
from datasets.unreadable import UnreadableImages
from tests.runs import TINY, assert_same
from tests.shared_data import build_data
from tools import make_shards
from util.config.settle import DATA, RUN, settle
from util.errors import FileError

pytest.importorskip('webdataset', reason='needs webdataset: pip install webdataset')

IMAGES, SHARD = 23, 4
Write = Callable[..., Path]


def annotation(number: int, image_id: int, side: int) -> dict:
    """One in seven is a crowd region, one in five is tiny."""
    x, y, width = number % 9, number % 7, 0.5 if number % 5 == 0 else 12 + number % 8
    corners = [x, y, x + width, y, x + width, y + 10, x, y + 10]
    return {
        'id': number,
        'image_id': image_id,
        'category_id': (3, 7, 250)[number % 3],
        'bbox': [x, y, width, 10],
        'area': width * 10,
        'iscrowd': int(number % 7 == 0),
        'segmentation': [corners],
    }


@pytest.fixture(scope='module')
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images, some JPEG, one of them low; ids with gaps and not in order; one without objects."""
    root = tmp_path_factory.mktemp('files')
    (root / 'annotations').mkdir()
    (root / 'val').mkdir()
    generator = random.Random(0)
    images, annotations = [], []
    for number in range(IMAGES):
        image_id = 10 * ((number * 7) % IMAGES) + 3
        height, width = (20, 48) if number == 5 else (36 + number % 5, 40 + number % 9)
        name = f'{image_id}.{"png" if number % 2 else "JPG"}'
        image = PIL.Image.frombytes('RGB', (width, height), generator.randbytes(3 * width * height))
        image.save(root / 'val' / name)
        images.append({'id': image_id, 'file_name': name, 'height': height, 'width': width})
        for _ in range(number % 4):
            annotations.append(annotation(len(annotations) + 1, image_id, height))
    categories = [{'id': 7, 'name': 'cat'}, {'id': 3, 'name': 'dog'}, {'id': 250}]
    data = {'images': images, 'annotations': annotations, 'categories': categories}
    (root / 'annotations/instances_val.json').write_text(json.dumps(data))
    return root


@pytest.fixture
def write(files: Path, tmp_path: Path) -> Write:
    """Writes shards of the files; more flags of make_shards."""

    def run(*flags: str) -> Path:
        output = tmp_path / f'shards{len(list(tmp_path.iterdir()))}'
        source = ['--coco_path', str(files), '--image_set', 'val', '--output', str(output)]
        args = make_shards.get_args_parser().parse_args([*source, '--shard_size', str(SHARD), *flags])
        make_shards.make_shards(args)
        return output

    return run


@pytest.fixture(scope='module')
def shards(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp('written') / 'shards'
    source = ['--coco_path', str(files), '--image_set', 'val', '--output', str(output)]
    make_shards.make_shards(make_shards.get_args_parser().parse_args([*source, '--shard_size', str(SHARD)]))
    return output


def from_files(root: Path, **options: object) -> CocoDetection:
    return CocoDetection(root / 'val', root / 'annotations/instances_val.json', **options)


def small_data(shards: Path, **options: object) -> ShardedCoco:
    return ShardedCoco(str(shards), **{'buffer': 5, 'seed': 1, **options})


def drawn(data: ShardedCoco, epoch: int, start: int = 0, workers: int = 0, **place: int) -> list[list[int]]:
    """Image ids of the batches of an epoch."""
    loader = build_shard_loader(
        data, **{'batch_size': 3, 'train': True, 'rank': 0, 'world_size': 1, 'num_workers': workers, **place}
    )
    data.set_epoch(epoch)
    data.start_at(start)
    return [[int(target['image_id']) for target in targets] for _, targets in loader]


def assert_items_equal(ours: tuple, theirs: tuple) -> None:
    assert torch.equal(ours[0], theirs[0])
    assert list(ours[1]) == list(theirs[1])
    for key, value in theirs[1].items():
        assert ours[1][key].dtype == value.dtype, key
        assert torch.equal(ours[1][key], value), key


READINGS = {
    'plain': {},
    'masks': {'return_masks': True},
    'augmented': {'transforms': DETRAugmentation(64).transforms('train')},
    'mmdetection': {
        'transforms': CoDETRAugmentation(64).transforms('train'),
        'reading': Reading('contiguous', True, MMDETECTION_MIN_SIDE),
    },
}


@pytest.mark.parametrize('order', [[], ['--shuffle', '3']], ids=['by id', 'shuffled'])
@pytest.mark.parametrize('options', READINGS.values(), ids=READINGS)
def test_items_equal_those_of_files(files: Path, write: Write, options: dict, order: list[str]) -> None:
    """Pixels, targets and augmentation, in two epochs; and what is known without opening a shard."""
    theirs = from_files(files, seed=1, **options)
    ours = small_data(write(*order), **options)
    assert ours.ids == theirs.ids and len(ours) == len(theirs)
    assert ours.class_map == theirs.class_map
    assert ours.image_sizes().tolist() == theirs.image_sizes().tolist()
    assert ours.ground_truth == theirs.ground_truth
    for epoch in (0, 3):
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        items = list(ShardStream(ours, 1, True, 0, 1))
        assert len(items) == len(theirs)
        for image, target in items:
            assert_items_equal((image, target), theirs[theirs.ids.index(int(target['image_id']))])
    assert_items_equal(ours[2], theirs[2])
    assert_items_equal(ours[-1], theirs[-1])


def test_stored_files_are_unchanged(files: Path, shards: Path) -> None:
    seen = 0
    for path in sorted(shards.glob('*.tar')):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            records = [json.load(tar.extractfile(name)) for name in names if name.endswith('.json')]
            images = [tar.extractfile(name).read() for name in names if not name.endswith('.json')]
        for record, image in zip(records, images, strict=True):
            assert image == (files / 'val' / record['file_name']).read_bytes()
        seen += len(records)
    assert seen == IMAGES
    assert [shard.images for shard in read_index(shards).shards] == [4, 4, 4, 4, 4, 3]


@pytest.mark.parametrize('world_size', [1, 2, 3])
@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_no_image_comes_twice_in_an_epoch(shards: Path, world_size: int, workers: int) -> None:
    """And less than one batch a process is left out."""
    data, orders = small_data(shards), []
    batches = IMAGES // (world_size * 2)
    for epoch in range(3):
        ranks = [
            drawn(data, epoch, workers=workers, rank=rank, world_size=world_size, batch_size=2)
            for rank in range(world_size)
        ]
        assert [len(rank) for rank in ranks] == [batches] * world_size
        seen = Counter(image_id for rank in ranks for batch in rank for image_id in batch)
        assert max(seen.values()) == 1 and len(seen) == batches * world_size * 2
        orders.append(ranks)
    assert orders[0] != orders[1] != orders[2]


def test_any_image_may_be_left_out(shards: Path) -> None:
    data, left_out = small_data(shards), Counter()
    for epoch in range(60):
        data.set_epoch(epoch)
        left_out.update(set(range(IMAGES)).difference(data.training_rows(20).tolist()))
    assert sum(left_out.values()) == 180 and len(left_out) == IMAGES


def test_one_process_without_rest_sees_every_image(shards: Path) -> None:
    assert sorted(chain(*drawn(small_data(shards), 0, batch_size=1))) == small_data(shards).ids


def test_more_workers_than_shards(write: Write) -> None:
    data = small_data(write('--shard_size', '100'))
    ranks = [drawn(data, 0, workers=2, rank=rank, world_size=3, batch_size=2) for rank in range(3)]
    assert len({image_id for rank in ranks for batch in rank for image_id in batch}) == 18


@pytest.mark.parametrize(
    ('workers', 'batch_size', 'world_size'), [(0, 1, 1), (0, 3, 2), (1, 3, 2), (2, 3, 1), (2, 2, 3)]
)
def test_any_batch_can_be_the_first(shards: Path, workers: int, batch_size: int, world_size: int) -> None:
    """The loader of a new process goes on as if undisturbed."""
    place = {'workers': workers, 'batch_size': batch_size, 'world_size': world_size, 'rank': world_size - 1}
    whole = drawn(small_data(shards), 2, **place)
    for start in range(len(whole) + 1):
        assert drawn(small_data(shards), 2, start, **place) == whole[start:], start


@pytest.mark.parametrize('workers', [0, 2])
def test_lively_workers_start_anywhere_too(shards: Path, workers: int) -> None:
    """Pixels as well; the start is forgotten with the epoch."""
    data = small_data(shards, transforms=DETRAugmentation(64).transforms('train'))
    loader = build_shard_loader(data, 2, workers, True, 0, 1)
    epochs = {}
    for epoch in (0, 1):
        data.set_epoch(epoch)
        epochs[epoch] = list(loader)
        assert len(epochs[epoch]) == len(loader) == IMAGES // 2
    for epoch, start in ((1, 5), (0, 0), (0, 10)):
        data.set_epoch(epoch)
        data.start_at(start)
        for (ours, targets), (theirs, _) in zip(loader, epochs[epoch][start:], strict=True):
            assert torch.equal(ours.tensors, theirs.tensors)
            assert all(len(target['boxes']) == len(target['labels']) for target in targets)


def test_skipped_images_are_not_decoded_and_their_shards_not_opened(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, opened, decoded = small_data(shards, buffer=2), [], []
    read_shard, decode = ShardedCoco._read_shard, ShardedCoco.decoded
    monkeypatch.setattr(
        ShardedCoco, '_read_shard', lambda self, *a: opened.append(a[0]) or read_shard(self, *a)
    )
    monkeypatch.setattr(ShardedCoco, 'decoded', lambda self, *a: decoded.append(a[0]) or decode(self, *a))
    drawn(data, 0, start=5)
    assert len(decoded) == 6
    assert len(opened) <= 3


def test_pool_shuffles_every_position_once() -> None:
    for length, capacity in ((10, 3), (3, 10), (1, 1), (7, 1)):
        pool = ShufflePool(length, capacity, random.Random(0))
        order = [pool.draw() for _ in range(length)]
        assert sorted(order) == list(range(length))
        assert capacity > 1 or order == sorted(order)
        assert all(position < place + capacity for place, position in enumerate(order))


def test_copy_paste_takes_what_the_buffer_holds(shards: Path) -> None:
    """Each image beside another one of the stream: the same after a start in the middle."""
    options = {'mix': LargeScaleJitter(64), 'return_masks': None, 'reading': Reading(drop_tiny=True)}
    data = small_data(shards, **options)
    assert data.return_masks
    loader = build_shard_loader(data, 2, 0, True, 0, 1)
    whole = list(loader)
    assert sum(len(target['boxes']) for _, targets in whole for target in targets) > 0
    for start in (1, 6, 10):
        data.start_at(start)
        for (ours, targets), (theirs, expected) in zip(loader, whole[start:], strict=True):
            assert torch.equal(ours.tensors, theirs.tensors)
            assert all(torch.equal(a['boxes'], b['boxes']) for a, b in zip(targets, expected, strict=True))


def test_without_segmentations_nothing_is_pasted(files: Path, write: Write, tmp_path: Path) -> None:
    data = json.loads((files / 'annotations/instances_val.json').read_text())
    data['annotations'][0]['segmentation'] = []
    (tmp_path / 'some.json').write_text(json.dumps(data))
    place = write('--ann', str(tmp_path / 'some.json'))
    assert small_data(place, return_masks=None).return_masks is False
    with pytest.raises(ValueError, match='without segmentation'):
        small_data(place, return_masks=True)


@pytest.mark.parametrize('world_size', [1, 2, 3, 30])
@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_evaluation_sees_every_image_once(shards: Path, world_size: int, workers: int) -> None:
    """In the same batches for any number of processes; those that would have a batch less than others share
    one.
    """
    if world_size == 30 and workers:
        pytest.skip('the same, slowly')
    data = small_data(shards)
    for batch_size in (1, 2, 4):
        place = {'workers': workers, 'world_size': world_size, 'batch_size': batch_size, 'train': False}
        ranks = [drawn(data, 0, rank=rank, **place) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        seen = Counter(image_id for batches in ranks for batch in batches for image_id in batch)
        assert sorted(seen) == data.ids
        single = drawn(data, 0, **(place | {'world_size': 1, 'workers': 0}))
        assert all(batch in single for batches in ranks for batch in batches)
        assert world_size > 1 or max(seen.values()) == 1


def test_evaluation_gives_the_numbers_of_files(files: Path, shards: Path) -> None:
    stats = []
    for data, loader in (
        (theirs := from_files(files), DataLoader(theirs, None)),
        (ours := small_data(shards), ShardStream(ours, 2, False, 0, 1)),
    ):
        evaluator = CocoEvaluator(data.ground_truth, data.class_map)
        for _, target in loader:
            count = len(target['labels'])
            result = {
                'scores': torch.linspace(1, 0.5, count),
                'labels': target['labels'],
                'boxes': target['boxes'] + 1,
            }
            evaluator.update({int(target['image_id']): result})
        stats.append(evaluator.summarize().numbers)
    assert stats[0] == stats[1]
    assert 0 < stats[0]['AP'] < 1


def test_shards_may_be_commands(shards: Path, write: Write) -> None:
    """Also those that are left before their end, and those that fail."""
    place = write('--url', f'pipe:cat {shards}/{{file}}')
    assert drawn(small_data(place, allow_pipe=True), 1, workers=1) == drawn(small_data(shards), 1, workers=1)
    assert_items_equal(small_data(place, allow_pipe=True)[4], small_data(shards)[4])
    failing = write('--url', 'pipe:cat nowhere/{file} 2> /dev/null')
    with pytest.raises(ValueError, match=r'shard pipe:cat nowhere/00000\d.tar .*make_shards'):
        drawn(small_data(failing, allow_pipe=True), 0)


@pytest.mark.slow
def test_spawned_workers_follow_the_epoch(shards: Path) -> None:
    data = small_data(shards)
    stream = ShardStream(data, 2, True, 0, 1)
    loader = DataLoader(stream, None, num_workers=1, multiprocessing_context='spawn', persistent_workers=True)
    for epoch in (0, 1):
        data.set_epoch(epoch)
        data.start_at(3)
        found = [int(target['image_id']) for _, target in loader]
        assert found == list(chain(*drawn(small_data(shards), epoch, 3, batch_size=2)))


def rewrite(shard: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """The members of a shard by `change`; the index is told the new size."""
    with tarfile.open(shard) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(shard, 'w') as tar:
        for name, data in members:
            if (data := change(name, data)) is not None:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    tell_size(shard)


def tell_size(shard: Path) -> None:
    place = shard.with_name('shards.json')
    index = json.loads(place.read_text())
    index['shards'][int(shard.stem)]['bytes'] = shard.stat().st_size
    place.write_text(json.dumps(index))


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-12_000])
    tell_size(shard)


def is_first(name: str) -> bool:
    return name.startswith(f'{3:012d}')


BROKEN = {
    'cut': (cut, 'cannot be read|holds 3 images'),
    'no tar': (lambda shard: (shard.write_bytes(b'no tar' * 1000), tell_size(shard)), 'cannot be read'),
    'no image': (
        lambda shard: rewrite(shard, lambda name, data: data if name.endswith('json') else b'no image'),
        r'shard .*000000.tar: 0+\d*3.\w+ is not a readable image',
    ),
    'one less': (
        lambda shard: rewrite(shard, lambda n, data: None if n > f'{33:012d}' else data),
        'holds 3 images',
    ),
    'another': (
        lambda shard: rewrite(shard, lambda name, data: None if is_first(name) else data),
        r'has image 000000000013 where .* has 3|holds 3 images',
    ),
    'no annotations': (
        lambda shard: rewrite(shard, lambda name, data: b'{' if name.endswith('json') else data),
        'has bad annotations',
    ),
    'no json': (
        lambda shard: rewrite(shard, lambda name, data: None if name.endswith('json') else data),
        'not an image and a json',
    ),
}


@pytest.mark.parametrize(('damage', 'message'), BROKEN.values(), ids=BROKEN)
def test_broken_shards_are_named(write: Write, damage: Callable, message: str) -> None:
    place = write()
    damage(place / '000000.tar')
    with pytest.raises(ValueError, match=message) as error:
        drawn(small_data(place), 0)
    assert '000000.tar' in str(error.value)


@pytest.mark.parametrize('mix', [None, LargeScaleJitter(64)])
def test_an_unreadable_image_is_replaced_by_one_of_the_buffer(
    write: Write, tmp_path: Path, mix: LargeScaleJitter | None
) -> None:
    """The same one after a start in the middle. Every epoch has it once."""
    place = write()
    rewrite(
        place / '000000.tar',
        lambda name, data: b'no image' if is_first(name) and 'json' not in name else data,
    )
    data = small_data(place, mix=mix)
    data.unreadable = UnreadableImages(tmp_path / 'list.txt', 1)
    whole = drawn(data, 0)
    seen = Counter(chain(*whole))
    assert seen.total() == 21 and seen[3] == 0 and max(seen.values()) <= 2
    assert all(drawn(data, 0, start) == whole[start:] for start in (1, 4, 6))
    assert data.unreadable.names() == ['image 3']
    assert 'is not a readable image' in (tmp_path / 'list.txt').read_text()


def test_an_index_that_contradicts_itself_or_the_folder_is_refused(write: Write, tmp_path: Path) -> None:
    place = write()
    with pytest.raises(FileError, match=r'no index .*make_shards'):
        ShardedCoco(str(tmp_path / 'nothing'))
    index = json.loads((place / 'shards.json').read_text())
    for change, message in (
        ({'images': 24}, 'shards have 23 images, the total is 24'),
        ({'version': 9}, r'9.*version'),
        ({'image_ids': [3] * IMAGES}, 'id twice'),
        ({'shards': None}, 'is not an index'),
        ({'categories': []}, 'no categories'),
    ):
        (place / 'other.json').write_text(json.dumps(index | change))
        with pytest.raises(ValueError, match=message):
            ShardedCoco(str(place / 'other.json'))
    (place / '000001.tar').write_bytes(b'short')
    with pytest.raises(
        ValueError, match=r'000001.tar has 5 bytes, but .*shards.json says \d+: .*make_shards'
    ):
        ShardedCoco(str(place))
    (place / '000001.tar').unlink()
    with pytest.raises(FileError, match=r'000001.tar .* does not exist: .*make_shards'):
        ShardedCoco(str(place))


def test_start_beyond_the_epoch_is_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match='batch 8 of an epoch of 7'):
        drawn(small_data(shards), 0, start=8)
    with pytest.raises(ValueError, match='batch -1'):
        small_data(shards).start_at(-1)


def test_nothing_is_overwritten_and_nothing_is_left_half(files: Path, write: Write, tmp_path: Path) -> None:
    (tmp_path / 'shards1').mkdir()
    with pytest.raises(ValueError, match='--shard_size few'):
        write('--shard_size', 'few')
    with pytest.raises(ValueError, match=r'--url x needs \{file\}'):
        write('--url', 'x')
    (tmp_path / 'shards1/mine').touch()
    with pytest.raises(ValueError, match='shards1 exists'):
        write()
    data = json.loads((files / 'annotations/instances_val.json').read_text())
    data['images'][20]['width'] += 1
    (tmp_path / 'wrong.json').write_text(json.dumps(data))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match='the boxes would be wrong'):
        write('--ann', str(tmp_path / 'wrong.json'))
    data['annotations'][0]['bbox'] = [1, 2, 3]
    (tmp_path / 'wrong.json').write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r'annotation 1 .* has bbox'):
        write('--ann', str(tmp_path / 'wrong.json'))
    assert sorted(tmp_path.iterdir()) == before


def test_an_empty_folder_may_be_there(write: Write, tmp_path: Path) -> None:
    (tmp_path / 'shards1').mkdir()
    assert write() == tmp_path / 'shards1'
    assert len(small_data(tmp_path / 'shards1')) == IMAGES


def test_other_classes_are_refused(shards: Path) -> None:
    other = ClassMap.from_categories([{'id': 7, 'name': 'dog'}])
    with pytest.raises(ValueError, match=r'shards.json: category 7 is "cat" here'):
        small_data(shards, class_map=other)


def test_shards_have_a_size_in_bytes_too(write: Write) -> None:
    assert len(list(write('--shard_size', '1MB').glob('*.tar'))) == 1
    assert make_shards.shard_limit('2gb') == {'maxcount': sys.maxsize, 'maxsize': 2 * 10**9}


def test_same_data_same_bytes(write: Write) -> None:
    first, second = write(), write()
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_missing_webdataset_is_named(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'webdataset', None)
    with pytest.raises(ValueError, match='pip install webdataset'):
        small_data(shards)


def arguments(*flags: str) -> Namespace:
    return main.get_args_parser().parse_args(flags)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--batches aspect', '--batches aspect chooses the images of a batch'),
        ('--dataset_file lvis', 'leave --dataset_file lvis out'),
        ('--train_images a', 'tar shards hold their images'),
        ('--shard_buffer 0', '--shard_buffer must be at least 1'),
    ],
)
def test_flags_that_make_no_sense_are_refused(shards: Path, flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settle(arguments('--train_ann', str(shards), *flags.split()), (DATA, RUN))


@pytest.mark.parametrize('aug', ['detr', 'co_detr', 'lsj'])
@pytest.mark.parametrize('image_set', ['train', 'val'])
def test_flags_build_what_they_build_of_files(files: Path, shards: Path, aug: str, image_set: str) -> None:
    recipe = ['--aug', aug, '--img_size', '64']
    ours = build_data(image_set, arguments(f'--{image_set}_ann', str(shards), *recipe))
    paths = [f'--{image_set}_images={files}/val', f'--{image_set}_ann={files}/annotations/instances_val.json']
    theirs = build_data(image_set, arguments(*paths, *recipe))
    assert (ours.ids, ours.return_masks, ours.reading) == (theirs.ids, theirs.return_masks, ours.reading)
    assert (ours.mix is None) == (theirs.mix is None)
    if aug != 'lsj':
        assert_items_equal(ours[0], theirs[0])


@pytest.mark.draws
def test_a_run_from_shards(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Trains, evaluates and draws."""
    flags = f'--dataset_file coco --train_ann {shards} --val_ann {shards}/shards.json --epochs 1'
    main.main(arguments(*TINY.split(), *flags.split(), '--output_dir', str(tmp_path / 'run')))
    text = capsys.readouterr().out
    assert 'coco, 23 train, 23 val' in text
    assert '5 an epoch' in text
    rows = [json.loads(line) for line in (tmp_path / 'run/log.jsonl').read_text().splitlines()]
    assert [row['images'] for row in rows] == [20]
    assert (tmp_path / 'run/predictions.png').is_file()


@pytest.mark.slow
def test_runs_from_shards_repeat_and_are_evaluated_as_from_files(
    files: Path, shards: Path, tmp_path: Path
) -> None:
    flags = f'--dataset_file coco --train_ann {shards} --val_ann {shards} --num_workers 2'.split()
    two = ['--epochs', '2', '--eval_every', '2']
    main.main(arguments(*TINY.split(), *flags, *two, '--output_dir', str(tmp_path / 'a')))
    main.main(arguments(*TINY.split(), *flags, *two, '--epochs', '1', '--output_dir', str(tmp_path / 'b')))
    main.main(arguments(*TINY.split(), *flags, *two, '--resume', 'auto', '--output_dir', str(tmp_path / 'b')))
    checkpoints = [torch.load(tmp_path / name / 'checkpoint.pth', weights_only=True) for name in 'ab']
    assert_same(*checkpoints)
    more = ['--dataset_file', 'coco', '--eval', '--resume', str(tmp_path / 'a/checkpoint.pth')]
    more += ['--coco_path', str(files), '--output_dir', str(tmp_path / 'eval')]
    main.main(arguments(*TINY.split(), *more))
    last = json.loads((tmp_path / 'a/log.jsonl').read_text().splitlines()[-1])
    found = json.loads((tmp_path / 'eval/eval.json').read_text())
    assert found['per_class'] == last['per_class']
    assert found['test_coco_eval_bbox'] == last['test_coco_eval_bbox']
