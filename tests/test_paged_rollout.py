"""Rollouts whose keys and values lie in pages: the tokens of the plain forward pass, prompts stored once, and none lost
when the pages run out."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
import rollout_world as world
import test_rollout_layout as layout
from test_rollout import CAPACITY, CHUNK, SHAPES, full_forward, make_sampler, middle_images, pack, play, same_tokens

from tapo_jax import metrics, sharding
from tapo_jax.config import UserError
from tapo_jax.rollout import episode as episode_module
from tapo_jax.rollout import rounds
from tapo_jax.rollout.paged_board import PagedBoard
from tapo_jax.rollout.sampler import Sampler, make_shapes, with_pages

# Few shapes; pages that divide the capacity, and pages that do not.
ONE = dataclasses.replace(SHAPES, extend_rows=(2,), patches=(128,))
FULL = dataclasses.replace(ONE, page=16, pages=6 * 12 + 1)
FEW = dataclasses.replace(ONE, page=7, pages=28 + 1)  # one conversation of the greatest length, and one page


@pytest.fixture(autouse=True)
def random_text_means_something(monkeypatch):
    monkeypatch.setattr(episode_module, "parse_turn", world.read_turn)


class Watcher(PagedBoard):
    """Counts, and looks for pages that two may write."""

    boards: ClassVar[list["Watcher"]] = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.used, self.left, self.copied, self.extended = [], 0, 0, 0
        Watcher.boards.append(self)

    def take_evicted(self):
        count, tokens = super().take_evicted()
        self.left += count
        return count, tokens

    def give_pages(self, needs):
        needs = super().give_pages(needs)
        shards = self._tables._shards
        self.used.append(sum(pages.count - pages.free for pages in shards))
        self.copied += sum(bool(pair[1]) for _, _, *pair in needs.copies)
        self.extended += sum(extension.fresh for extension in needs.extensions)
        for shard, pages in enumerate(shards):
            writers = [page for owner, owned in pages.owned.items() if isinstance(owner, int) for page in set(owned)]
            for draw in [draw for draw in needs.draws if self._shard(draw.slot) == shard]:
                for page in draw.pages[draw.length // self._with.sampler.shapes.page :]:
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
    return {"slots": make_sampler(shapes=ONE), "full": make_sampler(shapes=FULL), "few": make_sampler(shapes=FEW)}


@pytest.fixture(scope="module")
def greedy(samplers):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episode_module, "parse_turn", world.read_turn)
        return play(samplers["slots"], **GREEDY)[0]


GREEDY = {"temperature": 0.0, "group_size": 2, "count": 9}


@pytest.mark.parametrize("name", ["full", "few"])
def test_greedy_tokens_are_those_of_the_plain_forward_pass_and_of_slots(name, samplers, greedy, watched):
    episodes, _ = play(samplers[name], **GREEDY)
    assert sum(middle_images(episode) for episode in episodes) >= 3
    batch = pack(episodes)
    best_BxT, _ = full_forward(world.params(), batch.inputs)
    written = batch.mask_BxT[:, 1:]
    assert written.sum() > 60
    assert np.array_equal(np.asarray(best_BxT)[:, :-1][written], batch.inputs.token_BxT[:, 1:][written])
    assert same_tokens(episodes, greedy)
    assert (watched[0].left > 0) == (name == "few")


@pytest.mark.parametrize("name", ["full", "few"])
def test_log_probabilities_are_the_trainers(name, samplers, watched):
    episodes, _ = play(samplers[name], temperature=0.8, count=8)
    batch = pack(episodes)
    _, logp_BxT = full_forward(world.params(), batch.inputs)
    found = np.where(batch.mask_BxT, logp_BxT, 0)
    np.testing.assert_allclose(found, batch.sampler_logp_BxT, atol=1e-5, rtol=0)
    assert np.ptp(batch.sampler_logp_BxT[batch.mask_BxT]) > 1
    assert (watched[0].left > 0) == (name == "few")


def test_a_group_stores_its_prompt_once(samplers, watched):
    """Six samples of one question with an image in six slots. Stored apart, six prompts would take more."""
    episodes, _ = play(samplers["full"], prompts=world.prompts(1), group_size=6, temperature=0.8)
    board, length = watched[0], episodes[0].turns[0].start
    assert board.extended == 1 and board.copied == 6
    assert length > 2 * 16 and length % 16 + CHUNK <= 16
    # The whole pages of the prompt, its last one as it was computed, and a copy of that for each to write in.
    assert board.used[0] == length // 16 + 1 + 6
    longest = max(len(episode.token_T) for episode in episodes)
    assert max(board.used) <= length // 16 + 1 + 6 * (-(-(longest + CHUNK) // 16) - length // 16)
    assert same_tokens(episodes, play(samplers["slots"], prompts=world.prompts(1), group_size=6, temperature=0.8)[0])


def test_nothing_is_compiled_after_the_warm_up(samplers):
    sampler = samplers["few"]
    sampler.warm_up(world.params())
    compiled = metrics.compile_count()
    play(sampler, temperature=0.0, count=6)
    assert metrics.compile_count() == compiled


def paged_sampler(mesh, pages) -> Sampler:
    sampler = layout.make_sampler(mesh)
    shapes = dataclasses.replace(sampler.shapes, page=16, pages=pages)
    return Sampler(
        layout.model(),
        mesh,
        shapes,
        stop_ids=layout.CHAT.stop_ids,
        forbidden_V=layout.CHAT.forbidden_V(layout.CONFIG.vocab),
    )


def test_on_eight_devices_in_pairs_the_tokens_and_log_probabilities_are_the_plain_ones(watched):
    mesh = sharding.rollout_mesh(layout.training(), tensor=2)
    sampler = paged_sampler(mesh, 13)
    layout.assert_plain(layout.play(sampler, temperature=0.0, count=10, group_size=3))
    assert watched[0].left > 0 and watched[0].copied > 0
    pool = sampler._state.k[0]
    Z, L, N, K, P, A = pool.shape
    assert (Z, N, K, P) == (4, 14, 4, 16) and pool.sharding.shard_shape(pool.shape) == (1, L, N, 2, P, A)


@pytest.mark.parametrize("tensor", [1, 2])
def test_decoding_gathers_no_weight_and_no_pages(tensor):
    sampler = paged_sampler(sharding.rollout_mesh(layout.training(), tensor=tensor), 13)
    page = layout.CONFIG.kv_heads // tensor * 16 * layout.CONFIG.head_dim
    assert layout.largest_gathered(sampler) < min([*layout.kernel_sizes(), 13 * page])


def test_rows_may_be_put_in_smaller_pieces_than_the_pages_are_split_into(monkeypatch, watched):
    """As in a pod whose processes hold parts of a tensor group: every device's rows have pages of their own."""
    mesh = sharding.rollout_mesh(layout.training(), tensor=4)
    monkeypatch.setattr(sharding, "rows_mesh", lambda mesh: sharding.rollout_mesh(mesh, tensor=1))
    sampler = paged_sampler(mesh, 13)
    assert sampler.slots_per_shard == 2
    layout.assert_plain(layout.play(sampler, temperature=0.0, group_size=2))
    assert sampler._state.k[0].shape[:3] == (2, 1, 4 * 14) and watched[0].copied > 0


def test_sizes_that_cannot_be_are_refused_in_a_sentence():
    config, mesh = world.config(), sharding.make_mesh(data=8)
    sizes = {"capacity": CAPACITY, "chunk": CHUNK, "image_patches": 36, "most_patches": 4 * CAPACITY}
    shapes = make_shapes(config, mesh, slots=16, **sizes)
    assert with_pages(shapes, config, mesh, 0, 0) is shapes
    found = with_pages(shapes, config, mesh, 16, 0)
    assert (found.page, found.pages) == (16, 2 * 12 + 1)
    assert with_pages(shapes, config, mesh, 16, 8 * 13).pages == 13
    with pytest.raises(UserError, match=r"rollout.pages is 100, split 8 ways by the mesh: give a multiple of 8"):
        with_pages(shapes, config, mesh, 16, 100)
    with pytest.raises(UserError, match=r"takes 12 pages of 16 tokens, and a shared prompt one more; .* least 104"):
        with_pages(shapes, config, mesh, 16, 96)
