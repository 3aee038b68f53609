"""Batches for the cold start: expert episodes in invented worlds, parts of them, and sequences to copy.

Everything is drawn anew for every batch, so that nothing can be memorised.
"""

import dataclasses

import jax
import numpy as np

from tapo_jax.atlas.play import Settings, make_prompt, make_tools
from tapo_jax.atlas.questions import Question, ask
from tapo_jax.atlas.scene import Placed
from tapo_jax.atlas.world import World, fictional_world, real_world
from tapo_jax.batch import ModelInputs
from tapo_jax.cold_start.experts import Flaws, expert, play, zoom_turn
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.inputs import PixelStore, make_row, model_inputs
from tapo_jax.rollout.chat import Chat
from tapo_jax.rollout.episode import Limits, Opening, open_prompt
from tapo_jax.tools.base import ToolRunner
from tapo_jax.types import IMAGE_SEARCH, Episode, Prompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch of numpy arrays."""

    inputs: ModelInputs
    weight_BxT: np.ndarray
    """float32, the weight of each token's negative log-likelihood."""


class AtlasSession:
    """A world with its tools running."""

    def __init__(self, world: World, settings: Settings):
        self.world, self.settings = world, settings
        self.runner = ToolRunner(make_tools(world, settings), workers=1, timeout_s=10.0, retries=0, threaded=False)

    @classmethod
    def fictional(cls, seed: int, settings: Settings) -> "AtlasSession":
        return cls(fictional_world(seed), settings)

    @classmethod
    def real(cls, split: str, settings: Settings) -> "AtlasSession":
        return cls(real_world(split), settings)

    def prompt(self, rng: np.random.Generator) -> tuple[Prompt, Question, tuple[Placed, ...]]:
        return make_prompt(self.world, self.settings, rng)


class ColdStart:
    """A source of batches. context_weight: weight of text that the policy reads but does not write (0 on images)."""

    def __init__(
        self,
        chat: Chat,
        config: Qwen3VLConfig,
        processor,
        *,
        settings: Settings,
        flaws: Flaws,
        seed: int,
        context_weight: float,
    ):
        self._chat, self._config, self._processor = chat, config, processor
        self._settings, self._flaws, self._seed, self._context_weight = settings, flaws, seed, context_weight
        self._limits = Limits(max_turns=12, max_new_tokens=96, max_length=2048)
        self._world_number, self._session, self._uses = -1, None, 0

    def _draw(self, rng: np.random.Generator, outlines: int | None = None):
        """Draw a question in an invented world, a new world after every 256. outlines: overrides that setting, for an
        open question."""
        if self._uses % 256 == 0:
            self._world_number += 1
            self._session = AtlasSession.fictional(self._seed * 1_000_003 + self._world_number, self._settings)
        self._uses += 1
        settings = self._settings
        if outlines is not None:
            settings = dataclasses.replace(settings, outlines=outlines, mix=())
        return make_prompt(self._session.world, settings, rng)

    def episode(self, rng: np.random.Generator) -> Episode:
        """Play one expert episode."""
        prompt, question, scene = self._draw(rng)
        pixels = PixelStore(self._processor)
        opening = self._open(prompt, pixels)
        script = expert(question, scene, rng, self._flaws)
        return play(
            opening,
            script,
            runner=self._session.runner,
            chat=self._chat,
            limits=self._limits,
            image_tokens=pixels.tokens,
        )

    def full(self, rng: np.random.Generator, rows: int, length: int, patches: int) -> Batch:
        """Draw whole episodes; one that is too long is drawn again."""
        kept = []
        pixels = PixelStore(self._processor)
        while len(kept) < rows:
            episode = self.episode(rng)
            if (
                len(episode.token_T) <= length
                and sum(int(np.prod(pixels.grid(image))) for image in episode.images) <= patches
            ):
                kept.append((episode.token_T, episode.mask_T, episode.images))
        return self._batch(kept, length, patches, pixels)

    def find(self, rng: np.random.Generator, rows: int, patches: int) -> Batch:
        """Draw scenes of one outline, a question and the first turn of its answer.

        Finding an outline at all has to be learnt before finding the right one."""
        return self._look(rng, rows, patches, outlines=1)

    def where(self, rng: np.random.Generator, rows: int, patches: int) -> Batch:
        """Draw scenes of several outlines, a question about each and the first turn of each answer: where to look."""
        return self._look(rng, rows, patches, outlines=int(rng.integers(2, max(2, self._settings.outlines) + 1)))

    def _look(self, rng: np.random.Generator, rows: int, patches: int, *, outlines: int) -> Batch:
        length = 88 + 72 * outlines
        kept = []
        pixels = PixelStore(self._processor)
        while len(kept) < rows:
            prompt, _, scene = self._draw(rng, outlines)
            opening = self._open(prompt, pixels)
            ids, mask = opening.token_T.tolist(), [False] * len(opening.token_T)
            for number, placed in enumerate(scene):
                if number:  # the prompt asks about the first one
                    question = ask(self._session.world, placed.name, placed.colour, 1, rng)
                    again = self._ids(f"\n<|im_start|>user\n{question.text}<|im_end|>\n<|im_start|>assistant\n")
                    ids, mask = ids + again, mask + [False] * len(again)
                turn = [*self._ids(zoom_turn(placed, rng)), self._chat.stop_ids[0]]
                ids, mask = ids + turn, mask + [True] * len(turn)
            kept.append((np.array(ids[:length], np.int32), np.array(mask[:length]), list(opening.images)))
        return self._batch(kept, length, patches, pixels)

    def _open(self, prompt: Prompt, pixels: PixelStore) -> Opening:
        return open_prompt(prompt, chat=self._chat, image_tokens=pixels.tokens, tools=self._session.runner.schemas)

    def _ids(self, text: str) -> list[int]:
        return self._chat.tokenizer.encode(text, add_special_tokens=False).ids

    def text_part(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Draw the text after an image search, with the question before it if that fits: names to copy."""
        kept = []
        while len(kept) < rows:
            episode = self.episode(rng)
            found = [turn.stop for turn in episode.turns if turn.call is not None and turn.call.name == IMAGE_SEARCH]
            if not found:
                continue
            token_T, mask_T = episode.token_T[found[-1] :], episode.mask_T[found[-1] :]
            question_T = np.array(self._ids(f"user\n{episode.prompt.question}"), np.int32)
            token_T = np.concatenate([question_T, token_T])[:length]
            mask_T = np.concatenate([np.zeros(len(question_T), bool), mask_T])[:length]
            if mask_T.any():
                kept.append((token_T, mask_T, []))
        return self._batch(kept, length, 0, PixelStore(self._processor))

    def copy(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Draw a few invented words of several random tokens, repeated in random order.

        The weight is on the tokens after the first token of a word that occurred before: the smallest problem whose
        solution is to look back and copy."""
        ordinary = np.setdiff1d(np.arange(self._chat.vocab_size), self._special())
        token_BxT = np.zeros((rows, length), np.int32)
        weight_BxT = np.zeros((rows, length), np.float32)
        for b in range(rows):
            # With few different tokens, pairs are ambiguous, so that more than one token of history has to match.
            pool = rng.choice(ordinary, int(rng.choice([30, len(ordinary)], p=[0.2, 0.8])), replace=False)
            words = [rng.choice(pool, int(rng.integers(3, 8))) for _ in range(int(rng.integers(2, 6)))]
            seen, at = set(), 0
            while at < length:
                number = int(rng.integers(len(words)))
                word = words[number][: length - at]
                token_BxT[b, at : at + len(word)] = word
                weight_BxT[b, at + 1 : at + len(word)] = float(number in seen)
                seen.add(number)
                at += len(word)
        segment = np.ones((rows, length), np.int32)
        position = np.broadcast_to(np.arange(length, dtype=np.int32)[None, :, None], (rows, length, 3)).copy()
        return Batch(ModelInputs(token_BxT=token_BxT, segment_BxT=segment, position_BxTx3=position), weight_BxT)

    def _special(self) -> np.ndarray:
        return np.array(list(self._chat.tokenizer.get_added_tokens_decoder()), np.int32)

    def _batch(self, kept: list, length: int, patches: int, pixels: PixelStore) -> Batch:
        rows = [make_row(token_T, images, self._config, pixels)[0] for token_T, _, images in kept]
        inputs = model_inputs(rows, length=length, patches=patches, config=self._config)
        weight_BxT = np.where(inputs.token_BxT == self._config.image_token, 0.0, self._context_weight).astype(
            np.float32
        )
        weight_BxT *= inputs.segment_BxT > 0
        for b, (_, mask_T, _) in enumerate(kept):
            weight_BxT[b, : len(mask_T)][mask_T] = 1.0
        weight_BxT[:, 0] = 0.0
        return Batch(inputs, weight_BxT)
