"""Rollouts whose keys and values lie in pages: the tokens of the plain forward pass, prompts stored once, and none lost
when the pages run out."""

import dataclasses

import numpy as np
import pytest
import rollout_world as world
from test_rollout import CAPACITY, SHAPES, full_forward, make_sampler, middle_images, pack, play, same_tokens

from tapo_jax.rollout import episode as episode_module
from tapo_jax.rollout import rounds
from tapo_jax.rollout.paged_board import PagedBoard

PAGE = 16
MOST = CAPACITY // PAGE
FULL = dataclasses.replace(SHAPES, page=PAGE, pages=6 * MOST + 1)
FEW = dataclasses.replace(SHAPES, page=PAGE, pages=MOST + 1)  # one conversation of the greatest length, and one page


@pytest.fixture(autouse=True)
def random_text_means_something(monkeypatch):
    monkeypatch.setattr(episode_module, "parse_turn", world.read_turn)


class Watcher(PagedBoard):
    """Keeps the most pages in use, and looks for pages that are lost or given to two."""

    boards: list["Watcher"] = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.most, self.left, self.copied, self.extended = 0, 0, 0, 0
        Watcher.boards.append(self)

    def take_evicted(self):
        count, tokens = super().take_evicted()
        self.left += count
        return count, tokens

    def give_pages(self, needs):
        needs = super().give_pages(needs)
        shards = self._tables._shards
        self.most = max(self.most, sum(pages.count - pages.free for pages in shards))
        self.copied += sum(bool(pair[1]) for _, _, *pair in needs.copies)
        self.extended += sum(extension.fresh for extension in needs.extensions)
        for pages in shards:
            writers = [page for owner, owned in pages.owned.items() if isinstance(owner, int) for page in set(owned)]
            for draw in needs.draws:
                for page in draw.pages[draw.length // PAGE :]:
                    assert writers.count(page) <= 1 and page  # nobody draws into a page of another
        return needs


@pytest.fixture
def watched(monkeypatch):
    """The boards of the rollouts to come."""
    monkeypatch.setattr(rounds, "PagedBoard", Watcher)
    monkeypatch.setattr(Watcher, "boards", [])
    return Watcher.boards


@pytest.fixture(scope="module")
def samplers():
    return {"slots": make_sampler(), "full": make_sampler(shapes=FULL), "few": make_sampler(shapes=FEW)}


def assert_plain(episodes):
    batch = pack(episodes)
    best_BxT, logp_BxT = full_forward(world.params(), batch.inputs)
    written = batch.mask_BxT[:, 1:]
    assert written.sum() > 60
    assert np.array_equal(np.asarray(best_BxT)[:, :-1][written], batch.inputs.token_BxT[:, 1:][written])


@pytest.mark.parametrize("name", ["full", "few"])
def test_greedy_tokens_are_those_of_the_plain_forward_pass_and_of_slots(name, samplers, watched):
    options = {"temperature": 0.0, "group_size": 2, "count": 12}
    episodes, _ = play(samplers[name], **options)
    assert sum(middle_images(episode) for episode in episodes) >= 3
    assert_plain(episodes)
    assert same_tokens(episodes, play(samplers["slots"], **options)[0])
    assert watched[0].left > 0 if name == "few" else watched[0].left == 0


@pytest.mark.parametrize("name", ["full", "few"])
def test_log_probabilities_are_the_trainers(name, samplers, watched):
    episodes, _ = play(samplers[name], temperature=0.8, count=8)
    batch = pack(episodes)
    _, logp_BxT = full_forward(world.params(), batch.inputs)
    found = np.where(batch.mask_BxT, logp_BxT, 0)
    np.testing.assert_allclose(found, batch.sampler_logp_BxT, atol=1e-5, rtol=0)
    assert np.ptp(batch.sampler_logp_BxT[batch.mask_BxT]) > 1
