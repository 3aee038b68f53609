"""Our side of `bench/model.py`: the programs of training and sampling on one device."""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tapo_jax import sharding
from tapo_jax.batch import ModelInputs, TrainBatch
from tapo_jax.bench.model_work import Measured, Size, added_mib, conversations, written_mask
from tapo_jax.learn import train_step
from tapo_jax.learn.optimizer import Settings, make_optimizer
from tapo_jax.learn.state import init_state, split_model
from tapo_jax.models import flops, positions
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.parameters import logical_axes
from tapo_jax.models.qwen3_vl import Qwen3VL
from tapo_jax.rollout import schedule, slots


class OurModel:
    """Random weights and the four programs of training and sampling."""

    def __init__(self, size: Size):
        self.size, self.config = size, size.config
        self.model = random_model(size.config, size.dtype)
        self.graphdef, self.params = split_model(self.model)
        self.forbidden_V = np.zeros(self.config.vocab, bool)
        self.policy = train_step.Policy(self.graphdef, self.forbidden_V, sharding.one_device())
        self.slots: slots.SlotState | None = None

    def work(self) -> dict[str, Callable[[int], Measured]]:
        """Return what is measured, in order: the train step last, because it changes the weights."""
        steps = (self.forward, self.prefill, self.decode, self.train_step)
        return {step.__name__: step for step in steps}

    def forward(self, calls: int) -> Measured:
        size = self.size
        inputs, lengths, images = self._inputs(size.rows, size.tokens)
        program = jax.jit(lambda params, inputs: train_step.row_logp(self.policy, params, inputs)[0])
        found = timed(lambda: program(self.params, inputs), calls=calls)
        return dataclasses.replace(found, tokens=sum(lengths), flops=flops.forward(self.config, lengths, images))

    def prefill(self, calls: int) -> Measured:
        size, capacity = self.size, self._capacity
        inputs, lengths, images = self._inputs(size.slots, size.prompt)
        self.slots = slots.init_slots(self.config, 1, size.slots, capacity, jnp.dtype(size.dtype))
        request = np.stack([np.arange(size.slots), np.zeros(size.slots), np.ones(size.slots)], -1)[None].astype(
            np.int32
        )

        def call() -> None:
            self.slots = slots.extend_slots(self.graphdef, self.params, self.slots, inputs, request, window=capacity)
            jax.block_until_ready(self.slots)

        found = timed(call, calls=calls)
        text = flops.decoder(self.config, tokens=sum(lengths), pairs=flops.causal_pairs(lengths), logits=len(lengths))
        tower = flops.vision_tower(self.config.vision, patches=sum(images), pairs=flops.full_pairs(images))
        return dataclasses.replace(found, tokens=sum(lengths), flops=text + tower)

    def decode(self, calls: int) -> Measured:
        """Measure decoding, after `prefill`. Every call overwrites the same cache entries."""
        size = self.size
        tokens, _, grids = conversations(self.config, 1, size.prompt, size.patches)
        _, position = positions.rope_positions(tokens[0], grids, self.config)
        length, room = size.prompt, size.chunk + 1
        draws = [schedule.Draw(slot, length, int(position), room, 0, slot, 0, 0) for slot in range(size.slots)]
        request = slots.DrawRequest.of(draws, np.arange(size.slots)[None], size.slots)
        greedy, never = np.float32(0), np.array([-1], np.int32)
        rule = slots.DrawRule(np.int32(0), np.int32(0), greedy, np.float32(1), self.forbidden_V, never)

        def call() -> np.ndarray:
            self.slots, drawn = slots.decode_slots(
                self.graphdef,
                self.params,
                self.slots,
                request,
                rule,
                window=self._capacity,
                chunk=size.chunk,
            )
            return jax.device_get(drawn[0])[0]

        found = timed(call, calls=calls, steps=size.chunk)
        self.slots = None
        lengths = [size.prompt + size.chunk // 2] * size.slots
        return dataclasses.replace(found, tokens=size.slots, flops=flops.decode(self.config, lengths))

    def train_step(self, calls: int) -> Measured:
        """Measure the update. It changes the weights, so nothing can be measured after it."""
        size = self.size
        inputs, lengths, images = self._inputs(size.rows, size.tokens)
        tokens, _, _ = conversations(self.config, size.rows, size.tokens, size.patches)
        advantage_BxT = np.broadcast_to(
            np.random.default_rng(1).standard_normal((size.rows, 1), np.float32), tokens.shape
        )
        batch = jax.device_put(
            TrainBatch(
                inputs=inputs,
                mask_BxT=written_mask(tokens, size.patches, self.config),
                step_BxT=np.full(tokens.shape, -1, np.int32),
                sampler_logp_BxT=np.zeros(tokens.shape, np.float32),
                advantage_BxT=advantage_BxT,
            )
        )
        optimizer, rate = make_optimizer(Settings(lr=1e-4), total_steps=100)
        state = init_state(self.params, logical_axes(self.config), optimizer, self.policy.mesh)
        objective = train_step.Objective(importance_cap=None, remat=size.remat, train_vision=True)
        update = train_step.make_update(self.policy, optimizer, rate, objective, state)
        self.params = None

        def call() -> float:
            nonlocal state
            state, metrics = update(state, batch, None, jnp.int32(0))
            return float(metrics["optimizer/grad_norm"])

        found = timed(call, calls=calls)
        return dataclasses.replace(found, tokens=sum(lengths), flops=flops.update(self.config, lengths, images))

    @property
    def _capacity(self) -> int:
        return self.size.prompt + self.size.chunk

    def _inputs(self, rows: int, tokens: int) -> tuple[ModelInputs, list[int], list[int]]:
        """Return (inputs on the device, tokens of each row, patches of each image)."""
        conversation = conversations(self.config, rows, tokens, self.size.patches)
        fields = positions.row_inputs(*conversation, None, self.config)
        return jax.device_put(ModelInputs(**fields)), [tokens] * rows, [self.size.patches] * rows


def random_model(config: Qwen3VLConfig, dtype: str) -> Qwen3VL:
    """Return a model of random weights, which are made on the device."""

    def make() -> Qwen3VL:
        return Qwen3VL(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(dtype), dtype=jnp.dtype(dtype))

    model = nnx.eval_shape(make)
    nnx.update(model, jax.jit(lambda: nnx.state(make()))())
    return model


def timed(call: Callable, *, calls: int, steps: int = 1) -> Measured:
    """Return medians over calls of the seconds of one step.

    The first call, which compiles, gives the value and is not timed."""
    value = jax.block_until_ready(call())
    mib = added_mib(lambda: jax.block_until_ready(call()))[0] if jax.default_backend() == "cpu" else None
    seconds, cpu = [], []
    for _ in range(calls):
        start, start_cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(call())
        seconds.append((time.perf_counter() - start) / steps)
        cpu.append((time.process_time() - start_cpu) / steps)
    return Measured(float(np.median(seconds)), float(np.median(cpu)), mib, None if value is None else np.asarray(value))
