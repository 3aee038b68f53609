"""transformers' side of `bench/rollout.py`: loops that a user writes, with the cache kept between turns."""

import time

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from tapo_jax.bench.rollout_work import Played, Work


class TransformersRollout:
    """Plays the work as one batch of conversations whose keys and values are kept between the turns.

    Rows that are shorter than others are padded; a turn ends for all when the longest has ended, and conversations that
    are over leave the batch then.

    model: in evaluation mode.
    forbidden_V: tokens that are never drawn.
    copies: the questions are pre-filled once, and copied for the conversations of their group.
    """

    def __init__(self, model: PreTrainedModel, work: Work, forbidden_V: np.ndarray, *, copies: bool):
        self.name = "transformers, prompt copied" if copies else "transformers"
        self.model, self.work, self.copies, self.device = model, work, copies, model.device
        self.forbidden_V = torch.tensor(forbidden_V, device=self.device)

    def play(self, *, temperature: float, seed: int) -> Played:
        torch.manual_seed(seed)
        with torch.inference_mode():
            return _Rollout(self, temperature).run()

    def close(self) -> None:
        pass


class _Rollout:
    """One rollout: the cache, and which of its entries are tokens of each row."""

    def __init__(self, side: TransformersRollout, temperature: float):
        self.side, self.work, self.temperature = side, side.work, temperature
        self.device = side.device
        self.cache = DynamicCache(config=side.model.config.get_text_config())
        self.real_BxS = torch.zeros((0, 0), dtype=torch.bool, device=self.device)
        self.padded = False
        self.seconds = {"prefill": 0.0, "decode": 0.0}
        self.prefilled = self.computed = self.steps = 0

    def run(self) -> Played:
        work, began, began_cpu = self.work, time.perf_counter(), time.process_time()
        written: list[list[int]] = [[] for _ in range(work.rows)]
        rows = list(range(work.rows))
        logits_BxV = self._questions()
        for turn in range(max(map(len, work.written))):
            counts = [work.written[row][turn] for row in rows]
            token_BxN = self._turn(logits_BxV, counts)
            for row, count, ids in zip(rows, counts, token_BxN.tolist(), strict=True):
                written[row] += ids[:count]
            going = [at for at, row in enumerate(rows) if len(work.written[row]) > turn + 1]
            if going:
                rows = self._keep(rows, going)
                logits_BxV = self._prefill([[written[row][-1], *work.response[row][turn]] for row in rows])
        self._wait()
        return Played(
            seconds=time.perf_counter() - began,
            cpu_s=time.process_time() - began_cpu,
            prefill_s=self.seconds["prefill"],
            decode_s=self.seconds["decode"],
            prefilled=self.prefilled,
            computed=self.computed,
            idle=1 - work.total_written / (self.steps * work.rows),
            written=written,
        )

    def _questions(self) -> torch.Tensor:
        """Pre-fill the questions; return the logits of every row."""
        group = self.work.group
        if not self.side.copies:
            return self._prefill([ids for ids in self.work.question for _ in range(group)])
        logits_PxV = self._prefill(self.work.question)
        began = time.perf_counter()
        self.cache.batch_repeat_interleave(group)
        self.real_BxS = self.real_BxS.repeat_interleave(group, 0)
        logits_BxV = logits_PxV.repeat_interleave(group, 0)
        self._wait()
        self.seconds["prefill"] += time.perf_counter() - began
        return logits_BxV

    def _prefill(self, ids: list[list[int]]) -> torch.Tensor:
        """Add given tokens to every row, padded on the left; return the logits after them."""
        began, longest = time.perf_counter(), max(map(len, ids))
        token_BxT = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=self.device)
        count_B = torch.tensor([len(row) for row in ids], device=self.device)
        real_BxT = torch.arange(longest, device=self.device) >= longest - count_B[:, None]
        self.prefilled += sum(map(len, ids))
        self.computed += token_BxT.numel()
        logits_BxV = self._feed(token_BxT, real_BxT, padded=len(set(map(len, ids))) > 1)
        self._wait()
        self.seconds["prefill"] += time.perf_counter() - began
        return logits_BxV

    def _turn(self, logits_BxV: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Write a turn; return token_BxN, of which row b has written the first counts[b].

        The last token of a row is fed with what follows it.
        """
        began, tokens, uneven = time.perf_counter(), [], len(set(counts)) > 1
        count_B = torch.tensor(counts, device=self.device)
        for step in range(max(counts)):
            tokens.append(self._draw(logits_BxV))
            if step + 1 < max(counts):
                logits_BxV = self._feed(tokens[-1], (step + 1 < count_B)[:, None], padded=uneven)
        self.steps += max(counts)
        token_BxN = torch.cat(tokens, 1)
        self._wait()
        self.seconds["decode"] += time.perf_counter() - began
        return token_BxN

    def _draw(self, logits_BxV: torch.Tensor) -> torch.Tensor:
        """Draw a token for each row, with its log-probability, which training needs."""
        logits_BxV = logits_BxV.float().masked_fill(self.side.forbidden_V, -torch.inf)
        logp_BxV = torch.log_softmax(logits_BxV / (self.temperature or 1.0), -1)
        token_Bx1 = torch.multinomial(logp_BxV.exp(), 1) if self.temperature else logp_BxV.argmax(-1, keepdim=True)
        logp_BxV.gather(1, token_Bx1)
        return token_Bx1

    def _feed(self, token_BxT: torch.Tensor, real_BxT: torch.Tensor, *, padded: bool) -> torch.Tensor:
        """Add tokens to the cache; return the logits after the last column."""
        self.padded |= padded
        before_Bx1 = self.real_BxS.sum(1, keepdim=True) if len(self.real_BxS) else 0
        position_BxT = (before_Bx1 + real_BxT.cumsum(1) - 1).clamp(min=0)
        self.real_BxS = torch.cat([self.real_BxS, real_BxT], 1) if len(self.real_BxS) else real_BxT
        found = self.side.model(
            input_ids=token_BxT,
            attention_mask=self.real_BxS.long() if self.padded else None,
            position_ids=position_BxT.expand(3, *token_BxT.shape),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return found.logits[:, -1]

    def _keep(self, rows: list[int], going: list[int]) -> list[int]:
        """Keep the rows of the batch that go on."""
        if len(going) < len(rows):
            index_B = torch.tensor(going, device=self.device)
            self.cache.batch_select_indices(index_B)
            self.real_BxS = self.real_BxS[index_B]
        return [rows[at] for at in going]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
