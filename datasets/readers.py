"""How a run reads its images: what flags say, and what files show. It is settled once, at the start."""

from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasets.coco_json import Issues
from datasets.headers import Survey, evenly, find_range
from datasets.image_dataset import ImageDataset
from datasets.image_io import ImageReader, UnreadableImage, is_flat
from util.config.flags import FLAGS
from util.config.rules import range_problem
from util.config.settle import Settled, check_values
from util.errors import UserError

READING = ('exif', 'upright', 'pixel_range')  # flags
MOST_DECODED = 16  # images of a part that are looked at when a run starts


def add_reader_args(parser: ArgumentParser, default: str = '') -> None:
    """Declare --exif and --pixel_range for a tool; default: in words, what holds in place of their defaults."""
    for flag in (FLAGS['exif'], FLAGS['pixel_range']):
        (replace(flag, default=None, unset=default) if default else flag).add_to(parser)


def build_reader(settings: object) -> ImageReader:
    """Build the reader of flags, or of settings of the same names; missing ones have their defaults.

    Raises:
        UserError: a value has no meaning.
    """
    values = {name: getattr(settings, name, None) for name in READING}
    check_values(values, [FLAGS[name] for name in READING])
    if problem := range_problem(values['pixel_range']):
        raise UserError(problem)
    limits = tuple(values['pixel_range']) if values['pixel_range'] else None
    return ImageReader(values['exif'] or 'auto', values['upright'] is not False, limits)


def find_reading(settings: Any, surveys: Sequence[Survey]) -> dict[str, Any]:
    """Return the flags `upright` and `pixel_range`, as files show them where they are not given.

    upright: most images whose annotated size shows it are meant so; None: no image depends on it.
    """
    found = {'upright': settings.upright, 'pixel_range': settings.pixel_range}
    rows = [row for survey in surveys for row in survey.readable]
    if settings.exif == 'auto' and settings.upright is None:
        shown = [header.is_upright_in(size) for _, size, header in rows if header.orientation != 1]
        shown += [survey.upright for survey in surveys if survey.upright is not None]
        if shown:
            found['upright'] = shown.count(True) >= shown.count(False)
    if settings.pixel_range is None:
        known = [survey.pixel_range for survey in surveys if survey.pixel_range]
        deep = [path for path, _, header in rows if header.is_deep]
        limits = find_range(deep) if deep else next(iter(known), None)
        found['pixel_range'] = limits and list(limits)
    return found


def settle_reading(args: Settled, datasets: Mapping[str, ImageDataset]) -> dict[str, Any]:
    """Let the datasets of a run read their images as flags and files say, and print what is found.

    Returns the flags of `find_reading`.
    """
    found = find_reading(args, [dataset.survey for dataset in datasets.values()])
    use_readers(args.but(**found), datasets.values())
    for part, dataset in datasets.items():
        for line in describe_headers(dataset.survey, dataset.reader):
            print(f'{part} {line}')
        for line in find_flat(dataset.survey, dataset.reader):
            print(f'warning: {part} {line}', flush=True)
    return found


def use_readers(settings: object, datasets: Iterable[ImageDataset]) -> None:
    """Let datasets read their images as flags say."""
    for dataset in datasets:
        dataset.use_reader(build_reader(settings))


def describe_headers(survey: Survey, reader: ImageReader) -> list[str]:
    """Return sentences about the images that EXIF data turn, and about deep ones."""
    issues = Issues()
    for path, size, header in survey.readable:
        if header.orientation != 1:
            is_turned = reader.turn(header, size) != 1
            kind = (
                f'images {"turned by" if is_turned else "as they are stored, not turned by"} their EXIF data'
            )
            if reader.exif == 'auto':
                shown = header.is_upright_in(size) is not None
                reason = (
                    'as their annotated sizes ask for'
                    if shown
                    else 'which their sizes neither ask for nor forbid'
                )
                kind += f', {reason}'
            issues.add(kind, path.name)
        if header.is_deep and reader.pixel_range:
            low, high = reader.pixel_range
            issues.add(f'images of more than 8 bits: {low:g} is black and {high:g} white in them', path.name)
    return issues.lines()


def find_flat(survey: Survey, reader: ImageReader) -> list[str]:
    """Return a sentence if images of a sample are nearly of one value."""
    issues, sample = Issues(), evenly(survey.readable, MOST_DECODED)
    for path, size, _ in sample:
        try:
            if is_flat(reader.read(path, size)):
                issues.add(
                    f'of {len(sample)} images that were looked at are nearly of one value: look at them, and '
                    'give --pixel_range if they have more than 8 bits',
                    path.name,
                )
        except UnreadableImage:
            continue  # reported elsewhere
    return issues.lines()
