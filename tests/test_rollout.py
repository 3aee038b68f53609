"""Rollouts of a random model whose text is read as calls and answers (`rollout_world.read_turn`)."""

import dataclasses
import functools
import gc
import json
import os
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rollout_world as world
from flax import nnx

from tapo_jax import metrics, sharding
from tapo_jax.config import UserError
from tapo_jax.learn import batches
from tapo_jax.learn.logprobs import token_logp
from tapo_jax.models import qwen3_vl
from tapo_jax.rollout import episode as episode_module
from tapo_jax.rollout import rounds
from tapo_jax.rollout.chat import ParsedTurn
from tapo_jax.rollout.episode import Limits
from tapo_jax.rollout.players import Players
from tapo_jax.rollout.rounds import rollout
from tapo_jax.rollout.sampler import Sampler, make_shapes
from tapo_jax.rollout.schedule import Sampling, Shapes
from tapo_jax.tools.base import ToolRunner
from tapo_jax.types import Identity, Images, Prompt

CAPACITY, CHUNK, STEPS = 192, 5, 5
CHAT = world.chat(40)  # a turn ends after about 6 tokens
LIMITS = Limits(max_turns=5, max_new_tokens=24, max_length=CAPACITY)
# Two rungs of each kind, so that episodes of this size meet every path: some slots, all slots, short and long windows.
SHAPES = Shapes(
    extend_rows=(2, 6), decode_rows=(2, 6), lengths=(48, CAPACITY), patches=(64, 128), windows=(96, CAPACITY),
    chunk=CHUNK, merge=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def random_text_means_something(monkeypatch):
    monkeypatch.setattr(episode_module, "parse_turn", world.read_turn)


def make_sampler(cls=Sampler, *, shapes=SHAPES, mesh=None):
    mesh = mesh or sharding.one_device()
    return cls(world.model(), mesh, shapes, stop_ids=CHAT.stop_ids, forbidden_V=CHAT.forbidden_V(272))


def play(sampler, params=None, count=4, *, prompts=None, group_size=3, **options):
    """options: fields of `Players` and `Sampling` that differ from the usual ones."""
    numbers = {"seed": 3} | {f.name: options.pop(f.name) for f in dataclasses.fields(Sampling) if f.name in options}
    parts = {"chat": CHAT, "pixels": world.pixels(), "runner": world.runner(), "limits": LIMITS} | options
    players = Players(sampler, **parts)
    params = world.params() if params is None else params
    return rollout(players, params, prompts or world.prompts(count), group_size, Sampling(**numbers))


@pytest.fixture(scope="module")
def sampler():
    return make_sampler()


@pytest.fixture(scope="module")
def sampled(sampler):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episode_module, "parse_turn", world.read_turn)
        return play(sampler)


def pack(episodes):
    return batches.pack(episodes, world.config(), world.pixels(), length=CAPACITY, patches=256, steps=STEPS)


@jax.jit
def full_forward(params, model_inputs):
    """Every token's greedy successor and log-probability, without a cache."""
    model = nnx.merge(nnx.graphdef(world.model()), params)
    hidden_BxTxD = qwen3_vl.hidden_states(model, model_inputs)
    forbidden_V = jnp.array(CHAT.forbidden_V(272))
    logits_BxTxV = jnp.where(forbidden_V[None, None], -jnp.inf, qwen3_vl.logits(model, hidden_BxTxD))
    logp_BxT, _ = token_logp(model, hidden_BxTxD, model_inputs.token_BxT, temperature=0.8, forbidden_V=forbidden_V)
    return jnp.argmax(logits_BxTxV, axis=-1), logp_BxT


def middle_images(episode):
    return len(episode.images) - len(episode.prompt.images)


def same(first, second):
    return all(
        np.array_equal(a.token_T, b.token_T)
        and np.array_equal(a.sampler_logp_T, b.sampler_logp_T)
        and a.finish == b.finish
        for a, b in zip(first, second, strict=True)
    )


def same_tokens(first, second):
    return all(np.array_equal(a.token_T, b.token_T) for a, b in zip(first, second, strict=True))


def test_greedy_multi_turn_equals_a_rollout_without_cache(sampler):
    """By induction over places: the whole forward pass over a token's true history, images included, must choose it."""
    episodes, _ = play(sampler, temperature=0.0, group_size=1, count=12)
    assert max(len(episode.turns) for episode in episodes) >= 3
    assert sum(middle_images(episode) for episode in episodes) >= 3
    batch = pack(episodes)
    best_BxT, _ = full_forward(world.params(), batch.inputs)
    written = batch.mask_BxT[:, 1:]
    assert written.sum() > 60
    assert np.array_equal(np.asarray(best_BxT)[:, :-1][written], batch.inputs.token_BxT[:, 1:][written])


def test_the_trainers_log_probabilities_are_the_samplers(sampler):
    episodes, _ = play(sampler, temperature=0.8)
    assert sum(middle_images(episode) for episode in episodes) >= 3
    batch = pack(episodes)
    _, logp_BxT = full_forward(world.params(), batch.inputs)
    np.testing.assert_allclose(
        np.where(batch.mask_BxT, logp_BxT, 0),
        batch.sampler_logp_BxT,
        atol=1e-4,
        rtol=0,
        err_msg="sampler and trainer disagree",
    )
    assert np.ptp(batch.sampler_logp_BxT[batch.mask_BxT]) > 1  # not all alike: the comparison says something


class Recorder(Sampler):
    """Keeps what the device was given and gave: `seen` are the finished id sequences of all slots."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.now, self.seen, self.prompts = {}, [], {}

    def begin(self, slot, ids):
        self.seen.append(self.now.get(slot, []))
        self.now[slot] = list(ids)

    def extend(self, params, plan, extensions):
        super().extend(params, plan, extensions)
        for extension in extensions:
            ids = extension.row.token_T.tolist()
            if extension.fresh:
                self.begin(extension.slot, ids)
                continue
            held, (again, *new) = self.now[extension.slot], ids
            assert extension.before == len(held) - 1 and again == held[-1]  # the turn's last token was not in the cache
            held.extend(new)
        self.prompts |= {e.slot: e.row.token_T.tolist() for e in extensions if e.fresh}

    def copy(self, plan, copies):
        super().copy(plan, copies)
        prompts = {target: self.prompts[source] for source, target in copies}
        self.prompts |= prompts
        for target, ids in prompts.items():
            self.begin(target, ids)

    def decode(self, params, plan, draws, sampling):
        chunk = super().decode(params, plan, draws, sampling)
        for drawn, (token_n, _) in zip(draws, chunk.fetch(), strict=True):
            assert drawn.length == len(self.now[drawn.slot])
            self.now[drawn.slot].extend(token_n.tolist())
        return chunk


def test_the_trainer_reads_the_ids_that_the_sampler_saw():
    """Every id sequence that went through a slot is a row of the batch, and the other way round."""
    recorder = make_sampler(Recorder)
    episodes, _ = play(recorder)
    for slot in list(recorder.now):
        recorder.begin(slot, [])
    batch = pack(episodes)
    rows = [
        row[segment > 0].tolist() for row, segment in zip(batch.inputs.token_BxT, batch.inputs.segment_BxT, strict=True)
    ]
    # A response that was appended but never extended cannot be there: an episode ends with a token of the policy.
    assert sorted(rows) == sorted(ids for ids in recorder.seen if ids)
    assert rows == [episode.token_T.tolist() for episode in episodes]


def test_the_policys_tokens_alone_are_in_the_mask_and_stop_tokens_too(sampled):
    episodes, _ = sampled
    stopped = 0
    for episode in episodes:
        assert not episode.mask_T[0] and episode.mask_T.sum() == sum(turn.stop - turn.start for turn in episode.turns)
        for turn in episode.turns:
            assert episode.mask_T[turn.start : turn.stop].all() and not episode.mask_T[turn.start - 1]
            inside = np.isin(episode.token_T[turn.start : turn.stop - 1], CHAT.stop_ids)
            assert not inside.any()
            stopped += int(episode.token_T[turn.stop - 1]) in CHAT.stop_ids
    assert stopped > 10


def test_no_forbidden_token_is_ever_written(sampled):
    episodes, _ = sampled
    written = np.concatenate([episode.token_T[episode.mask_T] for episode in episodes])
    assert len(written) > 100 and not CHAT.forbidden_V(272)[written].any()


def test_it_repeats_and_depends_on_seed_step_and_sample(sampler, sampled):
    episodes, _ = sampled
    assert same(episodes, play(sampler)[0])
    assert not same_tokens(episodes, play(sampler, step=1)[0])
    assert not same_tokens(episodes, play(sampler, seed=4)[0])
    for p in range(4):
        group = {tuple(episode.token_T.tolist()) for episode in episodes[3 * p : 3 * p + 3]}
        assert len(group) == 3
    order = [(episode.prompt.id, episode.sample) for episode in episodes]
    assert order == [(f"q{p}", g) for p in range(4) for g in range(3)]


def test_a_key_belongs_to_the_prompts_number_not_to_its_place(sampler, sampled):
    """Another process that holds the last two prompts draws the same tokens for them."""
    episodes, _ = sampled
    rest, _ = play(sampler, prompts=world.prompts(4)[2:], first_prompt=2)
    assert same_tokens(episodes[6:], rest)


def test_slots_are_reused_and_their_number_changes_nothing(sampled):
    episodes, _ = sampled
    few = Shapes(
        extend_rows=(2,),
        decode_rows=(2,),
        lengths=(64, CAPACITY),
        patches=(128,),
        windows=(CAPACITY,),
        chunk=16,
        merge=2,
    )
    assert same_tokens(episodes, play(make_sampler(shapes=few))[0])


def test_slots_over_eight_devices_play_the_same_episodes(sampled):
    episodes, _ = sampled
    mesh = sharding.make_mesh(data=4, fsdp=2)
    shapes = Shapes(
        extend_rows=(1,),
        decode_rows=(1, 2),
        lengths=(CAPACITY,),
        patches=(128,),
        windows=(CAPACITY,),
        chunk=CHUNK,
        merge=2,
    )
    params = jax.device_put(world.params(), sharding.replicated(mesh))
    spread = make_sampler(shapes=shapes, mesh=mesh)
    found, _ = play(spread, params)
    assert same_tokens(episodes, found)
    compiled = metrics.compile_count()
    play(spread, params)
    assert metrics.compile_count() == compiled


def test_nothing_compiles_after_warm_up_and_no_transfer_is_implicit(sampled):
    """Another step's episodes have other lengths; the calls have the same shapes."""
    shapes = Shapes(
        extend_rows=(3,),
        decode_rows=(3,),
        lengths=(CAPACITY,),
        patches=(128,),
        windows=(CAPACITY,),
        chunk=CHUNK,
        merge=2,
    )
    fresh = make_sampler(shapes=shapes)
    params = world.params()
    fresh.warm_up(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(fresh._state))  # empty rows write nothing
    compiled = metrics.compile_count()
    with jax.transfer_guard("disallow"):
        for step in range(3):
            play(fresh, params, step=step, count=2)
    assert metrics.compile_count() == compiled
    jax.jit(lambda x: x + compiled)(jnp.ones(3))  # the counter counts
    assert metrics.compile_count() > compiled


@pytest.mark.parametrize(
    ("say", "timeout_s", "kind"), [(world.Say(broken=True), 5.0, "exception"), (world.Say(slow=0.5), 0.05, "timeout")]
)
def test_a_failing_tool_is_an_observation(sampler, say, timeout_s, kind):
    episodes, numbers = play(sampler, runner=world.runner(say, timeout_s), count=3)
    failed = [
        (e, k)
        for e in episodes
        for k, turn in enumerate(e.turns)
        if turn.call and turn.call.name == "say" and turn.result
    ]
    assert failed and all(episode.turns[k].result.error == kind for episode, k in failed)
    assert numbers[f"tools/errors/{kind}"] == pytest.approx(len(failed) / len(episodes))
    assert not any(episode.turns[k].is_step for episode, k in failed)
    read_on = [(episode, k) for episode, k in failed if k + 1 < len(episode.turns)]
    assert read_on  # and the policy read the sentence
    for episode, k in read_on:
        between = CHAT.decode(episode.token_T[episode.turns[k].stop : episode.turns[k + 1].start])
        assert episode.turns[k].result.text in between


def test_finite_tool_wait_does_not_stop_for_a_slow_tool(sampler, sampled):
    """Slow calls come back in a later round than quick ones; the episodes are the same, because the keys do not know
    time."""
    started = time.perf_counter()
    episodes, numbers = play(sampler, runner=world.runner(world.Say(slow=0.2)), tool_wait_s=0.0)
    assert same_tokens(sampled[0], episodes)
    assert time.perf_counter() - started < 60 and numbers["tools/errors/timeout"] == 0


def test_instructions_come_first_and_are_not_the_policys(sampler):
    episodes, _ = play(sampler, count=1, group_size=1, system="Be brief.")
    plain, _ = play(sampler, count=1, group_size=1)
    first = int(np.argmax(episodes[0].mask_T))
    assert CHAT.decode(episodes[0].token_T[:first]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert first > int(np.argmax(plain[0].mask_T))


def test_budgets(sampler):
    """finish says which budget ended an episode, and no episode is longer than max_length."""
    tight = Limits(max_turns=2, max_new_tokens=6, max_length=100)
    episodes, numbers = play(sampler, limits=tight, count=3)
    assert max(len(episode.token_T) for episode in episodes) <= 100
    assert max(len(episode.turns) for episode in episodes) == 2
    assert {episode.finish for episode in episodes} >= {"length", "turns"}
    for episode in episodes:
        last = episode.turns[-1]
        if episode.finish == "turns":
            assert len(episode.turns) == 2 and last.result is None
        if last.stop - last.start == 6 and int(episode.token_T[-1]) not in CHAT.stop_ids:
            assert episode.finish == "length"
        # Every image has all its placeholders.
        counts = sum(world.pixels().tokens(image) for image in episode.images)
        assert (episode.token_T == world.config().image_token).sum() == counts
    shares = [numbers[f"rollout/finish_{name}"] for name in ("answer", "length", "turns", "malformed")]
    assert sum(shares) == pytest.approx(1)


def test_a_prompt_without_room_gives_an_empty_episode(sampler):
    long = Prompt("long", "why " * 50, (world.picture(0),), ("x",))  # 200 bytes do not fit into 192 tokens
    episodes, numbers = play(sampler, prompts=[*world.prompts(1), long, *world.prompts(1)], group_size=2)
    assert [len(episode.token_T) == 0 for episode in episodes] == [False, False, True, True, False, False]
    empty = episodes[2]
    assert (empty.finish, empty.turns, empty.images, empty.answer) == ("length", [], [], None)
    assert not pack(episodes).inputs.segment_BxT[2].any()
    assert numbers["rollout/finish_length"] >= 2 / 6


def test_an_episode_longer_than_a_slot_is_refused(sampler):
    with pytest.raises(UserError, match="max_length is 500"):
        play(sampler, limits=Limits(2, 6, 500))


def test_slots_that_the_mesh_does_not_divide_are_refused():
    sizes = {"capacity": CAPACITY, "chunk": CHUNK, "image_patches": 36, "most_patches": 4 * CAPACITY}
    with pytest.raises(UserError, match="multiple of 8"):
        make_shapes(world.config(), sharding.make_mesh(data=8), slots=12, **sizes)


@pytest.mark.parametrize(
    ("tensor", "page"), [(0, 0), (2, 0), (2, 16)], ids=["training's layout", "its own layout", "and pages"]
)
def test_two_processes_in_lockstep_play_the_episodes_of_one(sampled, tensor, page, tmp_path):
    """The first process has three prompts and the second one: it goes on making calls after its own episodes have
    ended. In the layout of its own both processes work on the rows of either."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = Path(__file__).with_name("rollout_process.py")
    parts = [(0, 3), (3, 4)]
    started = []
    for rank, (first, stop) in enumerate(parts):
        log = open(tmp_path / f"{rank}.log", "w")  # noqa: SIM115  (the process writes to it)
        arguments = [port, str(rank), str(first), str(stop), str(tmp_path / f"{rank}.json"), str(tensor), str(page)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        started.append(
            subprocess.Popen([sys.executable, str(script), *arguments], stdout=log, stderr=log, env=environment)
        )
    try:
        for rank, process in enumerate(started):
            assert process.wait(timeout=1200) == 0, (tmp_path / f"{rank}.log").read_text()[-2000:]
    finally:
        for process in started:
            process.kill()
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [part["slots"] for part in found] == [4, 4]
    assert [part["mesh"] for part in found] == [{"data": 4, "fsdp": 1 if tensor else 2, "tensor": max(tensor, 1)}] * 2
    assert found[0]["tokens"] + found[1]["tokens"] == [episode.token_T.tolist() for episode in sampled[0]]


class Listening(world.Say):
    """Keeps whose question it was called for."""

    needs_prompt = True

    def __init__(self):
        super().__init__()
        self.heard = set()

    def __call__(self, arguments, images, prompt):
        self.heard.add(prompt.id)
        return super().__call__(arguments, images)


def test_a_tool_that_needs_the_prompt_hears_whose_question_it_answers(sampler):
    tool = Listening()
    episodes, _ = play(sampler, count=9, runner=world.runner(tool))
    calls = [(e.prompt.id, turn.call) for e in episodes for turn in e.turns if turn.is_step]
    calls = [(name, call) for name, call in calls if call.name == "say"]
    assert len(tool.heard) > 1 and tool.heard == {name for name, _ in calls}
    assert all(call.parameters[-1] == Identity(name) for name, call in calls)


def streamed(sampler, prompts, starts, on_episode, most_image_bytes=float("inf"), **numbers):
    runner = ToolRunner([world.Crop(), world.Say()], workers=2, timeout_s=5.0, retries=0, cache=0)
    players = Players(sampler, CHAT, world.pixels(), runner, LIMITS, most_image_bytes=most_image_bytes)
    rounds.stream(players, world.params(), prompts, starts, Sampling(seed=3, **numbers), on_episode)


def test_the_random_keys_of_a_question_are_its_own_whatever_else_is_played(sampler):
    """Three of ten episodes again, in another order and among others: the same tokens."""

    def played(prompts, keys, starts):
        found = {}

        def keep(index, episode):
            prompt, sample = starts[index]
            assert episode.sample == sample and episode.prompt is prompts[prompt]
            found[keys[prompt], sample] = episode.token_T.tolist()

        streamed(sampler, prompts, starts, keep, prompt_keys=keys)
        assert len(found) == len(starts)
        return found

    prompts = world.prompts(5)
    whole = played(prompts, (11, 12, 13, 14, 15), [(p, g) for p in range(5) for g in range(2)])
    again = played([*prompts[3:], prompts[0]], (14, 15, 11), [(1, 1), (0, 0), (2, 1)])
    assert again.items() <= whole.items() and len({tuple(tokens) for tokens in whole.values()}) == 10


@pytest.mark.parametrize(("most_image_bytes", "at_once"), [(float("inf"), 7), (2 * 24 * 24 * 3, 3), (1, 2)])
def test_a_stream_keeps_no_pixels_of_episodes_that_have_ended(sampler, monkeypatch, most_image_bytes, at_once):
    """Twenty questions of an image each in six slots: at most those in play, and the newest that was opened. With a
    bound of two images two play at a time, and with one that no image keeps, one."""
    monkeypatch.setattr(episode_module, "parse_turn", lambda text: ParsedTurn(answer="x"))
    alive, most, order = [], 0, []

    def image(seed):
        alive.append(weakref.ref(pixels := world.picture(seed)))
        return pixels

    def ended(index, episode):
        nonlocal most
        most = max(most, sum(one() is not None for one in alive))
        order.append(index)

    prompts = [Prompt(f"q{n}", "?", Images([functools.partial(image, n)]), ("x",)) for n in range(20)]
    streamed(sampler, prompts, [(n, 0) for n in range(20)], ended, most_image_bytes)
    assert sorted(order) == list(range(20)) and len(alive) == 20
    assert at_once - 1 <= most <= at_once
    gc.collect()
    assert not any(one() is not None for one in alive)
