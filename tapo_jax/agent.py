"""Build all that plays episodes except the weights: tokenizer, image processor, tools, sampler, budgets, rewards.

It is built once from a config; training and evaluation share it.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from tapo_jax import processes, rewards, sharding
from tapo_jax.config import UserError
from tapo_jax.data import sources
from tapo_jax.models import hf, lora
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.image_processor import ImageProcessor
from tapo_jax.models.inputs import PixelStore, most_patches
from tapo_jax.models.qwen3_vl import Qwen3VL
from tapo_jax.rewards.judged import JudgedScore, Scored
from tapo_jax.rewards.pool import ScorePool, ScoreStream
from tapo_jax.rollout.chat import Chat
from tapo_jax.rollout.episode import Limits
from tapo_jax.rollout.flight import Flight
from tapo_jax.rollout.players import Players, Wish, nothing
from tapo_jax.rollout.progress import Moment
from tapo_jax.rollout.rounds import Stopped, play_groups, rollout, stream
from tapo_jax.rollout.sampler import Sampler, make_shapes, with_pages
from tapo_jax.rollout.schedule import Sampling, Shapes
from tapo_jax.rollout.summary import summary
from tapo_jax.tools.base import Tool, ToolRunner, stop
from tapo_jax.tools.watch import Watch
from tapo_jax.types import Episode, Prompt

# What stays in memory: bytes of processed images, results of calls, and bytes of pixels in play.
TRAINING = {"patch_bytes": 1 << 30, "results": 4096, "image_bytes": float("inf")}
EVALUATING = {"patch_bytes": 1 << 26, "results": 64, "image_bytes": float(1 << 29)}


def load_model(directory: Path, model: ConfigDict, mesh: Mesh) -> tuple[Qwen3VL, Qwen3VLConfig]:
    """Load the model of a directory onto the mesh, with low-rank parameters if model.lora_rank is set.

    Raises UserError if the files are not a model of this family.
    """
    try:
        loaded, config = hf.load(directory, mesh=mesh, dtype=model.param_dtype, compute_dtype=model.dtype)
        if model.lora_rank:
            lora.add(loaded, model.lora_rank, modules=model.lora_modules, alpha=model.lora_alpha)
        return loaded, config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The model directory {directory} cannot be loaded ({error}): give a Qwen3-VL model."
        ) from error


@dataclasses.dataclass(frozen=True)
class Agent:
    """One player of episodes, with the rewards of its episodes."""

    players: Players
    """All that plays except the weights."""
    score: Callable[[Episode], dict[str, float] | Scored]
    """Returns the named rewards of an episode."""
    weights: Mapping[str, float]
    """Reward name -> weight in the total."""
    score_workers: int = 1
    """Threads that score; more than one only if `score` is thread-safe."""
    watch: Watch = dataclasses.field(default_factory=lambda: Watch({}, max_failures=1.0, window=1))
    """Of the services that the tools ask."""

    def play(
        self, params: Any, prompts: Sequence[Prompt], group_size: int, sampling: Sampling, *, keep_images: bool = True
    ) -> tuple[list[Episode], dict[str, float]]:
        """Play and score `group_size` episodes of each of this process's prompts, prompt-major.

        Returns them and the rollout's metrics. In a pod all processes must call this together, and an error of the
        scoring in one of them is raised in all.

        keep_images: False releases the images of each episode when it has its rewards.
        """
        with self._scoring(self.score if keep_images else _forgetting(self.score)) as pool:
            episodes, metrics = rollout(self.players, params, prompts, group_size, sampling, pool.submit)
            self.players.sampler.release()
            failure = _failure(pool.wait, episodes)
        processes.raise_together(failure)
        return self._totalled(episodes), metrics | {"time/reward": pool.waited_s}

    def play_on(
        self, params: Any, flight: Flight, sampling: Sampling, save: Callable[[], None] | None = None
    ) -> tuple[list[Episode], dict[str, float]]:
        """Play what is in flight until enough groups are complete; return the episodes of the groups to train on.

        save: called between two rounds in which what is in flight is to be saved.

        Episodes are in prompt-major order, oldest first, and those that stay in flight are scored too. In a pod all
        processes must call this together, and an error of the scoring in one of them is raised in all.
        """
        groups, began = flight.begin(sampling.step), time.perf_counter()
        if flight.slots is not None and flight.counts.places is not None:
            self.players.sampler.set_state(flight.slots)
        else:
            flight.counts.places = None
        flight.slots = None
        with self._scoring(self.score) as pool:
            seconds = play_groups(
                self.players,
                params,
                groups,
                sampling,
                until=flight.until,
                counts=flight.counts,
                on_episode=pool.submit,
                save=save,
            )
            taken = flight.take()
            episodes = [episode for group in taken for episode in group.episodes]
            runner = self.players.runner
            played = summary(episodes, tuple(runner.tools), time.perf_counter() - began, runner.services)
            self.players.sampler.release()
            failure = _failure(pool.wait, [episode for episode in episodes if not episode.rewards] + flight.unscored())
        processes.raise_together(failure)
        metrics = seconds | played | {"time/reward": pool.waited_s}
        if flight.carries:
            metrics |= flight.metrics(taken, self.players.sampler.slots)
        if self.players.sampler.shapes.page:
            metrics |= flight.page_metrics()
        return self._totalled(episodes), metrics

    @contextlib.contextmanager
    def _scoring(self, score: "Scorer") -> Iterator[ScorePool]:
        """Score on threads; a rollout that is stopped leaves neither them nor its tool calls to wait for."""
        pool, patient = ScorePool(score, self.score_workers), True
        try:
            yield pool
        except Stopped:
            self.players.runner.abandon()
            patient = False
            raise
        finally:
            pool.close(wait=patient)

    def _totalled(self, episodes: list[Episode]) -> list[Episode]:
        self.watch.note(episodes)
        for episode in episodes:
            episode.reward = rewards.total(episode.rewards, self.weights)
        return episodes

    def stream(
        self,
        params: Any,
        prompts: Sequence[Prompt],
        starts: Sequence[tuple[int, int]],
        sampling: Sampling,
        on_episode: Callable[[int, Episode], None],
    ) -> None:
        """Play and score episodes and keep none. In a pod all processes must call this together.

        An error of the scoring ends the rollout within a round, and is raised in every process.

        starts: (index of the prompt, sample) of each episode, in the order in which they start.
        on_episode: called with the index in `starts` and the scored episode, for one at a time, on another thread.
        """

        def scored(index: int, episode: Episode) -> None:
            self._totalled([episode])
            on_episode(index, episode)

        scores = ScoreStream(self.score, self.score_workers, scored)
        players = dataclasses.replace(self.players, wish=lambda: Wish.STOP if scores.failed else Wish.NOTHING)
        try:
            with contextlib.suppress(Stopped):
                stream(players, params, prompts, starts, sampling, scores.submit)
            self.players.sampler.release()
            failure = _failure(scores.finish)
        finally:
            scores.close()
        processes.raise_together(failure)

    def broken_service(self) -> str:
        """Return a sentence about a service that fails too often in some process, "" if there is none.

        Every process must call this, and gets the same.
        """
        if not self.players.runner.services:
            return ""
        return next(filter(None, processes.gather(self.watch.broken())), "")

    def watched(self, watch: Callable[[Moment], None]) -> "Agent":
        """Return the same agent, whose rollouts tell where they are, as in `Players`."""
        return dataclasses.replace(self, players=dataclasses.replace(self.players, watch=watch))

    def close(self) -> None:
        """Close the judge, if there is one. Nothing can be played afterwards."""
        if isinstance(self.score, JudgedScore):
            self.score.close()


Scorer = Callable[[Episode], dict[str, float] | Scored]


def _failure(function: Callable[..., None], *arguments: Any) -> Exception | None:
    """Call a function; return what it raised."""
    try:
        function(*arguments)
    except Exception as error:
        return error
    return None


def _forgetting(score: Scorer) -> Scorer:
    """Return a scorer that releases the images of an episode when it has scored it."""

    def scored(episode: Episode) -> dict[str, float] | Scored:
        found = score(episode)
        episode.forget_images()
        return found

    return scored


def rollout_mesh(config: ConfigDict, model_config: Qwen3VLConfig, mesh: Mesh) -> Mesh:
    """Return the mesh of the rollout: that of rollout.mesh over the devices of the training's `mesh`.

    Raises UserError if its sizes do not fit the devices, or it splits the model's heads unevenly.
    """
    chosen, heads = config.rollout.mesh, model_config.kv_heads
    if chosen.tensor and heads % chosen.tensor:
        sizes = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        raise UserError(
            f"rollout.mesh.tensor is {chosen.tensor} and the model has {heads} key/value heads, which are split over "
            f"it: choose one of {sizes}."
        )
    return sharding.rollout_mesh(mesh, data=chosen.data, tensor=chosen.tensor)


def open_tools(config: ConfigDict, at_end: contextlib.ExitStack) -> list[Tool]:
    """Return the tools of a config after a first question to each of their services. Every process must call this.

    at_end: gets what stops them when they are no longer needed.

    Raises UserError in every process if a service does not answer one of them.
    """
    tools, found = sources.tools(config), ""
    at_end.callback(stop, tools)
    probes = [tool.probe for tool in tools if "probe" in dir(tool)]
    for probe in probes:
        try:
            probe()
        except UserError as error:
            found = found or str(error)
    if probes and (found := next(filter(None, processes.gather(found)), "")):
        raise UserError(found)
    return tools


def sampler_shapes(config: ConfigDict, model_config: Qwen3VLConfig, mesh: Mesh, image_patches: int) -> Shapes:
    """Return the shapes of the sampler's calls on the rollout's mesh. image_patches: patches of the largest image."""
    r = config.rollout
    shapes = make_shapes(
        model_config,
        mesh,
        slots=r.slots,
        capacity=r.max_length,
        chunk=r.decode_chunk,
        image_patches=image_patches,
        most_patches=most_patches(r.max_image_tokens, r.max_length, model_config.vision.merge),
    )
    return with_pages(shapes, model_config, mesh, r.page_size, r.pages)


def make_agent(
    config: ConfigDict,
    directory: Path,
    model: Qwen3VL,
    tools: Sequence[Tool],
    mesh: Mesh,
    at_end: contextlib.ExitStack | None = None,
    *,
    evaluating: bool = False,
    wish: Callable[[], Wish] = nothing,
) -> Agent:
    """Make the agent of a config.

    mesh: that of training.
    at_end: gets what ends the calls of tools and closes the judge; None: they are left open.
    evaluating: with the judge of evaluations.
    wish: asked once a round of a rollout.

    Raises UserError for a directory without a usable tokenizer, a rollout.mesh that does not fit the devices or the
    model, slots or pages that it does not divide, pages that do not hold a conversation, or a judge whose key is not
    set.
    """
    chat = Chat.from_dir(directory)
    r = config.rollout
    processor = ImageProcessor.from_dir(directory)
    if r.max_pixels:
        processor = processor.limited(r.max_pixels)
    # An evaluation meets most images and calls once; training computes every image of a batch again in its updates.
    kept = EVALUATING if evaluating else TRAINING
    pixels = PixelStore(processor, max_bytes=kept["patch_bytes"], dtype=model.dtype)
    mesh = rollout_mesh(config, model.config, mesh)
    sampler = Sampler(
        model,
        mesh,
        sampler_shapes(config, model.config, mesh, pixels.max_patches),
        stop_ids=chat.stop_ids,
        forbidden_V=chat.forbidden_V(model.config.vocab),
    )
    runner = ToolRunner(
        tools,
        workers=config.tools.workers,
        timeout_s=config.tools.timeout_s,
        retries=config.tools.retries,
        cache=kept["results"],
        kinds=config.tools.kinds.to_dict(),
    )
    if at_end is not None:
        at_end.callback(runner.close)
    limits = Limits(
        r.max_turns,
        r.max_new_tokens,
        r.max_length,
        r.max_image_tokens or None,
        r.max_think_tokens or None,
        parallel_calls=config.tools.parallel_calls,
        max_response_tokens=config.tools.max_response_tokens or None,
    )
    players = Players(
        sampler,
        chat,
        pixels,
        runner,
        limits,
        system=r.system,
        tool_wait_s=r.tool_wait_s,
        most_image_bytes=kept["image_bytes"],
        wish=wish,
    )
    score, workers = _scorer(config, evaluating=evaluating)
    services = {tool.service: tool.address for tool in tools if {"service", "address"} <= set(dir(tool))}
    watch = Watch(services, max_failures=config.tools.max_failures, window=config.tools.failure_window)
    agent = Agent(players, score, dict(config.reward.weights), workers, watch)
    if at_end is not None:
        at_end.callback(agent.close)
    return agent


def examiner(agent: Agent, config: ConfigDict) -> Agent:
    """Return the same agent with the judge of evaluations; the agent itself if the config has no such judge."""
    if not config.eval.judge.endpoint:
        return agent
    score, workers = _scorer(config, evaluating=True)
    return dataclasses.replace(agent, score=score, score_workers=workers)


def _scorer(config: ConfigDict, *, evaluating: bool) -> tuple[Callable[[Episode], dict[str, float] | Scored], int]:
    """Return the function that scores and its number of threads. A key that one process lacks is an error of all."""
    failure = None
    try:
        made = sources.score(config, evaluating=evaluating), sources.score_workers(config, evaluating=evaluating)
    except UserError as error:
        failure = error
    processes.raise_together(failure)
    return made
