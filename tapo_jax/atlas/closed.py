"""Questions of Atlas whose answers come from a small set, so that a policy can also guess, and their passages.

About one country (of a chain, as in the open questions): its continent, and whether it is landlocked. About both
countries of a pair: whether they share a border, which is larger, which has more people.
"""

from collections.abc import Sequence

import numpy as np

from tapo_jax.atlas.questions import Question
from tapo_jax.atlas.scene import Placed
from tapo_jax.atlas.world import CONTINENTS, NEIGHBOURS, Country, World

SINGLE = ("continent", "position")
PAIRS = ("border", "larger", "populous")
KINDS = (*SINGLE, *PAIRS)
ANSWERS = {"continent": CONTINENTS, "position": ("coastal", "landlocked"), "border": ("yes", "no")}
"""The answers of a kind; those of the others are the two colours of the question."""
PASSAGES = {
    "border": ("border countries", "border countries", "border countries"),
    "larger": ("land", "area", "land area"),
    "populous": ("people", "population", "people population"),
}
"""Of the passages about a pair: the end of their title, what they call the value, the words to search."""
_ASK = {
    "continent": "On which continent is {}?",
    "position": "Is {} landlocked or coastal?",
    "border": "Do the countries drawn in {} and {} share a border?",
    "larger": "Which country is larger, the one drawn in {} or in {}?",
    "populous": "Which country has more people, the one drawn in {} or in {}?",
}
MOST_NEIGHBOURS = 5
"""Of the first country of a pair: the passage of one with more is long, and searches find shorter ones first."""
_TRIES = 64  # draws for one wanted answer, before another is wanted


def draw(
    world: World, kind: str, hops: int, outlines: int, rng: np.random.Generator
) -> tuple[list[str], list[str], list[str]] | None:
    """Draw the countries of a scene and of a question of this kind, every answer equally often.

    Return (names in the scene, chain of countries, relations), or None if no draw had the wanted answer. A pair is the
    first two of the scene and has no relations.
    """
    if kind in PAIRS:
        return _draw_pair(world, kind, max(2, outlines), rng)
    wanted = str(rng.choice(sorted({world.countries[name].closed.get(kind, "") for name in world.asked} - {""})))
    for _ in range(_TRIES):
        names = rng.choice(world.asked, outlines, replace=False).tolist()
        chain, relations = [names[0]], []
        for _ in range(hops - 1):
            relation = str(rng.choice(NEIGHBOURS))
            following = world.follow(chain[-1], relation)
            if following is None or following in chain or following not in world.asked:
                break
            chain.append(following)
            relations.append(relation)
        if len(chain) == hops and world.countries[chain[-1]].closed.get(kind) == wanted:
            return names, chain, relations
    return None


def _draw_pair(
    world: World, kind: str, outlines: int, rng: np.random.Generator
) -> tuple[list[str], list[str], list[str]] | None:
    wanted = bool(rng.random() < 0.5)  # they share a border; the first one is larger
    for _ in range(_TRIES):
        names = rng.choice(world.asked, outlines, replace=False).tolist()
        if kind == "border" and len(world.countries[names[0]].neighbours) > MOST_NEIGHBOURS:
            continue
        if kind == "border" and wanted:
            near = [name for name in world.countries[names[0]].neighbours if name in world.asked]
            others = [name for name in names[1:] if name not in near]
            if not near:
                continue
            names = [names[0], str(rng.choice(near)), *others][:outlines]
            if len(names) < outlines:
                continue
        first, second = (world.countries[name] for name in names[:2])
        if kind == "border":
            if (second.name in first.neighbours) == wanted:
                return names, names[:2], []
            continue
        value, other = (number(country, kind) for country in (first, second))
        if min(value, other) > 0 and value != other and (value > other) == wanted:
            return names, names[:2], []
    return None


def number(country: Country, kind: str) -> float:
    """Return the number that questions of this kind compare."""
    return country.area if kind == "larger" else float(country.population)


def write(world: World, kind: str, chain: Sequence[str], relations: Sequence[str], scene: Sequence[Placed]) -> Question:
    """Write the question with its answer. The outlines of a pair are the first two of the scene."""
    if kind in SINGLE:
        subject = f"the country drawn in {scene[0].colour}"
        for relation in relations:
            subject = f"the {relation} of {subject}"
        text = _ASK[kind].format(subject)
        options, answer = ANSWERS[kind], world.countries[chain[-1]].closed[kind]
    else:
        colours = (scene[0].colour, scene[1].colour)
        text = _ASK[kind].format(*colours)
        first, second = (world.countries[name] for name in chain)
        options = ANSWERS.get(kind, colours)
        if kind == "border":
            answer = "yes" if second.name in first.neighbours else "no"
        else:
            answer = colours[0] if number(first, kind) > number(second, kind) else colours[1]
    return Question(
        text=text, answers=(answer,), attribute=kind, relations=tuple(relations), chain=tuple(chain), options=options
    )


def look_ups(question: Question) -> int:
    """Return how many passages the question needs."""
    return 1 if question.attribute == "border" else len(question.chain)


def passages(country: Country) -> list[str]:
    """Return the further passages of a world with such questions, as `questions.passages` does."""
    name = country.name
    near = ", ".join(country.neighbours) or "none"
    found = [f"{name}, border countries\nThe border countries of {name}: {near}."]
    for kind in SINGLE:
        if kind in country.closed:
            found.append(f"{name}, {kind}\nThe {kind} of {name}: {country.closed[kind]}.")
    return found


def needed(kind: str, chain: Sequence[str]) -> set[str]:
    """Return the titles of the passages that a question of this kind needs (of a border either one)."""
    if kind in PAIRS:
        return {f"{name}, {PASSAGES[kind][0]}" for name in chain}
    return {f"{name}, neighbours" for name in chain[:-1]} | {f"{chain[-1]}, {kind}"}


def seen(kind: str, chain: Sequence[str]) -> set[str]:
    """Return the countries that the question asks about directly: those which an image search should name."""
    return set(chain) if kind in PAIRS else {chain[0]}
