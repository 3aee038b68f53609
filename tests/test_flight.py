"""Groups in flight over many steps, with a sampler that draws from a hash: what is carried, kept, and played on."""

import itertools
import threading
import time
import zlib

import numpy as np
import pytest
import rollout_world as world
from hypothesis import given, settings
from hypothesis import strategies as st

from tapo_jax.rollout import episode as episode_module
from tapo_jax.rollout.episode import Conversation, Limits
from tapo_jax.rollout.flight import Flight
from tapo_jax.rollout.packed import pack, unpack
from tapo_jax.rollout.players import Players, Wish
from tapo_jax.rollout.rounds import Stopped, play_groups
from tapo_jax.rollout.schedule import Sampling, Shapes, plan
from tapo_jax.types import Episode, Identity, Image, Number, Prompt, Region, Text, ToolCall, ToolResult, Turn

CHAT = world.chat(40)
SHAPES = Shapes(
    extend_rows=(2, 4), decode_rows=(2, 4), lengths=(64, 192), patches=(64, 128), windows=(192,), chunk=4, merge=2
)
LIMITS = Limits(max_turns=4, max_new_tokens=16, max_length=160)
P, G, TOTAL = 3, 2, 6


class Drawn:
    def __init__(self, written):
        self._written = written

    def is_ready(self):
        return True

    def fetch(self):
        return self._written


class HashSampler:
    """Draws tokens that depend on the key of a draw alone, and checks that the cache holds what the draw follows."""

    config, shapes, slots, slots_per_shard, stop_ids = world.config(), SHAPES, 4, 4, frozenset(CHAT.stop_ids)

    def __init__(self):
        self.held, self.draws, self.prompt = {}, [], {}

    def plan(self, needs, *, more, wish):
        return plan(SHAPES, needs, more=more, wish=wish, agree=np.asarray)

    def reshard(self, params):
        return params

    def extend(self, params, plan, extensions):
        for extension in extensions:
            row = extension.row.token_T.tolist()
            self.held[extension.slot] = self.held.get(extension.slot, [])[: extension.before] + row
            assert len(self.held[extension.slot]) == extension.before + len(row)
            self.prompt[extension.slot] = list(row) if extension.fresh else self.prompt.get(extension.slot)
            if not extension.fresh and not extension.before:
                self.prompt[extension.slot] = None

    def copy(self, plan, copies):
        taken = {target: self.prompt[source] for source, target in copies}
        assert all(taken.values())
        for target, ids in taken.items():
            self.held[target], self.prompt[target] = list(ids), list(ids)

    def wait(self):
        pass

    def decode(self, params, plan, draws, sampling):
        written = []
        for draw in draws:
            assert len(self.held[draw.slot]) == draw.length
            ids = []
            while len(ids) < min(SHAPES.chunk, draw.allowance) and not (ids and ids[-1] in self.stop_ids):
                key = (params, draw.prompt, draw.sample, draw.turn, draw.drawn + len(ids))
                self.draws.append(key)
                ids.append(zlib.crc32(repr(key).encode()) % 256)
            self.held[draw.slot] += ids
            written.append((np.array(ids, np.int32), np.full(len(ids), -1.0 - params, np.float32)))
        return Drawn(written)


class Questions:
    """Questions of different lengths, in order; stands in for `data.pipeline.Prompts`."""

    def __init__(self, first=0):
        self.skipped, self.rows, self.at = 0, [], first

    def __next__(self):
        self.rows = list(range(self.at, self.at + P))
        self.at += P
        return [self.read(row) for row in self.rows]

    def read(self, row):
        shown = tuple(world.picture(row + i, 16, 24) for i in range(row % 3))
        return Prompt(f"q{row}", "which " * (row % 5), shown, ("x",))


@pytest.fixture(autouse=True)
def random_text_means_something(monkeypatch):
    monkeypatch.setattr(episode_module, "parse_turn", world.read_turn)


def make_players(wish=lambda: Wish.NOTHING, say=None) -> Players:
    return Players(HashSampler(), CHAT, world.pixels(), world.runner(say), LIMITS, wish=wish)


def make_flight(carry=2, staleness=2, questions=None, total=TOTAL) -> Flight:
    sizes = {"local": range(P), "batch": P, "group_size": G, "total": total}
    return Flight(questions or Questions(), carry=carry, max_staleness=staleness, **sizes)


def one_step(players, flight, step, save=None):
    """The groups that a step trains on; the weights are the step's number."""
    groups, seen = flight.begin(step), []
    sampling = Sampling(step=step)
    play_groups(players, step, groups, sampling, until=flight.until, counts=flight.counts, on_episode=seen.append, save=save)  # fmt: skip  # noqa: E501
    for episode in seen:
        episode.rewards = {"accuracy": 1.0}
    return flight.take()


def told(groups) -> list:
    """What was played, in a form that can be compared."""
    return [
        (group.number, episode.token_T.tolist(), episode.sampler_logp_T.tolist(), episode.policy_T.tolist(),
         episode.mask_T.tolist(), episode.finish, episode.image_start, [image.box for image in episode.images],
         [(turn.call, turn.result and turn.result.text, turn.forced) for turn in episode.turns])
        for group in groups for episode in group.episodes
    ]  # fmt: skip


def whole_run(carry=2, staleness=2) -> list:
    players, flight = make_players(), make_flight(carry, staleness)
    return [told(one_step(players, flight, step)) for step in range(1, TOTAL + 1)]


def test_every_question_is_trained_on_once_and_whole_and_no_batch_is_larger():
    steps = whole_run()
    assert [len(step) for step in steps] == [P * G] * TOTAL
    trained = [number for step in steps for number, *_ in step]
    assert sorted(trained) == sorted(list(range(P * TOTAL)) * G)
    assert trained != sorted(trained)  # some were carried past others


def test_no_token_is_older_than_the_bound_and_some_are_as_old():
    for bound in (1, 2):
        ages = [
            step - min(policy)
            for step, found in enumerate(whole_run(carry=3, staleness=bound), start=1)
            for _, _, _, policy, *_ in found
        ]
        assert max(ages) <= bound and 1 in ages


def test_without_carry_nothing_is_in_flight_between_steps():
    players, flight = make_players(), make_flight(carry=0)
    for step in range(1, TOTAL + 1):
        taken = one_step(players, flight, step)
        assert [group.key for group in taken] == [0, 1, 2] and flight.groups == []
        assert [group.number for group in taken] == [P * (step - 1) + p for p in range(P)]


def test_the_groups_that_are_played_in_one_step_have_different_keys():
    players, flight = make_players(), make_flight(carry=3, staleness=3)
    for step in range(1, TOTAL + 1):
        keys = [group.key for group in flight.begin(step)]
        assert len(set(keys)) == len(keys) and min(keys) >= 0
        one_step(players, flight, step)
    draws = players.sampler.draws
    assert len(set(draws)) == len(draws)  # no key draws twice


def test_a_token_has_the_log_probability_of_the_policy_that_drew_it():
    mixed = 0
    for step, found in enumerate(whole_run(), start=1):
        for _, _, logp, policy, mask, *_ in found:
            for one, by, written in zip(logp, policy, mask, strict=True):
                assert one == (-1.0 - by if written else 0.0)
            mixed += len({by for by, written in zip(policy, mask, strict=True) if written}) > 1
            assert max(policy) <= step
    assert mixed > 0


@settings(deadline=None, max_examples=12)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(0, 3), st.booleans())
def test_a_run_that_is_stopped_in_any_rounds_and_started_again_plays_the_same(stops, carry, caches):
    """Each start has `stops[i]` rounds before it is told to stop; everything goes through bytes. caches: whether the
    caches are kept too, so that nothing is read again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episode_module, "parse_turn", world.read_turn)
        want, found, questions, held = whole_run(carry), [], Questions(), None
        flight, step = make_flight(carry, questions=questions), 0
        for rounds in [*stops, None]:
            count = itertools.count(1)
            players = make_players(lambda: Wish.STOP if rounds and next(count) > rounds else Wish.NOTHING)  # noqa: B023
            if held is not None:
                players.sampler.held, players.sampler.prompt = held.held, held.prompt
            try:
                while step < TOTAL:
                    found.append(told(one_step(players, flight, step + 1)))
                    step += 1
            except Stopped:
                data, questions = flight.pack(), Questions(questions.at)
                flight = make_flight(carry, questions=questions)
                flight.unpack(data, players.reopen)
                assert flight.counts.places is not None
                held = players.sampler if caches else None
                flight.counts.places = flight.counts.places if caches else None
        assert found == want


def test_what_is_saved_in_a_rollout_is_what_a_stop_would_save():
    saved, players, flight = [], make_players(lambda: Wish.SAVE), make_flight()
    taken = [told(one_step(players, flight, step, lambda: saved.append(flight.pack()))) for step in (1, 2)]
    assert len(saved) > 4 and taken == whole_run()[:2]
    again = make_flight(questions=Questions(P * 3))
    again.unpack(saved[len(saved) // 4], players.reopen)
    again.counts.places = None  # the caches are not kept
    assert told(one_step(make_players(), again, 1)) == taken[0]


def idle(carry: int) -> float:
    """The share of slot-steps of a whole run in which no token was drawn."""
    players, flight, steps, drawn = make_players(), make_flight(carry), 0, 0
    for step in range(1, TOTAL + 1):
        one_step(players, flight, step)
        steps, drawn = steps + flight.counts.steps, drawn + flight.counts.drawn
    return 1 - drawn / (steps * players.sampler.slots)


def test_fewer_slots_are_idle_the_more_groups_are_carried():
    assert idle(3) < 0.9 * idle(0)


class Slow(world.Say):
    """Waits until it is let go."""

    def __init__(self):
        super().__init__()
        self.called, self.gate = threading.Event(), threading.Event()

    def __call__(self, arguments, images):
        self.called.set()
        self.gate.wait(timeout=60)
        return super().__call__(arguments, images)


def test_a_stop_does_not_wait_for_a_tool_and_its_call_runs_again():
    tool = Slow()
    players = make_players(lambda: Wish.STOP if tool.called.is_set() else Wish.NOTHING, tool)
    flight, began, step = make_flight(), time.perf_counter(), 1
    with pytest.raises(Stopped):
        one_step(players, flight, step)
    players.runner.abandon()
    assert time.perf_counter() - began < 30
    assert any(conversation.waits for group in flight.groups for conversation in group.conversations)
    again = make_flight(questions=Questions(P * 2))
    again.unpack(flight.pack(), players.reopen)
    again.counts.places = None  # the caches are not kept
    tool.gate.set()
    assert told(one_step(make_players(), again, step)) == whole_run()[step - 1]


def test_a_call_that_hangs_does_not_outlive_an_abandoned_runner():
    tool = Slow()
    runner = world.runner(tool, timeout_s=50.0)
    future = runner.submit(ToolCall("say", {"length": 1}), ())
    waiting = [runner.submit(ToolCall("say", {"length": 2}), ()) for _ in range(4)]
    assert tool.called.wait(timeout=10)
    began = time.perf_counter()
    runner.abandon()
    assert future.result(timeout=10)[1].error == "timeout" and time.perf_counter() - began < 5
    assert waiting[-1].cancelled()
    tool.gate.set()


def test_bytes_give_back_every_field():
    image = Image(world.picture(9, 8, 12), 77, (0.25, 0.0, 0.5, 1 / 3))
    prompt = Questions().read(2)
    parameters = (Region(5, (0.1, 0.2, 0.3, 0.4)), Text("é\ud800"), Identity("a"), Number(1.5, 0.0, 2.0))
    call = ToolCall("zoom", {"box": [1, 2], "deep": {"a": None}}, parameters)
    turns = [
        Turn(2, 4, "said", call, ToolResult(parts=("see ", image, "!"), seconds=0.5), opening="<think>", forced=(2, 3)),
        Turn(5, 6, "more", None, ToolResult("Error", error="unparsable")),
        Turn(7, 8, "last", ToolCall("crop", {}), ToolResult("cut", (image,))),
    ]
    rest = {"images": [image, image], "image_start": [4, 6], "turns": turns, "answer": None, "finish": "turns"}
    token_T, logp_T = np.arange(9, dtype=np.int32), np.linspace(-3, 0, 9, dtype=np.float32)
    episode = Episode(
        prompt, 1, token_T, token_T > 3, logp_T, **rest, rewards={"accuracy": 0.5}, judged=False, policy_T=token_T // 4
    )
    players, flight = make_players(), make_flight(total=1)
    (group, *_) = flight.begin(1)
    group.prompt, group.row, group.seats, group.begun = prompt, 2, [None, episode], 3
    (found,), about = unpack(pack([group], {"a": 1}), Questions().read, players.reopen)
    assert about == {"a": 1} and (found.number, found.begun, found.seats[0]) == (group.number, 3, None)
    got = found.seats[1]
    for name in ("token_T", "mask_T", "sampler_logp_T", "policy_T"):
        np.testing.assert_array_equal(getattr(got, name), getattr(episode, name))
        assert getattr(got, name).dtype == getattr(episode, name).dtype
    assert got.rewards == {"accuracy": 0.5} and got.judged is False and got.turns[0].call == call
    assert [turn.forced for turn in got.turns] == [(2, 3), None, None]
    part = got.turns[0].result.parts[1]
    assert (part.root, part.box, got.turns[0].result.text) == (77, image.box, "see !")
    np.testing.assert_array_equal(part.pixels, image.pixels)
    assert got.turns[2].result.images[0] is part  # each image is kept once
    assert isinstance(players.reopen(prompt, 0), Conversation)


@pytest.mark.parametrize("damage", ["cut", "one bit", "another question", "another group size"])
def test_damaged_bytes_are_an_error(damage):
    players, flight = make_players(), make_flight()
    one_step(players, flight, 1)
    data, again = bytearray(flight.pack()), make_flight()
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "one bit":
        data[len(data) // 3] ^= 1
    elif damage == "another question":
        again._source.read = lambda row: Prompt("other", "what else?", (), ("x",))
    else:
        again._group_size = 3
    with pytest.raises(ValueError, match=r"cannot be read|another one|another size"):
        again.unpack(bytes(data), players.reopen)
