"""The facts of Atlas: countries with outlines and attributes, real ones (package `countryinfo`) or invented ones.

Both kinds have the same type, so every tool, question and passage works on either. Names are plain ASCII.
"""

import dataclasses
import json
import pathlib
import unicodedata
from importlib import resources

import numpy as np

ATTRIBUTES = ("capital", "currency", "calling code", "demonym")
CONTINENTS = ("Africa", "Americas", "Asia", "Europe", "Oceania")
LANDLOCKED = frozenset(
    "AFG AND ARM AUT AZE BLR BTN BOL BWA BFA BDI CAF TCD CZE ETH HUN KAZ KGZ LAO LSO LIE LUX MKD MWI MLI"
    " MDA MNG NPL NER PRY RWA SMR SRB SVK SSD SWZ CHE TJK TKM UGA UZB VAT ZMB ZWE".split()
)
"""ISO codes of the countries without a coast on an ocean, which `countryinfo` does not say."""
NEIGHBOURS = ("largest neighbour", "smallest neighbour")
# Subregions of the held-out split. They are whole, so that chains of neighbours stay inside a split.
HELD_OUT_REGIONS = (
    "Western Asia", "South-eastern Asia", "Northern Europe", "Southern Asia", "Central Asia", "Northern Africa",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Country:
    """One country."""

    name: str
    facts: dict[str, tuple[str, ...]]
    """attribute -> accepted values; passages give the first one."""
    neighbours: tuple[str, ...]
    """Names, largest country first."""
    area: float
    population: int
    region: str
    outline: tuple[np.ndarray, ...]
    """Polygons, float32 [n, 2] each, x right and y down, scaled into 0..1 with the aspect ratio kept."""
    closed: dict[str, str] = dataclasses.field(default_factory=dict)
    """Facts with values from a small set: "continent", and "position" (landlocked or coastal)."""


@dataclasses.dataclass(frozen=True)
class World:
    """Countries by name. Searches run over all of them; questions are asked only about those in `asked`."""

    countries: dict[str, Country]
    asked: tuple[str, ...]

    def follow(self, name: str, relation: str) -> str | None:
        """Return the neighbour that `relation` names, or None if the country has none."""
        neighbours = self.countries[name].neighbours
        if not neighbours:
            return None
        return neighbours[0] if relation == NEIGHBOURS[0] else neighbours[-1]


def real_world(split: str) -> World:
    """Return the real countries that have an outline. split: "train" or "held_out"; no country is in both."""
    records = [record for record in _records() if record.get("geoJSON") and record.get("capital")]
    code_name = {record["ISO"]["alpha3"]: _ascii(record["name"]) for record in records}
    area = {record["ISO"]["alpha3"]: float(record.get("area") or 0) for record in records}
    countries = {}
    for record in records:
        near = sorted((c for c in record.get("borders") or () if c in code_name), key=lambda c: (-area[c], c))
        name = _ascii(record["name"])
        countries[name] = Country(
            name=name,
            facts=_facts(record),
            neighbours=tuple(code_name[c] for c in near),
            area=area[record["ISO"]["alpha3"]],
            population=int(record.get("population") or 0),
            region=record.get("subregion") or "",
            outline=_outline(record["geoJSON"]["features"][0]["geometry"]),
            closed=_closed(record),
        )
    held_out = {name for name, country in countries.items() if country.region in HELD_OUT_REGIONS}
    asked = held_out if split == "held_out" else set(countries) - held_out
    return World(countries, tuple(sorted(asked)))


def _records() -> list[dict]:
    folder = pathlib.Path(str(resources.files("countryinfo"))) / "data"
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def _facts(record: dict) -> dict[str, tuple[str, ...]]:
    values = {
        "capital": (record.get("capital"),),
        "currency": record.get("currencies") or (),
        "calling code": record.get("callingCodes") or (),
        "demonym": (record.get("demonym") or "").split(","),
    }
    clean = {
        name: tuple(_ascii(value.strip()) for value in given if value and value.strip())
        for name, given in values.items()
    }
    return {name: given for name, given in clean.items() if given}


def _closed(record: dict) -> dict[str, str]:
    position = "landlocked" if record["ISO"]["alpha3"] in LANDLOCKED else "coastal"
    continent = record.get("region") or ""
    return {"position": position} | ({"continent": continent} if continent in CONTINENTS else {})


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def _outline(geometry: dict) -> tuple[np.ndarray, ...]:
    """Return the outer rings of a GeoJSON geometry, longitudes scaled by the cosine of the middle latitude."""
    polygons = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    rings = [np.array(polygon[0], np.float64)[:, :2] for polygon in polygons]
    latitude = np.concatenate(rings)[:, 1]
    shrink = np.cos(np.deg2rad((latitude.min() + latitude.max()) / 2))
    rings = [np.stack([ring[:, 0] * shrink, -ring[:, 1]], axis=1) for ring in rings]
    sizes = np.array([np.ptp(ring, axis=0).max() for ring in rings])
    return fit([ring for ring, size in zip(rings, sizes, strict=True) if size > 0.02 * sizes.max()])


def fit(rings: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Move and scale rings into 0..1, keeping the aspect ratio and centring the shorter side."""
    points = np.concatenate(rings)
    low, span = points.min(0), np.ptp(points, axis=0)
    scale = 1 / max(span.max(), 1e-9)
    offset = (1 - span * scale) / 2
    return tuple(((ring - low) * scale + offset).astype(np.float32) for ring in rings)


# ------------------------------------------------------------------------------------------------ invented worlds

_ONSETS = [
    *"b d f g h j k l m n p r s t v z".split() * 4,
    *"c w y br ch cr dr fr gh gr kh ky ph pl pr qu sh sl st th tr ts x".split(),
]
_VOWELS = [*"a e i o u".split() * 8, *"a ai au ea ia ie io oa ou ua uy y aa ee".split()]
_CODAS = [*[""] * 22, *"n r s l m n".split() * 2, *"d t k ng st nd rk ch m g b zz x th".split()]
_AFFIXES = [
    "New",
    "South",
    "North",
    "East",
    "West",
    "Saint",
    "San",
    "Port",
    "United",
    "Republic of",
    "The",
    "Central",
    "Upper",
]
_TAILS = ["Islands", "City", "Republic", "and {}", "States", "Guinea", "Kingdom", "Town", "Bay"]
_DEMONYMS = ["an", "ian", "ese", "ish", "i", "ean", "er", "ian", "ic"]


def fictional_name(rng: np.random.Generator) -> str:
    """Draw a pronounceable name; like real ones it sometimes has several words, a hyphen or an apostrophe."""
    name = _word(rng)
    draw = rng.random()
    if draw < 0.08:
        name = f"{rng.choice(_AFFIXES)} {name}"
    elif draw < 0.14:
        name = f"{name} {str(rng.choice(_TAILS)).format(_word(rng))}"
    elif draw < 0.20:
        name = f"{name} {_word(rng)}"
    elif draw < 0.23:
        name = f"{name}-{_word(rng)}"
    elif draw < 0.24:
        name = f"{name[0]}'{_word(rng)}"
    return name


def _word(rng: np.random.Generator) -> str:
    syllables = 1 + int(rng.choice(4, p=(0.12, 0.5, 0.3, 0.08)))
    parts = [
        f"{rng.choice(_ONSETS) if i or rng.random() < 0.8 else ''}{rng.choice(_VOWELS)}{rng.choice(_CODAS)}"
        for i in range(syllables)
    ]
    return "".join(parts).capitalize()


def fictional_world(seed: int, size: int = 120) -> World:
    """Invent countries with facts and shapes, about which nothing can be known without looking it up."""
    rng, closed_rng = np.random.default_rng((seed, 0xA71A5)), np.random.default_rng((seed, 0xC105ED))
    names = list(dict.fromkeys(fictional_name(rng) for _ in range(size * 2)))[:size]
    area = rng.lognormal(12, 2, size).round()
    countries = {}
    for i, name in enumerate(names):
        near = rng.choice(size, int(rng.integers(1, 6)), replace=False)
        near = sorted((n for n in near if n != i), key=lambda n: -area[n])
        stem = name.rstrip("aeiouy") or name
        code = "".join(rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), 3))
        countries[name] = Country(
            name=name,
            facts={
                "capital": (fictional_name(rng),),
                "currency": (code,),
                "calling code": (str(rng.integers(1, 10 ** int(rng.integers(2, 4)))),),
                "demonym": (stem + str(rng.choice(_DEMONYMS)),),
            },
            neighbours=tuple(names[n] for n in near),
            area=float(area[i]),
            population=int(rng.lognormal(15, 2)),
            region=_word(rng),
            outline=_blob(rng),
            closed={
                "continent": str(closed_rng.choice(CONTINENTS)),
                "position": str(closed_rng.choice(("coastal", "landlocked"))),
            },
        )
    return World(countries, tuple(names))


def _blob(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Draw a closed curve of random harmonics, stretched and rotated; sometimes with an island."""
    rings = [_ring(rng, np.zeros(2), 1.0)]
    if rng.random() < 0.3:
        rings.append(_ring(rng, rng.normal(size=2) * 1.2, 0.35))
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(0.4, 1.0)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.diag([1.0, stretch])
    return fit([ring @ matrix.T for ring in rings])


def _ring(rng: np.random.Generator, centre: np.ndarray, radius: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    order = np.arange(2, 9)
    amplitude, phase = rng.normal(size=7) * 0.45 / order, rng.uniform(0, 2 * np.pi, 7)
    distance = radius * np.clip(
        1 + (amplitude[:, None] * np.cos(order[:, None] * angle + phase[:, None])).sum(0), 0.15, 2.5
    )
    return centre + distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
