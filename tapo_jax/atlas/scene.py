"""Draw the pictures of Atlas: scenes of several outlines in different colours, and outlines for the image index."""

import dataclasses

import numpy as np
import PIL.Image
import PIL.ImageDraw

from tapo_jax.atlas.world import Country

COLOURS = {
    "red": (214, 39, 40), "blue": (31, 90, 200), "green": (30, 140, 50), "orange": (240, 140, 20),
    "purple": (130, 60, 170), "black": (30, 30, 30),
}  # fmt: skip
BACKGROUND = (244, 244, 240)


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

    Locations are drawn until no two boxes touch.

    countries: one outline each.
    size: side of the scene in pixels.
    outline: min and max long side of an outline, as a share of the scene.
    rng: for locations, sizes and colours.

    Raises ValueError if the scene is too small for that many outlines.
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


def _places(
    count: int, outline: tuple[float, float], rng: np.random.Generator, gap: float = 0.03
) -> list[tuple[float, float, float]]:
    for _ in range(200):
        found: list[tuple[float, float, float]] = []
        for _ in range(60):
            side = rng.uniform(*outline)
            x, y = rng.uniform(0.01, 0.99 - side, 2)
            if all(x > u + s + gap or u > x + side + gap or y > v + s + gap or v > y + side + gap for u, v, s in found):
                found.append((x, y, side))
            if len(found) == count:
                return found
    raise ValueError(
        f"{count} outlines of up to {outline[1]:.2f} of the scene do not fit beside each other: "
        "use fewer or smaller ones"
    )


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
