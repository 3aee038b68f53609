"""Train the tiny model's cold start on experts in invented worlds. One file, read from top to bottom.

Batches come in five kinds with a schedule, short contexts first: sequences to copy, text after an image search, first
turns with a scene of one outline or of several, whole episodes. WORKDIR/export becomes a model directory, the one that
ships with the package.
"""

import hashlib
import json
import pathlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from optax import contrib

from tapo_jax import sharding
from tapo_jax.atlas.play import Settings
from tapo_jax.cold_start import tiny_model
from tapo_jax.cold_start.batches import Batch, ColdStart
from tapo_jax.cold_start.experts import Flaws
from tapo_jax.learn.logprobs import token_logp
from tapo_jax.models import hf, qwen3_vl
from tapo_jax.models.image_processor import ImageProcessor
from tapo_jax.models.shipped import model_directory
from tapo_jax.rollout.chat import Chat

DTYPE = "bfloat16"  # of the weights that are written


def mixture(step: int, config: Any) -> dict[str, float]:
    """Return the probabilities of the kinds of batch at a step: those of the first phase that has not ended."""
    for phase in config.phases:
        if step < phase.until:
            return dict(phase.mixture)
    return dict(config.phases[-1].mixture)


def make_optimizer(
    lr: float, warmup: int, total: int, vision_rate: float
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return Muon (Jordan et al. 2024) for the decoder's matrices, Adam for the rest, and their cosine schedule.

    Muon's update is scaled to a root mean square of 0.2, about Adam's, so both share a rate (Liu et al., arXiv
    2502.16982).

    lr: the peak rate.
    warmup, total: steps of warm-up and of the whole schedule.
    vision_rate: multiplies the vision tower's rate. At the full rate its features drift to one large constant before
        the decoder has learnt to read them, and are then never read.
    """
    schedule = optax.warmup_cosine_decay_schedule(lr / warmup, lr, warmup, total, end_value=0.02 * lr)

    def axes(path, leaf) -> contrib.MuonDimensionNumbers:
        if leaf.ndim == 3:
            return contrib.MuonDimensionNumbers(1, 2)
        joined_in = sharding.path_name(path).endswith("/o")
        return contrib.MuonDimensionNumbers((1, 2), 3) if joined_in else contrib.MuonDimensionNumbers(1, (2, 3))

    def kind(path, leaf) -> str:
        name = sharding.path_name(path)
        if name.startswith("vision/"):
            return "vision"
        return "muon" if name.startswith("decoder/") and "norm" not in name else "adam"

    muon = optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers=lambda tree: jax.tree_util.tree_map_with_path(axes, tree)),
        optax.scale(0.2 * 128**0.5),
        optax.scale_by_learning_rate(schedule),
    )
    adam = optax.adam(schedule, b1=0.9, b2=0.98)
    parts = {"muon": muon, "adam": adam, "vision": optax.chain(adam, optax.scale(vision_rate))}
    partition = optax.partition(parts, lambda tree: jax.tree_util.tree_map_with_path(kind, tree))
    return optax.chain(optax.clip_by_global_norm(1.0), partition), schedule


def batches(source: ColdStart, config: Any, start: int) -> Iterator[tuple[str, Batch]]:
    """Yield batches from step `start` on, each from its own seed; a separate thread draws them a few steps ahead."""
    ready: queue.Queue = queue.Queue(maxsize=4)

    def draw() -> None:
        for step in range(start, config.total_steps):
            rng = np.random.default_rng((config.seed, step))
            odds = mixture(step, config)
            kind = str(rng.choice(list(odds), p=np.array(list(odds.values())) / sum(odds.values())))
            ready.put((kind, getattr(source, kind)(rng, **config.shapes[kind])))

    threading.Thread(target=draw, daemon=True).start()
    for _ in range(start, config.total_steps):
        yield ready.get()


def run(config: Any, workdir: str) -> None:
    """Train and write WORKDIR/export; resume from WORKDIR/state.npz if it exists. Log the hash of the weights.

    config.start: "nothing" (random weights), "shipped" (those of the package) or "base": what config.base, a config of
    this kind, makes in WORKDIR/base.
    """
    # ------------------------------------------------------------------------------------------ model directory
    work = pathlib.Path(workdir)
    work.mkdir(parents=True, exist_ok=True)
    start_dir = work / "start"
    if config.start == "base":
        run(config.base, str(work / "base"))
        start_dir = work / "base" / "export"
    elif config.start == "shipped":
        start_dir = model_directory("")
    elif not (start_dir / "config.json").is_file():
        tiny_model.create(start_dir, config.seed)
    chat, processor = Chat.from_dir(start_dir), ImageProcessor.from_dir(start_dir)
    model, model_config = hf.load(start_dir)
    source = ColdStart(
        chat, model_config, processor, settings=Settings(**config.atlas), flaws=Flaws(**config.flaws), seed=config.seed,
        context_weight=config.context_weight,
    )  # fmt: skip
    # ------------------------------------------------------------------------------------------ step
    graph, params = nnx.split(model)
    optimizer, schedule = make_optimizer(config.lr, config.warmup_steps, config.total_steps, config.vision_rate)
    opt_state = optimizer.init(params)

    def loss_fn(params, batch: Batch):
        model = nnx.merge(graph, params)
        hidden_BxTxD = qwen3_vl.hidden_states(model, batch.inputs)
        logp_BxT, _ = token_logp(model, hidden_BxTxD, batch.inputs.token_BxT, chunk=256)
        written_BxT = batch.weight_BxT == 1.0
        loss = -jnp.sum(logp_BxT * batch.weight_BxT) / jnp.maximum(batch.weight_BxT.sum(), 1.0)
        written_loss = -jnp.sum(logp_BxT * written_BxT) / jnp.maximum(written_BxT.sum(), 1)
        return loss, written_loss

    @jax.jit(donate_argnums=(0, 1))
    def step_fn(params, opt_state, batch: Batch):
        (_, written_loss), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, written_loss, optax.global_norm(grads)

    # ------------------------------------------------------------------------------------------ restore
    saved, start = work / "state.npz", 0
    leaves, tree = jax.tree.flatten((params, opt_state))
    if saved.is_file():
        with np.load(saved, allow_pickle=False) as file:
            start = int(file["step"])
            params, opt_state = jax.tree.unflatten(tree, [jnp.asarray(file[f"x{i}"]) for i in range(len(leaves))])
    # ------------------------------------------------------------------------------------------ loop
    sums: dict[str, list[float]] = {}
    begun = time.time()
    for step, (kind, batch) in enumerate(batches(source, config, start), start=start):
        params, opt_state, loss, norm = step_fn(params, opt_state, batch)
        sums.setdefault(kind, []).append(float(loss))
        if (step + 1) % config.log_every == 0:
            line = {
                "step": step + 1,
                "seconds": round(time.time() - begun, 1),
                "lr": float(schedule(step)),
                "norm": float(norm),
            }
            line |= {f"loss/{name}": round(float(np.mean(values)), 4) for name, values in sorted(sums.items())}
            with (work / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            logging.info("%s", line)
            sums.clear()
        if (step + 1) % config.save_every == 0 or step + 1 == config.total_steps:
            _save(work, step + 1, params, opt_state, graph, model_config, start_dir)
    digest = hashlib.sha256((work / "export" / "model.safetensors").read_bytes()).hexdigest()
    logging.info("%s: sha256 of the weights %s, %.0f s", work / "export", digest, time.time() - begun)


def _save(work: pathlib.Path, step: int, params, opt_state, graph, model_config, start_dir: str | pathlib.Path) -> None:
    """Write state and model directory, each to a temporary name that is then renamed."""
    leaves = jax.tree.leaves((params, opt_state))
    part = work / "state.part.npz"
    np.savez(part, step=step, **{f"x{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)})
    part.replace(work / "state.npz")
    hf.save(nnx.merge(graph, params), model_config, work / "export", dtype=DTYPE, assets=start_dir)
