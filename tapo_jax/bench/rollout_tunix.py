"""Tunix's side of `bench/rollout.py`: its sampler, which is given the whole conversation in every turn."""

import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.torch import save_file
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params

from tapo_jax.bench.rollout_work import Played, Work, forbidden
from tapo_jax.models.config import Qwen3VLConfig


class TunixRollout:
    """Plays the work as one batch, a call of the sampler for each turn; conversations that are over leave the batch.

    The sampler keeps nothing between two calls. A turn is as long as its longest row, whose shorter ones go on with
    tokens that are thrown away: the sampler has no length of a row.

    whole: the model in transformers, whose decoder's weights these are.
    config: the model's.
    dtype: of weights and computation.
    """

    name = "tunix"

    def __init__(self, whole: Any, config: Qwen3VLConfig, work: Work, dtype: str):
        self.work, self.forbidden = work, np.flatnonzero(forbidden(config)).tolist()
        longest = max(
            length + max(work.written[row][turn] for row in rows)
            for turn, rows, length in ((turn, *self._batch(turn)) for turn in range(max(map(len, work.written))))
        )
        cache = CacheConfig(longest, config.layers, config.kv_heads, config.head_dim)
        self.sampler = Sampler(make(whole, config, dtype), Numbers(config), cache)

    def _batch(self, turn: int) -> tuple[list[int], int]:
        """Return the rows that play a turn, and the tokens of the longest of their histories."""
        work = self.work
        rows = [row for row in range(work.rows) if len(work.written[row]) > turn]
        return rows, max(
            len(work.question[row // work.group])
            + sum(work.written[row][:turn])
            + sum(map(len, work.response[row][:turn]))
            for row in rows
        )

    def play(self, *, temperature: float, seed: int) -> Played:
        work, began, began_cpu = self.work, time.perf_counter(), time.process_time()
        history = [list(work.question[row // work.group]) for row in range(work.rows)]
        written: list[list[int]] = [[] for _ in range(work.rows)]
        prefilled = computed = steps = 0
        for turn in range(max(map(len, work.written))):
            rows, length = self._batch(turn)
            most = max(work.written[row][turn] for row in rows)
            found = self.sampler(
                [history[row] for row in rows],
                most,
                max_prompt_length=length,
                forbidden_tokens=self.forbidden,
                temperature=temperature,
                top_p=1.0 if temperature else None,
                return_logprobs=True,
                seed=seed * 1000 + turn,
            )
            prefilled += sum(len(history[row]) for row in rows)
            computed, steps = computed + len(rows) * length, steps + most
            for row, ids in zip(rows, found.tokens, strict=True):
                new = np.asarray(ids)[: work.written[row][turn]].tolist()
                written[row] += new
                history[row] += new + (work.response[row][turn] if len(work.response[row]) > turn else [])
        return Played(
            seconds=time.perf_counter() - began,
            cpu_s=time.process_time() - began_cpu,
            prefill_s=None,
            decode_s=None,
            prefilled=prefilled,
            computed=computed,
            idle=1 - work.total_written / (steps * work.rows),
            written=written,
        )

    def close(self) -> None:
        pass


def make(whole: Any, config: Qwen3VLConfig, dtype: str) -> Any:
    """Return Tunix's model with the weights of the decoder of the model in transformers."""
    shapes = qwen3.ModelConfig(
        num_layers=config.layers,
        vocab_size=config.vocab,
        embed_dim=config.hidden,
        hidden_dim=config.mlp,
        num_heads=config.heads,
        head_dim=config.head_dim,
        num_kv_heads=config.kv_heads,
        rope_theta=int(config.rope_theta),
        norm_eps=config.norm_epsilon,
        use_tied_embedding=True,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(dtype),
    )
    with tempfile.TemporaryDirectory() as folder:
        found = whole.language_model.state_dict()
        arrays = {f"model.{name}": value.contiguous().cpu() for name, value in found.items()}
        save_file(arrays, Path(folder) / "model.safetensors")
        return qwen3_params.create_model_from_safe_tensors(folder, shapes, dtype=jnp.dtype(dtype))


class Numbers:
    """A tokenizer whose texts are lists of ids. Its special tokens are some that no conversation has."""

    def __init__(self, config: Qwen3VLConfig):
        self._pad, self._eos = config.video_token, config.image_token

    def encode(self, text: list[int]) -> list[int]:
        return list(text)

    def decode(self, ids: list[int]) -> str:
        return ""

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return self._eos

    def pad_id(self) -> int:
        return self._pad
