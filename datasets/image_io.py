"""
Decode image files to uint8 RGB tensors.

Cameras store photographs as their sensor lies, and how a viewer turns them as the EXIF tag Orientation. Most
annotation tools draw boxes in the image as it is shown; COCO's are drawn in the image as it is stored.
"""

import io
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.ExifTags
import PIL.Image
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from datasets.deep_images import as_bytes, is_deep, stated_range
from datasets.jpeg_end import with_end_marker
from util.errors import FileError

File = str | os.PathLike[str]
SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')  # of image files, in small letters
JPEG_START = b'\xff\xd8\xff'
UNKNOWN = (0, 0)  # height and width that annotations do not have
# What Pillow may open; some other formats start programs (EPS).
FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'PPM', 'WEBP', 'TIFF', 'JPEG2000')
# Pillow's own limit. A JPEG of 1.5 kB can declare so many pixels that its decoder takes 12 GB.
MAX_PIXELS = 2 * (1024**3 // 4 // 3)
FLAT, RARE = 16, 0.001  # of 256 values, and a share of pixels at either end that is not looked at


class UnreadableImage(FileError):
    """An image file is missing, damaged or not an image."""


class Header(NamedTuple):
    """What the header of an image file says.

    height, width: of the stored image. orientation: EXIF's, 1 to 8; 1 without a readable tag. is_deep: it is
    grey of more than 8 bits, and does not say which values are black and white.
    """

    height: int
    width: int
    orientation: int
    is_deep: bool

    def size(self, orientation: int) -> tuple[int, int]:
        """Return (height, width) of the image after it is turned."""
        return (self.width, self.height) if orientation >= 5 else (self.height, self.width)

    def is_upright_in(self, annotated: Sequence[int]) -> bool | None:
        """Return whether the annotated (height, width) shows that it means the image upright.

        False: the image as it is stored. None: both, or neither.
        """
        fits = [tuple(annotated) == self.size(orientation) for orientation in (1, self.orientation)]
        return fits[1] if fits[0] != fits[1] else None


@dataclass(frozen=True)
class ImageReader:
    """How image files become pixels.

    `annotated` is the (height, width) that the annotations have for an image, 0 if they have none.

    Args:
        exif: 'upright' turns images as EXIF's orientation says, 'stored' does not; 'auto' turns those whose
            annotated size fits them only upright, and leaves those that it fits only as they are stored.
        upright: whether 'auto' turns the others.
        pixel_range: values of deep images that become black and white, where their file does not say it;
            None: each image gets its own.
    """

    exif: str = 'auto'
    upright: bool = True
    pixel_range: tuple[float, float] | None = None

    def read(self, path: File, annotated: Sequence[int] = UNKNOWN) -> Tensor:
        """Read an image as uint8 [3, H, W]; all modes of Pillow become RGB.

        The three values of a pixel are adjacent in memory (the strides of a permuted [H, W, 3]).

        Raises:
            UnreadableImage: the file is missing or not a whole image; the message names it.
        """
        with naming(path):
            return self._decoded(Path(path).read_bytes(), annotated)

    def decode(self, name: str, data: bytes, annotated: Sequence[int] = UNKNOWN) -> Tensor:
        """Decode a file's bytes as `read` does; `name` is for messages only."""
        with naming(name):
            return self._decoded(data, annotated)

    def size(self, path: File, annotated: Sequence[int] = UNKNOWN) -> tuple[int, int]:
        """Return the (height, width) of the image that `read` returns, from the file's header."""
        header = read_header(path)
        return header.size(self.turn(header, annotated))

    def turn(self, header: Header, annotated: Sequence[int] = UNKNOWN) -> int:
        """Return the orientation that `read` applies: that of the header, or 1."""
        upright: bool | None = self.exif == 'upright'
        if self.exif == 'auto' and header.orientation != 1:
            upright = header.is_upright_in(annotated)
            upright = self.upright if upright is None else upright
        return header.orientation if upright else 1

    def turn_left(self, file: File | io.BytesIO, annotated: Sequence[int] = UNKNOWN) -> int:
        """Return the orientation with which `turned` makes an image that `read` returns upright."""
        header = read_header(file)
        return 1 if self.turn(header, annotated) == header.orientation else header.orientation

    def _decoded(self, data: bytes, annotated: Sequence[int]) -> Tensor:
        with open_image(io.BytesIO(data)) as image:
            header = header_of(image)
            pixels = decode_stored(image, data, self.pixel_range, header.orientation)
        return turned(pixels, self.turn(header, annotated))


DEFAULT_READER = ImageReader()


def read_header(file: File | io.BytesIO) -> Header:
    """Read the header of an image file.

    Raises:
        UnreadableImage: the file is missing or not an image; the message names it.
    """
    with naming(file), open_image(file) as image:
        return header_of(image)


def header_of(image: PIL.Image.Image) -> Header:
    """Return what the header of an opened image says; nothing is decoded."""
    orientation = orientation_of(image)
    height, width = image.height, image.width
    if image.format == 'TIFF' and orientation >= 5:  # Pillow will turn it
        height, width = width, height
    return Header(height, width, orientation, is_deep(image) and stated_range(image) is None)


def orientation_of(image: PIL.Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8; 1 if the header has no readable one."""
    if image.format == 'TIFF':
        turn = getattr(image, 'tag_v2').get(PIL.ExifTags.Base.Orientation)  # noqa: B009  # of TIFF alone
    elif (data := image.info.get('exif')) is None:
        return 1
    else:
        exif = PIL.Image.Exif()
        try:
            exif.load(data)
            turn = exif.get(PIL.ExifTags.Base.Orientation)
        except (OSError, SyntaxError, TypeError, ValueError, KeyError, struct.error):
            return 1
    return int(turn) if turn in range(1, 9) else 1


# EXIF's orientation -> how the stored image becomes the shown one: transpose (5 to 8), then mirror these
# dimensions.
MIRRORS = {2: [-1], 3: [-2, -1], 4: [-2], 5: [], 6: [-1], 7: [-2, -1], 8: [-2]}
INVERSE = {6: 8, 8: 6}  # of orientations that are not their own


def turned(pixels: Tensor, orientation: int) -> Tensor:
    """Turn an image [3, H, W], or masks [N, H, W], as an orientation says; strides are those of `read`."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(-2, -1)
    return pixels.flip(MIRRORS[orientation]).permute(1, 2, 0).contiguous().permute(2, 0, 1)


def turned_boxes(boxes_xyxy: Tensor, orientation: int, size: Sequence[int]) -> Tensor:
    """Turn boxes [N, 4] in pixels with their image of (height, width) `size`, as `turned` does."""
    height, width = size
    x0, y0, x1, y1 = boxes_xyxy.unbind(-1)
    if orientation >= 5:
        x0, y0, x1, y1, height, width = y0, x0, y1, x1, width, height
    if -1 in MIRRORS.get(orientation, ()):
        x0, x1 = width - x1, width - x0
    if -2 in MIRRORS.get(orientation, ()):
        y0, y1 = height - y1, height - y0
    return torch.stack([x0, y0, x1, y1], dim=-1)


def turned_sample(
    pixels: Tensor, objects: Mapping[str, Tensor], orientation: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Turn an image [3, H, W] with its `boxes` [N, 4] xyxy in pixels and, if it has them, `masks`."""
    shown = {**objects, 'boxes': turned_boxes(objects['boxes'], orientation, pixels.shape[1:])}
    if 'masks' in objects:  # [N, (1,) H, W]
        shown['masks'] = turned(objects['masks'].flatten(0, -3), orientation)
    return turned(pixels, orientation), shown


def is_flat(pixels: Tensor) -> bool:
    """Return whether nearly all pixels of an image [3, H, W] have nearly the same value."""
    sample = pixels[:, :: max(1, pixels.shape[1] // 128), :: max(1, pixels.shape[2] // 128)].flatten(1)
    shares = torch.tensor([RARE, 1 - RARE], dtype=torch.float32)
    low, high = sample.float().quantile(shares, dim=1)
    return bool((high - low < FLAT).all())


def open_image(file: File | io.BytesIO) -> PIL.Image.Image:
    """Open an image of one of FORMATS with Pillow, which reads the header alone.

    Raises:
        PIL.Image.DecompressionBombError: it has more than MAX_PIXELS.
    """
    image = PIL.Image.open(file, formats=FORMATS)
    check_pixels(image.height, image.width)
    return image


def check_pixels(height: int, width: int) -> None:
    """Raise PIL.Image.DecompressionBombError for more than MAX_PIXELS; `naming` converts it."""
    if height * width > MAX_PIXELS:
        raise PIL.Image.DecompressionBombError(f'{height} x {width} pixels')


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Turn an error of a file or of its decoder inside the block into UnreadableImage, which names the file."""
    try:
        yield
    except PIL.Image.DecompressionBombError as error:
        raise UnreadableImage(
            f'{path} is not a readable image ({error}): at most {MAX_PIXELS:,} pixels are decoded; cut it '
            'into tiles'
        ) from error
    except (OSError, SyntaxError, TypeError, ValueError, LookupError, EOFError, struct.error) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system
            raise UnreadableImage(f'{path} cannot be read ({error.strerror})') from error
        # Pillow's text for an unknown format has a place in memory.
        reason = 'of no known format' if isinstance(error, PIL.UnidentifiedImageError) else error
        raise UnreadableImage(
            f'{path} is not a readable image ({reason}): fetch it again, or remove it'
        ) from error


def decode_stored(
    image: PIL.Image.Image, data: bytes, pixel_range: tuple[float, float] | None, orientation: int
) -> Tensor:
    """Decode an image as it is stored: JPEGs with torchvision, and with Pillow what torchvision refuses.

    Their pixels are equal, and torchvision is faster.

    Args:
        image: opened from `data`.
        orientation: of its header.
    """
    if data.startswith(JPEG_START):
        try:
            pixels = decode_jpeg(
                torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED
            )
        except RuntimeError:
            if whole := with_end_marker(data):
                with open_image(io.BytesIO(whole)) as opened:
                    return decode_stored(opened, whole, pixel_range, orientation)
            return decode_with_pillow(image, pixel_range)
        if pixels.shape[0] == 3:
            return pixels
        if pixels.shape[0] == 1:
            return as_rgb(pixels[0])
    pixels = decode_with_pillow(image, pixel_range)
    if image.format == 'TIFF':  # Pillow has turned it
        return turned(pixels, INVERSE.get(orientation, orientation))
    return pixels


def decode_with_pillow(image: PIL.Image.Image, pixel_range: tuple[float, float] | None) -> Tensor:
    image.info.pop('xmp', None)  # by whose orientation Pillow would turn TIFF, and no viewer does
    if is_deep(image):  # Pillow's own conversion would cut 16 bits off at 255
        return as_rgb(torch.from_numpy(as_bytes(image, pixel_range)))
    return torch.from_numpy(np.array(image.convert('RGB'))).permute(2, 0, 1)


def as_rgb(grey: Tensor) -> Tensor:
    """Repeat a grey image [H, W] as [3, H, W]."""
    return grey[:, :, None].expand(-1, -1, 3).contiguous().permute(2, 0, 1)
