"""PyTorch's side of `bench/model.py`: transformers' Qwen3-VL with the weights of our model."""

import os
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
from flax import nnx
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration

from tapo_jax.bench.model_work import Measured, Size, added_mib, conversations, written_mask
from tapo_jax.models import hf


def make(model: nnx.Module, size: Size) -> "TransformersModel | None":
    """Return the model in transformers, None if jax runs on a device that this PyTorch does not know."""
    kind = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if kind == "cuda" and not torch.cuda.is_available():
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as directory:
        hf.save(model, size.config, directory)
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[size.dtype]
        return TransformersModel(Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=dtype).to(kind), size)


class TransformersModel:
    """The four measured programs as a user of transformers writes them."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, size: Size):
        self.model, self.size, self.device = model.eval(), size, model.device
        self.prefilled = None

    def work(self) -> dict[str, Callable[[int], Measured]]:
        """Return what is measured, in order: the train step last, because it changes the weights."""
        steps = (self.forward, self.prefill, self.decode, self.train_step)
        return {step.__name__: step for step in steps}

    def forward(self, calls: int) -> Measured:
        inputs = self._inputs(self.size.rows, self.size.tokens)

        def call() -> np.ndarray:
            with torch.no_grad():
                return self._logp(inputs).float().cpu().numpy()

        return self._timed(call, calls)

    def prefill(self, calls: int) -> Measured:
        inputs = self._inputs(self.size.slots, self.size.prompt)

        def call() -> None:
            with torch.no_grad():
                self.prefilled = self.model(**inputs, use_cache=True, logits_to_keep=1)

        return self._timed(call, calls)

    def decode(self, calls: int) -> Measured:
        """Measure decoding, after `prefill`; the cache is cut back to the prompt before every call."""
        cache, first = self.prefilled.past_key_values, self.prefilled.logits[:, -1:].argmax(-1)

        def call() -> np.ndarray:
            if beyond := cache.get_seq_length() - self.size.prompt:
                cache.crop(-beyond)
            token, written = first, []
            with torch.no_grad():
                for _ in range(self.size.chunk):
                    written.append(token)
                    token = self.model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            return torch.cat(written, 1).cpu().numpy()

        found = self._timed(call, calls, self.size.chunk)
        self.prefilled = None
        return found

    def train_step(self, calls: int) -> Measured:
        size = self.size
        inputs = self._inputs(size.rows, size.tokens)
        tokens, _, _ = conversations(size.config, size.rows, size.tokens, size.patches)
        mask = torch.tensor(written_mask(tokens, size.patches, size.config)).float().to(self.device)
        advantage = torch.tensor(np.random.default_rng(1).standard_normal((size.rows, 1), np.float32)).to(self.device)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
        self.model.train()
        if size.remat == "full":
            self.model.gradient_checkpointing_enable()

        def call() -> float:
            optimizer.zero_grad()
            # The gradient of the clipped objective at equal old and new probabilities.
            loss = -(advantage * self._logp(inputs) * mask).sum() / mask.sum()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            return float(norm)

        return self._timed(call, calls)

    def _logp(self, inputs: dict) -> torch.Tensor:
        """Return the log-probability of every token; 0 for the first."""
        logits = self.model(**inputs, use_cache=False).logits[:, :-1].float()
        chosen = torch.log_softmax(logits, -1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        return torch.nn.functional.pad(chosen, (1, 0))

    def _inputs(self, rows: int, tokens: int) -> dict:
        config = self.size.config
        token_BxT, pixels_NxF, grid_Bx3 = conversations(config, rows, tokens, self.size.patches)
        arrays = {
            "input_ids": torch.tensor(token_BxT, dtype=torch.long),
            "pixel_values": torch.tensor(pixels_NxF),
            "image_grid_thw": torch.tensor(grid_Bx3, dtype=torch.long),
            "mm_token_type_ids": torch.tensor(token_BxT == config.image_token).int(),
        }
        return {name: array.to(self.device) for name, array in arrays.items()}

    def _timed(self, call: Callable, calls: int, steps: int = 1) -> Measured:
        """Measure a call as `model_jax.timed` does."""
        value = call()
        mib = self._added_mib(call)
        seconds, cpu = [], []
        for _ in range(calls):
            self._wait()
            start, start_cpu = time.perf_counter(), time.process_time()
            call()
            self._wait()
            seconds.append((time.perf_counter() - start) / steps)
            cpu.append((time.process_time() - start_cpu) / steps)
        return Measured(float(np.median(seconds)), float(np.median(cpu)), mib, value)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _added_mib(self, call: Callable) -> float | None:
        if self.device.type == "cpu":
            return added_mib(call)[0]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
