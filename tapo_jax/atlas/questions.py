"""Questions and passages of Atlas, written from a world's facts."""

import dataclasses

import numpy as np

from tapo_jax.atlas.world import ATTRIBUTES, NEIGHBOURS, Country, World

_ASK = {
    "capital": "What is the capital of {}?",
    "currency": "Which currency is used in {}?",
    "calling code": "What is the calling code of {}?",
    "demonym": "What are people from {} called?",
}


@dataclasses.dataclass(frozen=True)
class Question:
    """One question with its accepted answers."""

    text: str
    answers: tuple[str, ...]
    attribute: str
    relations: tuple[str, ...]
    """They lead from each country of the chain to the next."""
    chain: tuple[str, ...]
    """Names from the country in the scene to the one asked about; of a question about a pair, both."""
    options: tuple[str, ...] = ()
    """The small set that the answer comes from; empty for an open question."""

    @property
    def hops(self) -> int:
        return len(self.chain)


def ask(world: World, name: str, colour: str, hops: int, rng: np.random.Generator) -> Question | None:
    """Draw a question of `hops` look-ups about the country in `colour`, or None if the facts do not allow one.

    Every country of the chain must be one that the split asks about, and no country may occur twice."""
    chain, relations = [name], []
    for _ in range(hops - 1):
        relation = str(rng.choice(NEIGHBOURS))
        following = world.follow(chain[-1], relation)
        if following is None or following in chain or following not in world.asked:
            return None
        chain.append(following)
        relations.append(relation)
    known = [attribute for attribute in ATTRIBUTES if attribute in world.countries[chain[-1]].facts]
    if not known:
        return None
    attribute = str(rng.choice(known))
    subject = f"the country drawn in {colour}"
    for relation in relations:
        subject = f"the {relation} of {subject}"
    return Question(
        text=_ASK[attribute].format(subject),
        answers=world.countries[chain[-1]].facts[attribute],
        attribute=attribute,
        relations=tuple(relations),
        chain=tuple(chain),
    )


def passages(country: Country) -> list[str]:
    """Return several short passages, "Title\ntext" each.

    The last ones answer no question; they exist to be found by mistake. A colon occurs only before a value."""
    name, found = country.name, []
    for attribute in ATTRIBUTES:
        if attribute in country.facts:
            found.append(f"{name}, {attribute}\nThe {attribute} of {name}: {country.facts[attribute][0]}.")
    if country.neighbours:
        largest, smallest = country.neighbours[0], country.neighbours[-1]
        near = f"The largest neighbour of {name}: {largest}. The smallest neighbour of {name}: {smallest}."
        found.append(f"{name}, neighbours\nNeighbours of {name}. {near}")
    found.append(f"{name}, land\nThe area of {name}: {country.area:.0f} km2. Region: {country.region}.")
    found.append(f"{name}, people\nThe population of {name}: {country.population}.")
    return found


def corpus(world: World) -> list[str]:
    return [passage for name in sorted(world.countries) for passage in passages(world.countries[name])]
