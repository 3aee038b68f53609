"""Whole training runs in seconds: `train` on the model, tools and readings of `rollout_world`. Also a program, for runs
that are killed or have several processes:

    python tests/tiny_run.py WORKDIR MODEL_DIRECTORY [name=CONFIG_FILE] [signal=NUMBER round=NUMBER] [field=number …]

signal, round: what the process sends itself at the beginning of its n-th round of rollouts; 0: of its first evaluation.
"""

import ast
import itertools
import json
import os
import zlib
from pathlib import Path

import rollout_world as world
from ml_collections import ConfigDict

from tapo_jax.config import beside, run_main
from tapo_jax.models import hf
from tapo_jax.rollout.chat import ParsedTurn
from tapo_jax.types import ToolCall

STOPS = 24  # ids that end a turn, of 262: turns of about eleven tokens


def write_model(path: Path) -> Path:
    """A model directory with the random weights of `rollout_world`."""
    hf.save(world.model(), world.config(), path)
    world.chat().tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(world.TEMPLATE)
    (path / "preprocessor_config.json").write_text(json.dumps(world.PROCESSOR.to_hf()))
    return path


def read_turn(text: str) -> ParsedTurn:
    """Stands in for `parse_turn`: the text's hash decides, with few different calls, so that some calls of failures are
    those of successes: 3 of 8 crop, 2 say, 1 calls an unknown tool, 2 answer (and are right)."""
    kind, rest = zlib.crc32(text.encode()) % 8, zlib.crc32(text.encode()) // 8
    if kind < 3:
        return ParsedTurn(call=ToolCall("crop", {"img_idx": 0, "size": 8 + 8 * (rest % 2)}))
    if kind < 5:
        return ParsedTurn(call=ToolCall("say", {"length": rest % 2}))
    return ParsedTurn(call=ToolCall("fly", {})) if kind == 5 else ParsedTurn(answer="x")


def config(model: Path, name: str = "tapo_grpo.py", **fields) -> ConfigDict:
    """The test setting of a config file, smaller still; `fields` by their dotted names."""
    c = beside(str(Path(__file__).parents[1] / "configs" / "x"), name)("test,steps=4")
    c.model.update(path=str(model), train_vision=True)
    c.data.prompts_per_step = 4
    c.rollout.update(group_size=4, slots=8, max_turns=3, max_new_tokens=24, max_length=112, decode_chunk=8)
    c.tapo.update(max_tool_steps=3, features=32, theta=0.3, alpha_min=0.1)
    c.optimizer.lr = 3e-3
    c.train.update(length_buckets=(), patch_buckets=())
    c.checkpoint.every = 2
    c.eval.update(prompts=6, split="held_out")
    for path, value in fields.items():
        section, _, field = path.replace("__", ".").rpartition(".")
        (c[section] if section else c)[field] = value
    return c


def patch(setattr_) -> None:
    """Puts the little world in the place of Atlas. setattr_(target, name, value)."""
    from tapo_jax import agent
    from tapo_jax.data import sources
    from tapo_jax.rollout import episode

    chat = world.chat(STOPS)
    setattr_(episode, "parse_turn", read_turn)
    setattr_(agent.Chat, "from_dir", classmethod(lambda cls, path: chat))
    setattr_(sources, "prompts", lambda config, split: world.prompts(24 if split == "train" else 6))
    setattr_(sources, "tools", lambda config: [world.Crop(), world.Say()])


def main(argv: list[str]) -> None:
    from tapo_jax import processes

    processes.join()
    from tapo_jax.train import train

    patch(setattr)
    fields = dict(item.split("=") for item in argv[3:])
    name = fields.pop("name", "tapo_grpo.py")
    if "signal" in fields:
        send_in_round(int(fields.pop("signal")), int(fields.pop("round")))
    values = {field: ast.literal_eval(value) for field, value in fields.items()}
    train(config(Path(argv[2]), name, **values), argv[1])


def send_in_round(number: int, at: int) -> None:
    """Send this process a signal when it begins its `at`-th round of rollouts; 0: its first round of an evaluation."""
    from tapo_jax.rollout.board import Board

    needs, rounds = Board.needs, itertools.count(1)

    def counted(board: Board):
        evaluates = len(board.groups[0].seats) == 1
        if (evaluates and at == 0) or (not evaluates and next(rounds) == at):
            os.kill(os.getpid(), number)
        return needs(board)

    Board.needs = counted


if __name__ == "__main__":
    run_main(main, words=True)
