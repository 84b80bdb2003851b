"""JPEG files that lack their end marker alone, which some cameras and programs leave out."""

import io
import random
import re
from collections.abc import Iterator

import numpy as np
import PIL.Image

END = b'\xff\xd9'
# Codes of segments: start of a frame (two sequential kinds, a progressive one), start of a scan.
SEQUENTIAL, PROGRESSIVE, SCAN = (0xC0, 0xC1), 0xC2, 0xDA
SEGMENT = re.compile(rb'\xff+([\xc0-\xcf\xda-\xfe])(..)', re.DOTALL)  # code, and length with these two bytes
BEHIND_SCAN = re.compile(rb'\xff+[^\x00\xff\xd0-\xd7]')  # any marker but those that divide a scan
NUM_FILLERS = 8
NEEDED = 4  # last bytes without which pixels are missing; the very last one may be of no effect


def with_end_marker(data: bytes) -> bytes | None:
    """Return a JPEG file with the end marker of which it lacks one byte or both.

    Pixels are missing if other bytes in place of the missing ones change the image. The last bytes must be
    needed too, and two zeros are at no end, so that what a disk has behind a part of a file does not pass for
    pixels.

    Returns:
        None: the file has an end marker, or lacks more, or is of a kind that is not known here.
    """
    body = data.rstrip(b'\xff')
    start = last_scan(body)
    if start is None or body.endswith(b'\x00\x00'):
        return None
    shorter = body[:-NEEDED].rstrip(b'\xff')
    return body + END if has_all_pixels(body, start) and not has_all_pixels(shorter, start) else None


def last_scan(data: bytes) -> int | None:
    """Return where the coded pixels of the last scan begin.

    None: the scan does not reach to the end of the file, or the scans lack coefficients of a component.
    """
    missing: dict[int, list[int]] = {}  # component -> number of bits of its 64 coefficients not yet sent
    is_progressive, at = False, 2
    while segment := SEGMENT.match(data, at):
        code, length = segment[1][0], int.from_bytes(segment[2], 'big')
        content, at = data[segment.end() : segment.end() + length - 2], segment.end() + length - 2
        if code in (*SEQUENTIAL, PROGRESSIVE):
            is_progressive = code == PROGRESSIVE
            missing = {component: [1] * 64 for component in content[6::3]}
        if code != SCAN:
            continue
        components, spectrum = content[1:-3:2], content[-3:]
        if len(spectrum) < 3 or not missing.keys() >= set(components):
            return None
        first, last, bits = (spectrum[0], spectrum[1], spectrum[2] & 15) if is_progressive else (0, 63, 0)
        for component in components:
            missing[component][first : last + 1] = [bits] * (last + 1 - first)
        behind = BEHIND_SCAN.search(data, at)
        if behind is None:
            return None if any(map(any, missing.values())) else at
        at = behind.start()
    return None


def has_all_pixels(data: bytes, start: int) -> bool:
    """Return whether bytes behind the last scan, which begins at `start`, change no pixel."""
    image = pixels_or_none(data + END)
    if image is None:
        return False
    others = (pixels_or_none(data + filler + END) for filler in fillers(data[start:]))
    return all(other is not None and np.array_equal(image, other) for other in others)


def fillers(scan: bytes) -> Iterator[bytes]:
    """Yield random bytes that a decoder may take for the rest of a scan, with all beginnings of three bits.

    They have the markers that would divide it, since a decoder skips what comes before the next one.
    """
    dividers = re.findall(rb'\xff([\xd0-\xd7])', scan)
    following = dividers[-1][0] + 1 if dividers else 0
    generator = random.Random(0)
    for number in range(NUM_FILLERS):
        parts = [generator.randbytes(64).replace(b'\xff', b'') for _ in range(8)]
        ends = [bytes([0xFF, 0xD0 + (following + part) % 8]) for part in range(8)]
        yield bytes([number << 5]) + b''.join(part + end for part, end in zip(parts, ends, strict=True))


def pixels_or_none(data: bytes) -> np.ndarray | None:
    """Decode with Pillow, which prints no warnings."""
    try:
        return np.asarray(PIL.Image.open(io.BytesIO(data), formats=('JPEG',)))
    except (OSError, SyntaxError, ValueError):
        return None
