"""
Images of overlapping, textured shapes on cluttered ground, drawn from a seed. Source: this repository.

An image is a pure function of (seed, split, index, size) and has the same bytes on every machine. Random
numbers come unchanged from the frozen stream of np.random.RandomState (NEP 19). The arithmetic is only + - *
/ and square root, which IEEE 754 rounds exactly. Hence rotations come from Pythagorean pairs, not from sines,
and no drawing library is used. datasets/shapes.py turns the objects into targets of a detector.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]

SPLITS = {'train': 0, 'val': 1, 'test': 2}
MAX_OBJECTS = 20
MIN_VISIBLE = 0.25  # an object of which a smaller share is visible stays in the image as clutter


class Dice:
    """Random numbers that are the same on every machine, because only uniform doubles leave the generator.

    NumPy's other methods (normal, uniform, integers) use libm, fused operations or the platform's long.
    """

    def __init__(self, *key: int) -> None:
        self._random = np.random.RandomState(list(key))

    def real(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * self._random.random_sample()

    def integer(self, low: int, high: int) -> int:
        """Draw an integer with low <= result < high."""
        return low + int((high - low) * self._random.random_sample())

    def chance(self, probability: float) -> bool:
        return self._random.random_sample() < probability

    def field(self, *shape: int) -> np.ndarray:
        return self._random.random_sample(shape).astype(np.float32)

    def colour(self, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        return np.array([self.real(low, high) for _ in range(3)], dtype=np.float32)

    def rotation(self) -> tuple[float, float]:
        """Draw (cosine, sine) of any angle, without computing sines: ((1 - t^2), 2 t) / (1 + t^2)."""
        t, sign = self.real(-1, 1), -1.0 if self.chance(0.5) else 1.0
        return sign * (1 - t * t) / (1 + t * t), sign * 2 * t / (1 + t * t)


@dataclass(frozen=True)
class Scene:
    """Drawn image and its objects in painting order; each pixel belongs to at most one object."""

    image: np.ndarray  # [3, H, W] uint8
    kinds: np.ndarray  # [N] int64, indices into KINDS
    boxes_xyxy: np.ndarray  # [N, 4] int64, pixel edges of the visible part: x1 <= x < x2
    areas: np.ndarray  # [N] int64, visible pixels
    masks: np.ndarray  # [N, H, W] bool, the visible part


@dataclass(frozen=True)
class Pose:
    """Position of a shape in the image, in pixels; the shape itself has radius 1 around the origin."""

    x: float
    y: float
    radius: float
    squeeze: float = 1.0  # height over width, in the shape's own frame
    cosine: float = 1.0
    sine: float = 0.0

    def distance(self, x: float, y: float) -> float:
        return math.sqrt((x - self.x) * (x - self.x) + (y - self.y) * (y - self.y))

    def window(self, canvas: np.ndarray, margin: float) -> tuple[slice, slice]:
        """Return the rows and columns of `canvas` that the shape and a margin around it can touch."""
        height, width = canvas.shape[-2:]
        reach = self.radius + margin
        rows = slice(max(0, int(self.y - reach)), max(0, min(height, int(self.y + reach) + 1)))
        return rows, slice(max(0, int(self.x - reach)), max(0, min(width, int(self.x + reach) + 1)))

    def local(self, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return the shape's own coordinates (u, v) at the centres of the window's pixels, both [h, w]."""
        dy = (np.arange(rows.start, rows.stop, dtype=np.float32) + (0.5 - self.y))[:, None] / self.radius
        dx = (np.arange(columns.start, columns.stop, dtype=np.float32) + (0.5 - self.x)) / self.radius
        return self.cosine * dx + self.sine * dy, (self.cosine * dy - self.sine * dx) / self.squeeze


# Shapes: signed distance to the outline, negative inside, in units of the radius; all lie in the unit circle.


def length(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v)  # np.hypot is libm's


def disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return length(u, v) - 1


def ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(length(u, v) - 0.78) - 0.22


def square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - 0.7


def triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u) * (math.sqrt(3) / 2) + v * 0.5, -v) - 0.5


def star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Measure a pentagram by the second largest distance: a point is inside at least four of five lines."""
    cos36, cos72 = (math.sqrt(5) + 1) / 4, (math.sqrt(5) - 1) / 4
    sin36, sin72 = math.sqrt(1 - cos36 * cos36), math.sqrt(1 - cos72 * cos72)
    first, second = v, np.full_like(v, -9.0)
    for cosine, sine in ((cos72, sin72), (cos72, -sin72), (-cos36, sin36), (-cos36, -sin36)):
        line = cosine * v + sine * u
        second = np.maximum(second, np.minimum(first, line))
        first = np.maximum(first, line)
    return second - cos72


def cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(u, v) - 0.28, np.maximum(u, v) - 0.95)


KINDS = (disc, ring, square, triangle, star, cross)


# Textures: how much of the second colour, [h, w] in [0, 1]; u, v in pixels from the shape's centre.


def plain_texture(dice: Dice, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.zeros_like(u)


def fraction(x: np.ndarray) -> np.ndarray:
    return x - np.floor(x)


def wave(x: np.ndarray, period: float) -> np.ndarray:
    """Return stripes of width period / 2 with edges one pixel soft, in [-1, 1]."""
    return np.clip((np.abs(fraction(x / period) - 0.5) - 0.25) * (2 * period), -1, 1)


def stripes(dice: Dice, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return wave(u + dice.real(0, 16), dice.real(4, 12)) * 0.5 + 0.5


def checker(dice: Dice, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    period = dice.real(6, 14)
    return wave(u, period) * wave(v, period) * 0.5 + 0.5


def dots(dice: Dice, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    period = dice.real(6, 10)
    du, dv = np.abs(fraction(u / period) - 0.5), np.abs(fraction(v / period) - 0.5)
    return np.clip((0.33 - length(du, dv)) * period + 0.5, 0, 1)


def slope(dice: Dice, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.clip(u / np.float32(2 * np.abs(u).max() + 1) + 0.5, 0, 1)


def grain(dice: Dice, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    height, width = u.shape
    return smooth_noise(dice, height, width, cell=dice.real(1.5, 4))


# The first half suits small objects too.
TEXTURES = (plain_texture, slope, plain_texture, slope, stripes, checker, dots, grain)


def smooth_noise(dice: Dice, height: int, width: int, cell: float) -> np.ndarray:
    """Interpolate random values on a grid of `cell` pixels smoothly: [height, width] in [0, 1]."""
    y, x = np.arange(height, dtype=np.float32) / cell, np.arange(width, dtype=np.float32) / cell
    top, left = y.astype(np.int64), x.astype(np.int64)
    values = dice.field(int(top[-1]) + 2, int(left[-1]) + 2)
    down, right = y - top.astype(np.float32), x - left.astype(np.float32)
    down, right = (down * down * (3 - 2 * down))[:, None], (right * right * (3 - 2 * right))[None, :]
    rows = values[top] + down * (values[top + 1] - values[top])
    return rows[:, left] + right * (rows[:, left + 1] - rows[:, left])


def blend(canvas: np.ndarray, colour: np.ndarray, amount: np.ndarray) -> None:
    """Move `canvas` [3, h, w] in place towards `colour` [3] or [3, h, w] by `amount` [h, w] in [0, 1]."""
    colour = colour.reshape(3, *colour.shape[1:] or (1, 1))
    canvas += amount * (colour - canvas)


def background(dice: Dice, height: int, width: int) -> np.ndarray:
    """Draw ground and clutter (slopes, patches, blobs, segments): [3, H, W] float32 in [0, 1]."""
    canvas = np.empty((3, height, width), dtype=np.float32)
    base = dice.colour(0.1, 0.9)
    pose = Pose(width / 2, height / 2, max(height, width), 1.0, *dice.rotation())
    ramp, _ = pose.local(slice(0, height), slice(0, width))
    canvas[:] = base[:, None, None]
    blend(canvas, np.clip(base + dice.colour(-0.4, 0.4), 0, 1), np.clip(ramp + 0.5, 0, 1))
    scale = max(height, width) / 160
    for _ in range(dice.integer(0, 3)):
        noise = smooth_noise(dice, height, width, cell=dice.real(6, 40) * scale)
        edge, sharpness = dice.real(0.4, 0.7), dice.real(1.5, 12)
        colour = np.clip(base + dice.colour(-0.35, 0.35), 0, 1)
        blend(canvas, colour, np.clip((noise - edge) * sharpness, 0, 1) * dice.real(0.3, 0.9))
    for _ in range(dice.integer(0, 4)):
        paint_blob(dice, canvas)
    for _ in range(dice.integer(0, 5)):
        paint_segment(dice, canvas)
    return canvas


def paint_blob(dice: Dice, canvas: np.ndarray) -> None:
    """Paint a soft ellipse, whose edge is too wide for it to be mistaken for a disc."""
    height, width = canvas.shape[-2:]
    radius = max(height, width) * dice.real(0.08, 0.35)
    pose = Pose(dice.real(0, width), dice.real(0, height), radius, dice.real(0.4, 1), *dice.rotation())
    rows, columns = pose.window(canvas, margin=0)
    u, v = pose.local(rows, columns)
    fall = np.maximum(1 - (u * u + v * v), 0)
    blend(canvas[:, rows, columns], dice.colour(), fall * fall * dice.real(0.3, 0.9))


def paint_segment(dice: Dice, canvas: np.ndarray) -> None:
    height, width = canvas.shape[-2:]
    radius, thickness = max(height, width) * dice.real(0.02, 0.5), dice.real(0.5, 1.5)
    pose = Pose(dice.real(0, width), dice.real(0, height), radius, 1.0, *dice.rotation())
    rows, columns = pose.window(canvas, margin=2)
    u, v = pose.local(rows, columns)
    distance = np.maximum(np.abs(u) - 1, np.abs(v)) * radius - thickness
    blend(canvas[:, rows, columns], dice.colour(), np.clip(0.5 - distance, 0, 1))


def arrange(dice: Dice, height: int, width: int) -> list[Pose]:
    """Draw at most MAX_OBJECTS poses in painting order, large ones rather first; one image of 25 is empty."""
    many = dice.real()
    crowd = many * many * many * many * many  # no power: libm's is not the same everywhere
    # One to five objects in most images, rarely up to MAX_OBJECTS.
    count = 0 if dice.chance(0.04) else 1 + int(4 * many + (MAX_OBJECTS - 5) * crowd * crowd * crowd)
    poses: list[Pose] = []
    size = max(height, width)
    largest = size * (0.36 if count < 5 else 0.26 if count < 10 else 0.18)
    smallest = max(0.08 * size, 5)
    for _ in range(count):
        share = dice.real()
        radius = smallest + (largest - smallest) * share
        x, y = free_centre(dice, poses, radius, height, width)
        poses.append(Pose(x, y, radius, dice.real(0.75, 1), *dice.rotation()))
    return sorted(poses, key=lambda pose: -pose.radius * dice.real(0.4, 1))


def free_centre(dice: Dice, poses: list[Pose], radius: float, height: int, width: int) -> tuple[float, float]:
    """Draw three centres at least 0.4 radii inside the image; return that farthest from other objects."""
    best, centre = -math.inf, (0.0, 0.0)
    for _ in range(3):
        x = dice.real(0.4 * radius, width - 0.4 * radius)
        y = dice.real(0.4 * radius, height - 0.4 * radius)
        gap = min((pose.distance(x, y) / (radius + pose.radius) for pose in poses), default=math.inf)
        if gap > best:
            best, centre = gap, (x, y)
    return centre


def paint_object(dice: Dice, canvas: np.ndarray, shape: Shape, pose: Pose) -> tuple[slice, slice, np.ndarray]:
    """Paint one object with an optional rim and shadow, and return (rows, columns, mask [h, w] bool)."""
    rows, columns = pose.window(canvas, margin=6)
    u, v = pose.local(rows, columns)
    pixels = pose.radius * pose.squeeze
    distance = shape(u, v) * pixels
    target = canvas[:, rows, columns]
    first = contrasting(dice, canvas[:, int(pose.y), int(pose.x)])
    second = contrasting(dice, first)
    texture = TEXTURES[dice.integer(0, len(TEXTURES) if pixels > 8 else 4)]
    share = texture(dice, u * pose.radius, v * pixels)
    if dice.chance(0.4):
        blend(target, np.zeros(3, np.float32), np.clip(1 - distance / 5, 0, 1) * dice.real(0.2, 0.6))
    paint = first[:, None, None] + share * (second - first)[:, None, None]
    if dice.chance(0.3):
        rim = np.clip(distance + dice.real(1.5, 3), 0, 1)
        blend(paint, dice.colour(0, 0.25) if dice.chance(0.5) else dice.colour(0.75, 1), rim)
    blend(target, paint, np.clip(0.5 - distance, 0, 1))
    return rows, columns, distance < 0


def contrasting(dice: Dice, other: np.ndarray) -> np.ndarray:
    """Draw a colour [3] at a distance (sum over channels) of at least 0.6 from `other`."""
    colour = dice.colour()
    if sum(abs(float(c) - float(o)) for c, o in zip(colour, other, strict=True)) < 0.6:
        colour = np.where(colour < 0.5, colour + np.float32(0.5), colour - np.float32(0.5))
    return colour


def image_shape(dice: Dice, size: int) -> tuple[int, int]:
    """Draw (height, width); the longer side is `size`, the other 0.6 to 1 of it."""
    short = int(size * dice.real(0.6, 1) + 0.5)
    return ((short, size), (size, short), (size, size))[dice.integer(0, 3)]


def visible_objects(owner: np.ndarray, kinds: list[int], painted: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the objects of which enough is visible: (their numbers [N], their visible areas [N])."""
    areas = np.bincount(owner.ravel() + 1, minlength=len(kinds) + 1)[1:]
    numbers = np.flatnonzero(areas >= np.maximum(np.array(painted, dtype=np.int64) * MIN_VISIBLE, 12))
    return numbers, areas[numbers]


def box_of(mask: np.ndarray) -> list[int]:
    """Return x1, y1, x2, y2 at pixel edges of a mask [H, W] that is not empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def scene_size(seed: int, split: str, index: int, size: int = 128) -> tuple[int, int]:
    """Return (height, width) of a scene without drawing it."""
    return image_shape(Dice(seed, SPLITS[split], index), size)


def draw_scene(seed: int, split: str, index: int, size: int = 128) -> Scene:
    """Draw a scene whose longer side has `size` pixels."""
    dice = Dice(seed, SPLITS[split], index)
    height, width = image_shape(dice, size)
    canvas = background(dice, height, width)
    owner = np.full((height, width), -1, dtype=np.int64)
    kinds, painted = [], []
    for number, pose in enumerate(arrange(dice, height, width)):
        kinds.append(dice.integer(0, len(KINDS)))
        rows, columns, mask = paint_object(dice, canvas, KINDS[kinds[-1]], pose)
        owner[rows, columns][mask] = number
        painted.append(int(np.count_nonzero(mask)))
    canvas += (dice.field(3, height, width) - 0.5) * dice.real(0, 0.12)
    image = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    numbers, areas = visible_objects(owner, kinds, painted)
    masks = owner[None] == numbers[:, None, None]
    boxes = np.array([box_of(mask) for mask in masks], dtype=np.int64).reshape(-1, 4)
    return Scene(image, np.array(kinds, dtype=np.int64)[numbers], boxes, areas, masks)
