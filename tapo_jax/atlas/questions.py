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
    """chain: the names from the drawn country to the one asked about; relations lead from each to the next."""

    text: str
    answers: tuple[str, ...]
    attribute: str
    relations: tuple[str, ...]
    chain: tuple[str, ...]

    @property
    def hops(self) -> int:
        return len(self.chain)


def ask(world: World, name: str, colour: str, hops: int, rng: np.random.Generator) -> Question | None:
    """A question of `hops` look-ups about the country drawn in `colour`, or None where the facts do not allow one:
    every country of the chain must be one that the split asks about, and no two of them the same."""
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
    """Several short passages, "Title\ntext" each; the last ones answer no question and are there to be found by
    mistake. A colon stands only before a value."""
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
