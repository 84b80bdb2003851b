"""
Decode image files to uint8 RGB tensors.

EXIF rotation is ignored, because COCO's boxes are drawn on the stored pixels.
"""

import io
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from util.errors import FileError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')  # of image files, in small letters
JPEG_START = b'\xff\xd8\xff'
UNKNOWN = (0, 0)  # height and width that annotations do not have
# What Pillow may open; some other formats start programs (EPS).
FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'PPM', 'WEBP', 'TIFF', 'JPEG2000')
# Pillow's own limit. A JPEG of 1.5 kB can declare so many pixels that its decoder takes 12 GB.
MAX_PIXELS = 2 * (1024**3 // 4 // 3)


class UnreadableImage(FileError):
    """An image file is missing, damaged or not an image."""


@dataclass(frozen=True)
class ImageReader:
    """How image files become pixels.

    `annotated` is the (height, width) that the annotations have for an image, 0 if they have none.
    """

    def read(self, path: str | os.PathLike[str], annotated: Sequence[int] = UNKNOWN) -> Tensor:
        """Read an image as uint8 [3, H, W]; all modes of Pillow become RGB, 16-bit grey by its upper byte.

        The three values of a pixel are adjacent in memory (the strides of a permuted [H, W, 3]).

        Raises:
            UnreadableImage: the file is missing or not a whole image; the message names it.
        """
        with naming(path):
            return decode_image(Path(path).read_bytes())

    def decode(self, name: str, data: bytes, annotated: Sequence[int] = UNKNOWN) -> Tensor:
        """Decode a file's bytes as `read` does; `name` is for messages only."""
        with naming(name):
            return decode_image(data)

    def size(self, path: str | os.PathLike[str], annotated: Sequence[int] = UNKNOWN) -> tuple[int, int]:
        """Return the (height, width) of the image that `read` returns, from the file's header."""
        with naming(path), open_image(path) as image:
            return image.height, image.width


DEFAULT_READER = ImageReader()


def orientation(path: str | os.PathLike[str]) -> int:
    """Return the EXIF tag Orientation, 1 to 8: how a viewer turns the image that `read_image` returns.

    It is 1 (not turned) if the header has no readable tag, and for TIFF, which Pillow turns itself.
    """
    with naming(path), open_image(path) as image:
        data = None if image.format == 'TIFF' else image.info.get('exif')
    exif = PIL.Image.Exif()
    try:
        exif.load(data or b'')
        turn = exif.get(PIL.ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, TypeError, ValueError, KeyError, struct.error):
        return 1
    return turn if turn in range(1, 9) else 1


def open_image(file: str | os.PathLike[str] | io.BytesIO) -> PIL.Image.Image:
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
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an error of a file or of its decoder inside the block into UnreadableImage, which names the file."""
    try:
        yield
    except PIL.Image.DecompressionBombError as error:
        raise UnreadableImage(
            f'{path} is not a readable image ({error}): at most {MAX_PIXELS:,} pixels are decoded; cut it '
            'into tiles'
        ) from error
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system
            raise UnreadableImage(f'{path} cannot be read ({error.strerror})') from error
        raise UnreadableImage(
            f'{path} is not a readable image ({error}): fetch it again, or remove it'
        ) from error


def decode_image(data: bytes) -> Tensor:
    """Decode JPEGs with torchvision (equal pixels, faster), and with Pillow what torchvision refuses."""
    if data.startswith(JPEG_START):
        open_image(io.BytesIO(data))  # for the number of pixels
        try:
            image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
        except RuntimeError:
            return decode_with_pillow(data)
        if image.shape[0] == 3:
            return image
        if image.shape[0] == 1:
            return image[0, :, :, None].expand(-1, -1, 3).contiguous().permute(2, 0, 1)
    return decode_with_pillow(data)


def decode_with_pillow(data: bytes) -> Tensor:
    with open_image(io.BytesIO(data)) as opened:
        image = opened
        if opened.mode.startswith('I'):  # Pillow's own conversion would cut 16 bits off at 255
            image = PIL.Image.fromarray((np.asarray(opened).clip(0, 65535) >> 8).astype(np.uint8))
        pixels = np.array(image.convert('RGB'))
    return torch.from_numpy(pixels).permute(2, 0, 1)
