"""Draw the pictures of Atlas: scenes of several outlines in different colours, and outlines for the image index."""

import dataclasses
import math

import numpy as np
import PIL.Image
import PIL.ImageDraw

from tapo_jax.atlas.world import Country

COLOURS = {
    "red": (214, 39, 40), "blue": (31, 90, 200), "green": (30, 140, 50), "orange": (240, 140, 20),
    "purple": (130, 60, 170), "black": (30, 30, 30),
}  # fmt: skip
BACKGROUND = (244, 244, 240)
GAP = 0.03  # min distance of two outlines, as a share of the scene
_ROOM = 0.98  # a margin of 0.01 stays free on each side


@dataclasses.dataclass(frozen=True)
class Placed:
    """One outline of a scene."""

    name: str
    """Its country."""
    colour: str
    box: tuple[float, float, float, float]
    """(x1, y1, x2, y2) relative to the scene, 0..1."""


def draw_scene(
    countries: list[Country], *, size: int, outline: tuple[float, float], rng: np.random.Generator
) -> tuple[np.ndarray, tuple[Placed, ...]]:
    """Draw a scene; return uint8 [size, size, 3] and its outlines.

    Locations are drawn until no two boxes touch. Where that hardly ever happens, the outlines get the min size, and
    random cells of a grid.

    countries: one outline each.
    size: side of the scene in pixels.
    outline: min and max long side of an outline, as a share of the scene.
    rng: for locations, sizes and colours.

    Raises ValueError if the scene is too small for that many outlines (not `fits`).
    """
    canvas = PIL.Image.new("RGB", (size, size), BACKGROUND)
    pen = PIL.ImageDraw.Draw(canvas)
    colours = rng.permutation(list(COLOURS))[: len(countries)]
    squares = _places(len(countries), outline, rng)
    placed = []
    for country, colour, (x, y, side) in zip(countries, colours, squares, strict=True):
        points = np.concatenate(country.outline)
        corner = np.array([x, y])
        _draw(pen, country, corner * size, side * size, COLOURS[str(colour)])
        low, high = points.min(0) * side + corner, points.max(0) * side + corner
        placed.append(Placed(country.name, str(colour), tuple(float(v) for v in (*low, *high))))
    return np.asarray(canvas), tuple(placed)


def fits(count: int, smallest: float) -> bool:
    """Return whether that many outlines fit, all of the min size, next to each other with a gap.

    Equal squares in a square are densest in a grid, unless they may be turned.
    """
    return math.ceil(math.sqrt(count)) * (smallest + GAP) <= _ROOM + GAP


def _places(count: int, outline: tuple[float, float], rng: np.random.Generator) -> list[tuple[float, float, float]]:
    for _ in range(200):
        found: list[tuple[float, float, float]] = []
        for _ in range(60):
            side = rng.uniform(*outline)
            x, y = rng.uniform(0.01, 0.99 - side, 2)
            if all(x > u + s + GAP or u > x + side + GAP or y > v + s + GAP or v > y + side + GAP for u, v, s in found):
                found.append((x, y, side))
            if len(found) == count:
                return found
    if not fits(count, outline[0]):
        raise ValueError(
            f"{count} outlines of at least {outline[0]:.2f} of the scene do not fit beside each other: "
            "use fewer or smaller ones"
        )
    across = math.ceil(math.sqrt(count))
    pitch = (_ROOM + GAP) / across
    cells = rng.choice(across * across, count, replace=False)
    return [(0.01 + (cell % across) * pitch, 0.01 + (cell // across) * pitch, outline[0]) for cell in cells.tolist()]


def draw_outline(country: Country, *, size: int = 96) -> np.ndarray:
    """Draw a single country as the image index holds it: uint8 [size, size, 3]."""
    canvas = PIL.Image.new("RGB", (size, size), BACKGROUND)
    _draw(PIL.ImageDraw.Draw(canvas), country, np.full(2, 0.06 * size), 0.88 * size, (70, 70, 70))
    return np.asarray(canvas)


def _draw(
    pen: PIL.ImageDraw.ImageDraw, country: Country, corner: np.ndarray, side: float, colour: tuple[int, int, int]
) -> None:
    for ring in country.outline:
        points = [tuple(point) for point in ring * side + corner]
        if len(points) > 2:
            pen.polygon(points, fill=colour)
