"""Rollouts in few pages, with a sampler that draws from a hash and keeps its tokens in pages: nobody reads a token that
it has not written, and every rollout comes to its end."""

import dataclasses
import itertools

import numpy as np
import pytest
import rollout_world as world
from hypothesis import given, settings
from hypothesis import strategies as st
from test_flight import LIMITS, SHAPES, TOTAL, HashSampler, Questions, make_flight, one_step, told, whole_run

from tapo_jax.rollout import episode as episode_module
from tapo_jax.rollout.groups import make_groups
from tapo_jax.rollout.paged_board import PagedBoard
from tapo_jax.rollout.players import Players, Wish
from tapo_jax.rollout.rounds import Stopped, play_groups, stream
from tapo_jax.rollout.schedule import Sampling, plan
from tapo_jax.types import Prompt

CHAT = world.chat(40)


@pytest.fixture(autouse=True)
def random_text_means_something(monkeypatch):
    monkeypatch.setattr(episode_module, "parse_turn", world.read_turn)


class PageSampler(HashSampler):
    """Four slots in shards of two. Every token lies in a page, and what is read must be what a slot would hold."""

    def __init__(self, page: int, pages: int, per_shard: int = 2):
        super().__init__()
        rows = {"extend_rows": (per_shard,), "decode_rows": (per_shard,)}
        self.shapes, self.slots_per_shard = dataclasses.replace(SHAPES, page=page, pages=pages, **rows), per_shard
        self.memory = np.full((2, pages + 1, page), -1)
        self.computed, self.copied = 0, 0

    def plan(self, needs, *, more, wish):
        return plan(self.shapes, needs, more=more, wish=wish, agree=np.asarray)

    def write(self, slot, pages, start, ids):
        for place, token in enumerate(ids, start):
            assert pages[place // self.shapes.page] > 0
            self.memory[slot // self.slots_per_shard, pages[place // self.shapes.page], place % self.shapes.page] = (
                token
            )

    def read(self, slot, pages, stop):
        return self.memory[slot // self.slots_per_shard, list(pages)].reshape(-1)[:stop].tolist()

    def extend(self, params, plan, extensions):
        super().extend(params, plan, extensions)
        for one in extensions:
            assert self.read(one.slot, one.pages, one.before) == self.held[one.slot][: one.before]
            self.write(one.slot, one.pages, one.before, one.row.token_T.tolist())
            self.computed += len(one.row.token_T)

    def copy(self, plan, copies):
        super().copy(plan, [(source, target) for source, target, *_ in copies])
        for _, target, old, new in copies:
            self.memory[target // self.slots_per_shard, new] = (
                self.memory[target // self.slots_per_shard, old] if new else -1
            )
            self.copied += bool(new)

    def decode(self, params, plan, draws, sampling):
        for draw in draws:
            assert self.read(draw.slot, draw.pages, draw.length) == self.held[draw.slot]
        drawn = super().decode(params, plan, draws, sampling)
        for draw, (ids, _) in zip(draws, drawn.fetch(), strict=True):
            self.write(draw.slot, draw.pages, draw.length, ids.tolist())
        return drawn


def least(page: int) -> int:
    """The fewest pages of a shard that are allowed."""
    return -(-SHAPES.capacity // page) + 1


def make_players(page, pages, wish=lambda: Wish.NOTHING) -> Players:
    return Players(PageSampler(page, pages), CHAT, world.pixels(), world.runner(), LIMITS, wish=wish)


def run(page, more, carry=0):
    players, flight, counts = make_players(page, least(page) + more), make_flight(carry), []
    found = []
    for step in range(1, TOTAL + 1):
        found.append(told(one_step(players, flight, step)))
        counts.append(flight.counts)
    return found, counts, players.sampler


@settings(deadline=None, max_examples=25)
@given(page=st.integers(1, 60), more=st.integers(0, 20))
def test_any_number_of_pages_that_is_allowed_gives_the_episodes_of_slots(page, more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episode_module, "parse_turn", world.read_turn)
        assert run(page, more)[0] == whole_run(0)


def test_when_few_pages_run_out_the_youngest_leave_and_are_counted(monkeypatch):
    make_room, left = PagedBoard._make_room, []

    def watched(board, shard):
        before = board._seated(shard)
        keys = [(board._slots[n].player.prompt, board._slots[n].player.conversation.sample) for n in before]
        make_room(board, shard)
        assert board._seated(shard) == before[: len(board._seated(shard))] and keys == sorted(keys)
        left.extend(keys[len(board._seated(shard)) :])

    monkeypatch.setattr(PagedBoard, "_make_room", watched)
    _, counts, sampler = run(16, 0)
    assert sum(count.evicted for count in counts) == len(left)
    assert sum(count.evicted for count in counts) > 0
    assert sum(count.evicted_tokens for count in counts) > 10 * sum(count.evicted for count in counts)
    _, counts, other = run(16, 4 * least(16))
    assert sum(count.evicted for count in counts) == sum(count.evicted_tokens for count in counts) == 0
    assert other.computed < sampler.computed


@settings(deadline=None, max_examples=12)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(0, 3), st.integers(8, 24), st.integers(0, 4))
def test_a_run_that_is_stopped_and_started_again_with_its_pages_plays_the_same(stops, carry, page, more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episode_module, "parse_turn", world.read_turn)
        want, counted, undisturbed = run(page, more, carry)
        found, counts, questions, held = [], [], Questions(), None
        flight, step = make_flight(carry, questions=questions), 0
        for rounds in [*stops, None]:
            count = itertools.count(1)
            wish = lambda: Wish.STOP if rounds and next(count) > rounds else Wish.NOTHING  # noqa: B023, E731
            players = make_players(page, least(page) + more, wish)
            if held is not None:
                for name in ("held", "prompt", "memory", "computed", "copied"):
                    setattr(players.sampler, name, getattr(held, name))
            try:
                while step < TOTAL:
                    found.append(told(one_step(players, flight, step + 1)))
                    counts.append(flight.counts)
                    step += 1
                break
            except Stopped:
                data, questions, held = flight.pack(), Questions(questions.at), players.sampler
                flight = make_flight(carry, questions=questions)
                flight.unpack(data, players.reopen)
        assert found == want and counts == counted
        assert players.sampler.computed == undisturbed.computed and players.sampler.copied == undisturbed.copied


def groups_of(count, size):
    return make_groups([Questions().read(row) for row in range(count)], size)


def test_the_prompt_of_a_group_is_computed_and_stored_once_in_each_shard():
    """Two shards: 8 samples of one question of 100 tokens and more, in pages of 16."""
    text, most = "which " * 14, []
    size, groups = 16, groups_of(1, 8)
    groups[0].prompt = Prompt("q", text, (), ("x",))
    players = make_players(size, 4 * least(size))
    length = len(players.open(groups[0].prompt).token_T)
    decode = players.sampler.decode

    def watch(params, plan, draws, sampling):
        most.append([{page for draw in draws if draw.slot // 2 == shard for page in draw.pages} for shard in range(2)])
        return decode(params, plan, draws, sampling)

    players.sampler.decode = watch
    play_groups(players, 1, groups, Sampling())
    assert length > 96 and length % size
    # The first draw of four samples: the whole pages of the prompt once a shard, and a page for each that draws.
    assert [len(pages) for pages in most[0]] == [length // size + 2 * (1 + (length % size + 4 > size))] * 2
    alone = make_players(size, 4 * least(size))
    one = groups_of(1, 1)
    one[0].prompt = groups[0].prompt
    play_groups(alone, 1, one, Sampling())
    prompts = [length] * 2
    others = players.sampler.computed - sum(prompts)
    assert 0 <= others < 8 * LIMITS.max_length - 8 * length and players.sampler.copied == 8


def test_episodes_that_are_passed_on_share_prompts_too():
    prompts, seen = [Questions().read(row) for row in range(4)], []
    starts = [(prompt, sample) for sample in range(3) for prompt in range(4)]  # samples of a question lie far apart
    stream(make_players(16, least(16)), 1, prompts, starts, Sampling(), lambda index, episode: seen.append(index))
    assert sorted(seen) == list(range(12))


def test_what_is_evicted_while_it_waits_for_a_tool_gets_its_result(monkeypatch):
    away, fill = set(), PagedBoard.fill_slots

    def watched(board):
        fill(board)
        seated = {(slot.player.prompt, slot.player.conversation.sample) for slot in board._slots if slot.player}
        away.update({(g, sample) for g, group in enumerate(board.groups) for sample in group.calls} - seated)

    monkeypatch.setattr(PagedBoard, "fill_slots", watched)
    slow = {"runner": world.runner(world.Say(slow=0.2)), "tool_wait_s": 0.0}
    players = dataclasses.replace(make_players(4, least(4)), sampler=PageSampler(4, least(4), per_shard=4), **slow)
    groups, want = groups_of(12, 2), groups_of(12, 2)
    play_groups(players, 1, groups, Sampling())
    assert away
    play_groups(make_players(4, 8 * least(4)), 1, want, Sampling())
    assert told(groups) == told(want)
