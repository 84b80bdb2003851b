"""
Images streamed from tar shards (tools/make_shards.py) instead of files. Items are the same; the order reads
every shard from its beginning.

An epoch is planned as row numbers before any shard is opened: shards in random order, a run of their images
per rank and worker, and a shuffle buffer in each worker. The stream can therefore begin at any batch: the
plan is followed without reading, and only the images then in the buffer are fetched.

The second image of --aug lsj comes from that buffer as well, because any other would cost the reading of its
shard. It differs from the one that files would give, and depends on the numbers of ranks and workers. A
stream that begins later has the same one.
"""

import io
import math
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count, groupby

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datasets.annotations import AnnotationTable, Inventory, read_columns
from datasets.build import DataSettings
from datasets.class_map import ClassMap, names_by_id
from datasets.coco import annotation_options, objects_of
from datasets.coco_json import Annotations, Issues, check_categories, errors_in, read_annotations
from datasets.deep_images import WHOLE
from datasets.headers import Survey
from datasets.image_dataset import ImageDataset, Mix, loader_options
from datasets.image_io import DEFAULT_READER, ImageReader
from datasets.inventory import find_unusual_boxes
from datasets.samplers import EvalBatches
from datasets.shard_index import (
    ANNOTATIONS,
    WRITE_AGAIN,
    import_webdataset,
    index_file,
    read_index,
    read_samples,
)
from datasets.targets import AS_DETR, Objects, Reading, check_size, is_trained_on, make_target
from datasets.transforms import Sample, Transform
from util.errors import UserError
from util.seeding import mixed

SHUFFLE_BUFFER = 1000  # images; about 160 MB of COCO's files a worker


class Record(msgspec.Struct):
    """What the JSON of an image must hold."""

    annotations: list[msgspec.Raw]


@dataclass(frozen=True)
class StoredImage:
    """Image as its shard stores it. row: of the index. name: for messages. record: JSON, see make_shards."""

    row: int
    name: str
    image: bytes
    record: bytes


class ShardedCoco(ImageDataset):
    """Items of `CocoDetection`, with the same indices: image i is the i-th in order of id.

    Training reads it through `ShardStream`. Indexing works, but reads a shard up to the image. place: index
    or its folder. return_masks: None reads masks if every object has a segmentation. buffer: images that a
    worker shuffles. allow_pipe: take shards that are commands.
    problems: where `inventory` counts what is invalid; None: there is no inventory.
    """

    def __init__(
        self,
        place: str,
        transforms: Transform | None = None,
        class_map: ClassMap | None = None,
        return_masks: bool | None = False,
        seed: int = 0,
        reading: Reading = AS_DETR,
        mix: Mix | None = None,
        buffer: int = SHUFFLE_BUFFER,
        allow_pipe: bool = False,
        problems: Issues | None = None,
        reader: ImageReader = DEFAULT_READER,
    ) -> None:
        super().__init__(transforms, mix, seed)
        self.problems = problems
        import_webdataset()
        self.index_file, self.reading, self.buffer = index_file(place), reading, buffer
        index = read_index(place, allow_pipe)
        self.survey = Survey(upright=index.upright, pixel_range=index.pixel_range)
        self.use_reader(reader)
        if class_map is not None:
            with errors_in(self.index_file):
                check_categories(names_by_id(index.categories), class_map)
        self.class_map = class_map or ClassMap.numbered(index.categories, self.reading.class_ids)
        self.urls = [shard.url for shard in index.shards]
        self.bounds = np.cumsum([0, *(shard.images for shard in index.shards)])  # rows of the index
        self._row_ids = np.array(index.image_ids, dtype=np.int64)  # [rows]
        self._row_sizes = np.array(index.sizes, dtype=np.int64)  # [rows, 2]
        self.is_used = self._row_sizes.min(axis=1) >= self.reading.min_image_side  # [rows]
        rows = np.flatnonzero(self.is_used)
        if not len(rows):
            raise UserError(f'all images of {place} have a side below {self.reading.min_image_side} pixels')
        self._rows = rows[np.argsort(self._row_ids[rows])]  # [N], the row of image i
        self.ids: list[int] = self._row_ids[self._rows].tolist()
        unsegmented = set(index.unsegmented).intersection(self.ids)
        if return_masks and unsegmented:
            raise UserError(f'{self.index_file}: image {min(unsegmented)} has an object without segmentation')
        self.return_masks = not unsegmented if return_masks is None else return_masks
        self._start = torch.zeros((), dtype=torch.int64).share_memory_()  # as the epoch

    def use_reader(self, reader: ImageReader) -> None:
        """Read images by this reader; where their sizes do not show how, as the index says.

        An older index says nothing: its images were read as they are stored, and by their upper byte.
        """
        pixel_range = reader.pixel_range or self.survey.pixel_range or (0, WHOLE)
        super().use_reader(replace(reader, upright=bool(self.survey.upright), pixel_range=pixel_range))

    @cached_property
    def ground_truth(self) -> Annotations:
        """Return the annotation file beside the index."""
        return read_annotations(self.index_file.with_name(ANNOTATIONS))

    def inventory(self) -> Inventory | None:
        """Return what the annotation file beside the index has, if `problems` are counted."""
        file = self.index_file.with_name(ANNOTATIONS)
        if self.problems is None or not file.is_file():
            return None
        table = AnnotationTable(file, self.class_map, problems=self.problems)
        images = np.flatnonzero(np.isin(table.image_ids, self.ids))
        if len(images) < len(self.ids):
            raise UserError(f'{file} lacks images of {self.index_file}: {WRITE_AGAIN}')
        rows, starts = objects_of(table, images, self.reading)
        find_unusual_boxes(table.issues, table, images, rows)
        objects = Objects.of(table.objects[rows], self.class_map, None)
        return Inventory(
            objects.boxes_xywh.numpy(),
            objects.labels.numpy(),
            np.diff(starts),
            table.sizes[images],
            self.index_file.parent,
            list(table.file_names.chosen(images)),
            table.issues,
            self.problems,
        )

    @property
    def position(self) -> tuple[int, int]:
        """Return the epoch, and the batch with which the stream begins."""
        return int(self._epoch), int(self._start)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from its first batch on; running workers see it too."""
        super().set_epoch(epoch)
        self._start.fill_(0)

    def start_at(self, batch: int) -> None:
        """Begin the current epoch with this batch (0 = the first); holds until the next `set_epoch`.

        The stream continues as an undisturbed epoch would, if ranks, workers and batch size are the same.
        """
        if batch < 0:
            raise ValueError(f'an epoch cannot start at batch {batch}')
        self._start.fill_(batch)

    def image_sizes(self) -> np.ndarray:
        """Return height and width of all images, [N, 2]."""
        return self._row_sizes[self._rows]

    def untransformed(self, idx: int) -> Sample:
        """Return the image as it is stored, and its objects. This is slow: its shard is read up to it."""
        return self.decoded(next(self.read([int(self._rows[idx])])))

    def pixels(self, idx: int) -> Tensor:
        """Return the image as its shard has it."""
        stored = next(self.read([int(self._rows[idx])]))
        return self.reader.decode(stored.name, stored.image, self._row_sizes[stored.row])

    @property
    def reading_order(self) -> Sequence[int]:
        """Return the indices of the images in the order of the shards."""
        return np.argsort(self._rows).tolist()

    def read_items(self, indices: Sequence[int]) -> Iterator[tuple[int, Sample | Exception]]:
        """Read each shard once. What follows a damaged place in a shard cannot be used."""
        shards = np.searchsorted(self.bounds, self._rows[list(indices)], side='right') - 1
        for shard, group in groupby(zip(shards.tolist(), indices, strict=True), lambda pair: pair[0]):
            waiting, done = [idx for _, idx in group], 0
            try:
                for stored in self._read_shard(shard, self._rows[waiting].tolist()):
                    item: Sample | Exception
                    try:
                        item = self.decoded(stored)
                    except UserError as error:
                        item = error
                    done += 1
                    yield waiting[done - 1], item
            except UserError as error:
                yield from ((idx, error) for idx in waiting[done:] or waiting[-1:])

    def turn_left(self, idx: int) -> int:
        """Return the orientation with which `image_io.turned` makes image idx upright. This is slow too."""
        row = int(self._rows[idx])
        file = io.BytesIO(next(self.read([row])).image)
        return self.reader.turn_left(file, self._row_sizes[row])

    def training_rows(self, total: int) -> np.ndarray:
        """Return [total] rows of the index, shard by shard in the epoch's order; random ones are left out."""
        generator = random.Random(mixed(self.seed, int(self._epoch)))
        shards = generator.sample(range(len(self.urls)), len(self.urls))
        rows = np.concatenate([np.arange(self.bounds[shard], self.bounds[shard + 1]) for shard in shards])
        rows = rows[self.is_used[rows]]
        return np.delete(rows, generator.sample(range(len(rows)), len(rows) - total))

    def read(self, rows: Sequence[int]) -> Iterator[StoredImage]:
        """Yield the images of these rows, which are grouped by shard and ascend. Other shards stay closed.

        Raises:
            UserError: a shard cannot be read, or does not match the index.
        """
        for shard, group in groupby(
            rows, lambda row: int(np.searchsorted(self.bounds, row, side='right')) - 1
        ):
            yield from self._read_shard(shard, list(group))

    def _read_shard(self, shard: int, rows: list[int]) -> Iterator[StoredImage]:
        url, (first, end) = self.urls[shard], self.bounds[shard : shard + 2].tolist()
        needed, num_images = set(rows), 0
        for row, sample in zip(count(first), read_samples(url)):
            num_images += 1
            if row in needed:
                yield self._stored(url, row, sample)
            if row == rows[-1] and row + 1 < end:
                return
        if num_images != end - first:
            raise UserError(
                f'shard {url} holds {num_images} images, but {self.index_file} says {end - first}: '
                f'{WRITE_AGAIN}'
            )

    def _stored(self, url: str, row: int, sample: dict) -> StoredImage:
        members = [name for name in sample if not name.startswith('__')]
        images = [name for name in members if name != 'json']
        key, expected = sample['__key__'], self._row_ids[row]
        if len(images) != 1 or len(members) != 2:
            raise UserError(f'shard {url}: {key} is {members}, not an image and a json: {WRITE_AGAIN}')
        if key != f'{expected:012d}':
            raise UserError(
                f'shard {url} has image {key} where {self.index_file} has {expected}: {WRITE_AGAIN}'
            )
        return StoredImage(row, f'shard {url}: {key}.{images[0]}', sample[images[0]], sample['json'])

    def decoded(self, stored: StoredImage) -> Sample:
        """Decode the image, and read its objects as `CocoDetection` does."""
        image = self.reader.decode(stored.name, stored.image, self._row_sizes[stored.row])
        height, width = image.shape[1:]
        size = self._row_sizes[stored.row]
        check_size(stored.name, (height, width), size, self.index_file, self.reader.exif)
        try:
            segmentations = bytearray() if self.return_masks else None
            annotations = msgspec.json.decode(stored.record, type=Record).annotations
            columns = read_columns(annotations, Issues(), segmentations)
            columns = columns[is_trained_on(self.reading, columns)]
            objects = Objects.of(columns, self.class_map, segmentations)
            return image, make_target(objects, int(self._row_ids[stored.row]), height, width)
        except (ValueError, LookupError, RecursionError) as error:
            raise UserError(f'{stored.name} has bad annotations ({error}): {WRITE_AGAIN}') from error

    def item(self, stored: StoredImage, others: Callable[[], list[StoredImage]]) -> Sample:
        """Return the item that indexing gives.

        others: returns the images from which --aug lsj takes its second one, and that replace an unreadable one.
        """

        def index_of(stored: StoredImage) -> int:
            return bisect_left(self.ids, self._row_ids[stored.row])

        def readable(wanted: StoredImage) -> Sample:
            return self.first_readable(
                wanted, others, self.decoded, lambda stored: self.image_name(index_of(stored))
            )

        return self.transformed(
            index_of(stored), partial(readable, stored), lambda: readable(random.choice(others()))
        )


class ShufflePool:
    """Shuffled order of positions in a run, of which at most `capacity` are held at a time.

    slots: held positions; those from `fresh` on have been drawn, and stay because no position is left to
    replace them. taken: positions held so far.
    """

    def __init__(self, length: int, capacity: int, generator: random.Random) -> None:
        self.length, self.generator = length, generator
        self.slots = list(range(min(length, capacity)))
        self.taken = self.fresh = len(self.slots)

    def draw(self) -> int:
        slot = self.generator.randrange(self.fresh)
        position = self.slots[slot]
        if self.taken < self.length:
            self.slots[slot] = self.taken
            self.taken += 1
        else:
            self.fresh -= 1
            self.slots[slot], self.slots[self.fresh] = self.slots[self.fresh], position
        return position


class ShardStream(IterableDataset):
    """One rank's images of an epoch, for a loader that makes batches of `batch_size`.

    Training: every rank has total // (world_size x batch_size) batches, and each of its workers a run of
    images in the epoch's order of shards. No image is seen twice; the remainder of that division, drawn at
    random, is left out of this epoch. Any number of shards will do: a shard in which a run ends is read by
    both neighbours. Evaluation: as `samplers.EvalBatches`.

    The order depends on the seed, the epoch, and the numbers of ranks, workers and images per batch.
    """

    def __init__(self, data: ShardedCoco, batch_size: int, train: bool, rank: int, world_size: int) -> None:
        self.data, self.batch_size, self.train, self.rank = data, batch_size, train, rank
        self.share = EvalBatches(len(data), batch_size, world_size, rank).images
        if train:
            length = len(data) // world_size // batch_size * batch_size
            self.share = range(rank * length, (rank + 1) * length)  # of the epoch's order
        self.num_batches = math.ceil(len(self.share) / batch_size)
        self.total = len(self.share) * world_size  # images of an epoch of training

    def __len__(self) -> int:
        """Return the number of images of this rank, including those before `start_at`."""
        return len(self.share)

    def worker_run(self, start: int) -> tuple[int, range, int]:
        """Return whose run this loader worker reads, that run, and how many images it has before `start`.

        A loader asks its workers in turn: batch b of a whole epoch is the work of worker b % workers. The
        first worker begins with batch `start`, so the runs are exchanged.
        """
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        owner = (worker + start) % workers
        ends = np.cumsum([0, *(len(range(i, self.num_batches, workers)) for i in range(workers))]).tolist()
        run = self.share[ends[owner] * self.batch_size : ends[owner + 1] * self.batch_size]
        return owner, run, len(range(owner, start, workers)) * self.batch_size

    def __iter__(self) -> Iterator[Sample]:
        data, (epoch, start) = self.data, self.data.position
        if start > self.num_batches:
            raise UserError(f'batch {start} of an epoch of {self.num_batches}: was it begun with other data?')
        owner, run, skipped = self.worker_run(start)
        rows = data.training_rows(self.total) if self.train else np.flatnonzero(data.is_used)
        rows = rows[run.start : run.stop]
        generator = random.Random(mixed(data.seed, epoch, self.rank, owner))
        pool = ShufflePool(len(rows), data.buffer if self.train else 1, generator)
        for _ in range(min(skipped, len(rows))):
            pool.draw()
        needed = sorted({*pool.slots, *range(pool.taken, len(rows))})
        arriving = zip(needed, data.read(rows[needed].tolist()), strict=True)
        held: dict[int, StoredImage] = {}
        for _ in range(len(rows) - skipped):
            drawn = pool.draw()
            for position, stored in arriving:
                held[position] = stored
                if position + 1 >= pool.taken:
                    break
            yield data.item(held[drawn], lambda: [held[position] for position in pool.slots])
            if pool.taken < len(rows):
                del held[drawn]


def build(part: str, settings: DataSettings, class_map: ClassMap | None = None) -> ShardedCoco:
    """Build the 'train' or 'val' part from the shards of --train_ann or --val_ann."""
    place = settings.annotations(part)
    assert place is not None
    options = annotation_options(part, settings, class_map)
    options |= {'buffer': settings.shard_buffer, 'allow_pipe': settings.allow_pipe}
    return ShardedCoco(place, problems=Issues() if settings.check_data else None, **options)


def build_shard_loader(
    dataset: ShardedCoco, batch_size: int, num_workers: int, train: bool, rank: int, world_size: int
) -> DataLoader:
    """Build the loader of a rank. Its length is that of the whole epoch, also after `start_at`."""
    stream = ShardStream(dataset, batch_size, train, rank, world_size)
    return DataLoader(stream, batch_size, drop_last=train, **loader_options(num_workers))
