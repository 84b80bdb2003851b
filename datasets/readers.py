"""The reader of images that flags ask for."""

from argparse import ArgumentParser
from dataclasses import replace

from datasets.image_io import ImageReader
from util.config.flags import FLAGS
from util.config.rules import range_problem
from util.config.settle import check_values
from util.errors import UserError

READING = ('exif', 'upright', 'pixel_range')  # flags


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
