"""The job with the published tokenizer: a thinking budget token by token, and training on FVQA rows with recorded image
search and a judge on this machine. What needs the tokenizer is skipped where it is absent."""

import functools
import json
import re
import shutil
import zlib
from pathlib import Path

import chat_templates
import jax
import numpy as np
import published
import pytest
from test_judge import said, served

from tapo_jax import records, sharding
from tapo_jax.config import UserError, beside
from tapo_jax.learn import batches
from tapo_jax.models import hf
from tapo_jax.models.image_processor import ImageProcessor
from tapo_jax.models.inputs import PixelStore
from tapo_jax.models.random_model import make
from tapo_jax.rollout import episode as episode_module
from tapo_jax.rollout.chat import Chat, parse_turn
from tapo_jax.rollout.episode import Conversation, Limits, Opening
from tapo_jax.rollout.players import Players
from tapo_jax.rollout.rounds import rollout
from tapo_jax.rollout.sampler import Sampler, make_shapes
from tapo_jax.rollout.schedule import Sampling
from tapo_jax.rollout.summary import summary
from tapo_jax.rollout.turns import ParsedTurn
from tapo_jax.tools.base import ToolRunner
from tapo_jax.train import train
from tapo_jax.types import Prompt, ToolCall, ToolResult

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data" / "qwen3_tokenizer"
KEY = "sk-planted-51c2"
needs_tokenizer = pytest.mark.skipif(not REAL.is_dir(), reason="the Qwen3 tokenizer is not here")
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
CLOSING = [198, 151668, 271]  # "\n", "</think>", "\n\n"


# The thinking budget.


def chat(template: str) -> Chat:
    return Chat(Chat.from_dir(REAL).tokenizer, template, stop_ids=(151645, 151643))


def begin(made: Chat, budget: int, **limits) -> Conversation:
    ids = np.array(made.prompt_ids("where?", [], []), np.int32)
    opening = Opening(Prompt("q", "where?", (), ("Peru",)), ids, (), ())
    budgets = Limits(**{"max_turns": 3, "max_new_tokens": 200, "max_length": 2000, "max_think_tokens": budget} | limits)
    return Conversation(opening, 0, limits=budgets, chat=made, image_tokens=lambda image: 1)


def write(conversation: Conversation, made: Chat, text: str, *, stop: bool = False) -> int:
    """Draw a text in pieces as large as the budget allows; return how many tokens were drawn."""
    ids = made.tokenizer.encode(text, add_special_tokens=False).ids + [151645] * stop
    at = 0
    while at < len(ids):
        piece = ids[at : at + min(conversation.allowance, 5)]
        conversation.add_sampled(piece, [-1.0] * len(piece))
        at += len(piece)
    return len(ids)


@needs_tokenizer
@pytest.mark.parametrize("opened", [True, False], ids=["the template opens", "the model opens"])
def test_a_thought_is_closed_at_the_budget_with_the_ids_of_the_template(opened):
    """Budget 7. Where the model writes <think> itself that is a token of its turn and counts; the ids after the budget
    are exactly those of the template's own closing."""
    made = chat(chat_templates.THINKING if opened else chat_templates.VISION)
    assert made.opening == ("<think>\n" if opened else "") and made.end_of_thought == CLOSING
    conversation = begin(made, 7)
    start = len(conversation.token)
    thought = " one two three four five six seven" if opened else "<think> one two three four five six"
    assert write(conversation, made, thought) == 7
    assert conversation.token[start + 7 :] == CLOSING and conversation.turn_tokens == 10
    assert conversation.allowance == 200 - 10
    drawn = write(conversation, made, CALL, stop=True)
    call = conversation.end_turn()
    assert call == ToolCall("f", {})
    conversation.add_result(call, ToolResult("ok"))
    again = len(conversation.token)
    assert conversation.allowance == 7
    write(conversation, made, (" a" if opened else "<think> a") + "</think><answer>Peru</answer>", stop=True)
    assert conversation.end_turn() is None and conversation.answer == "Peru"
    done = conversation.episode()
    assert [turn.forced for turn in done.turns] == [(start + 7, start + 10), None]
    written_T = np.zeros(len(done.token_T), bool)
    written_T[start : start + 7] = written_T[start + 10 : start + 10 + drawn] = written_T[again:] = True
    assert np.array_equal(done.mask_T, written_T)
    assert np.array_equal(done.sampler_logp_T, np.where(written_T, -1.0, 0.0))
    assert parse_turn(done.turns[0].text, opening=made.opening).format_ok
    # The text as a whole, encoded again, has the same ids: the closing is what the template would have written.
    text = made.decode(done.token_T[start : start + 10].tolist())
    assert made.tokenizer.encode(text, add_special_tokens=False).ids == done.token_T[start : start + 10].tolist()
    assert summary([done], (), 1.0)["rollout/thoughts_closed"] == 1.0


@needs_tokenizer
@pytest.mark.parametrize("budget", [1, 2, 6])
def test_the_budget_holds_however_the_tokens_arrive(budget):
    made = chat(chat_templates.THINKING)
    for size in (1, 2, 5, 200):
        conversation = begin(made, budget)
        start, ids = len(conversation.token), made.tokenizer.encode(" a b c d e f", add_special_tokens=False).ids
        at = 0
        while conversation.turn_tokens <= budget:
            piece = ids[at : at + min(size, conversation.allowance)]
            conversation.add_sampled(piece, [-1.0] * len(piece))
            at += len(piece)
        assert at == budget and conversation.token[start + budget :] == CLOSING


@needs_tokenizer
@pytest.mark.parametrize("tail", ["</think>", "<|im_end|>"])
def test_a_thought_that_ends_with_its_last_token_is_not_closed_again(tail):
    made = chat(chat_templates.THINKING)
    conversation = begin(made, 4)
    start = len(conversation.token)
    assert write(conversation, made, " a b c" + tail) == 4
    assert len(conversation.token) == start + 4 and conversation._forced is None


@pytest.fixture(scope="module")
def random_model(tmp_path_factory) -> Path:
    """A random Qwen3-VL with the published tokenizer, and a template that opens the thought."""
    if not REAL.is_dir():
        pytest.skip("the Qwen3 tokenizer is not here")
    source = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REAL / name, source)
    (source / "chat_template.jinja").write_text(chat_templates.THINKING)
    processor = ImageProcessor(min_pixels=32 * 32, max_pixels=64 * 64)  # one to four tokens an image
    (source / "preprocessor_config.json").write_text(json.dumps(processor.to_hf()))
    return make(source, tmp_path_factory.mktemp("random") / "model", hidden=32)


@pytest.fixture(scope="module")
def stopping_model(random_model, tmp_path_factory) -> Path:
    """The same with a tenth of all tokens as stop tokens, else a random model would never end a turn."""
    folder = shutil.copytree(random_model, tmp_path_factory.mktemp("stopping") / "model")
    stops = [151645, 151643, *range(0, 150000, 10)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return folder


def test_a_random_model_is_a_complete_directory(random_model):
    made, config = hf.load(random_model)
    assert (config.vocab, config.image_token) == (151808, 151655) and made.embedding.shape == (151808, 32)
    assert set(Chat.from_dir(random_model).stop_ids) == {151645, 151643}
    with pytest.raises(UserError, match="is not empty"):
        make(REAL, random_model)


def test_a_folder_without_a_tokenizer_makes_no_model(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        make(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_thought_of_a_rollout_has_at_most_its_budget(random_model):
    """A random model never closes a thought: every turn has 6 tokens of its own, the closing, then up to 10 more."""
    model, config = hf.load(random_model)
    made, mesh = Chat.from_dir(random_model), sharding.one_device()
    sizes = {"slots": 2, "capacity": 128, "chunk": 5, "image_patches": 16, "most_patches": 16}
    forbidden_V = made.forbidden_V(config.vocab)
    sampler = Sampler(model, mesh, make_shapes(config, mesh, **sizes), stop_ids=made.stop_ids, forbidden_V=forbidden_V)
    runner = ToolRunner([], workers=1, timeout_s=5, retries=0)
    pixels = PixelStore(ImageProcessor.from_dir(random_model))
    players = Players(sampler, made, pixels, runner, Limits(2, 19, 128, max_think_tokens=6))
    prompts = [Prompt(str(i), f"which {i}?", (), ("x",)) for i in range(2)]
    from tapo_jax.learn.state import split_model

    episodes, metrics = rollout(players, split_model(model)[1], prompts, 2, Sampling(1.0, 1.0, seed=1))
    assert metrics["rollout/thoughts_closed"] == np.mean([len(one.turns) for one in episodes]) > 0
    for one in episodes:
        batches.check_episode(one, config)
        for turn in one.turns:
            assert turn.forced == (turn.start + 6, turn.start + 9)
            assert one.token_T[slice(*turn.forced)].tolist() == CLOSING and turn.stop - turn.start <= 19
            assert one.mask_T[turn.start : turn.stop].sum() == turn.stop - turn.start - 3


# Training on FVQA rows.

FAULTS = [(429, {"Retry-After": "0"}, ""), (500, {}, "x"), (200, {}, "garbage"), None]


def replies(number, body):
    """Every third request fails, in four ways; what is asked about in vain says so for ever, and repeats the key."""
    text = body["messages"][1]["content"][-1]["text"]
    if zlib.crc32(re.search(r"Response: (.*)", text)[1].encode()) % 5 == 0:
        return 400, {}, KEY
    return FAULTS[number // 3 % 4] if number % 3 == 0 else said("Yes" if number % 2 else "No")


def read_turn(text: str, opening: str | None = None) -> ParsedTurn:
    """Stands in for `parse_turn`, because neither model writes calls here: the text's hash decides."""
    if zlib.crc32(text.encode()) % 2:
        return ParsedTurn(call=ToolCall("image_search_tool", {}))
    return ParsedTurn(answer=f"x{zlib.crc32(text.encode()) % 97}")


def fvqa(folder: Path) -> Path:
    """Twelve rows a split, and recorded searches with a thumbnail for all but one."""
    for split in ("train", "test"):
        rows = [published.fvqa_row(i, images=[{"bytes": published.encoded(i, (48, 40))}]) for i in range(12)]
        published.parquet(folder / f"fvqa_{split}.parquet", rows, published.fvqa_schema(""))
        searches = [
            {"id": f"fvqa_{i}", "titles": [f"g{i} - Wikidata"], "thumbnails": ["0.png"], "summary": ""}
            for i in range(11)
        ]
        published.json_lines(folder / f"image_search_{split}" / "image_search.jsonl", searches)
        published.save(folder / f"image_search_{split}" / "0.png", 99)
    return folder


def job(folder: Path, model: Path | None, url: str, **changes):
    """Ten steps of one question × four rollouts, judged."""
    c = beside(str(ROOT / "configs" / "x"), "tapo_grpo.py")("test,steps=10")
    c.data.update(source="fvqa", dir=str(folder), prompts_per_step=1)
    c.model.path = "" if model is None else str(model)
    c.rollout.update(slots=4, max_turns=3, max_new_tokens=24, max_length=256, decode_chunk=8)
    c.tools.update(source="recorded", names=("image_search_tool",))
    c.tapo.update(max_tool_steps=3)
    c.train.update(patch_buckets=(), updates_per_batch=1)
    c.log.episodes_every = 1
    c.checkpoint.every = 5
    c.eval.update(split="test", prompts=4, at_start=False)
    judged = {"endpoint": url, "model": "m", "max_failed": 0.9, "cache": str(folder.parent / "verdicts.sqlite")}
    c.reward.judge.update(judged)
    c.update_from_flattened_dict(changes)
    return c


def trained(tmp_path: Path, monkeypatch, model: Path | None, **changes) -> list[dict]:
    """Run the job on one device and look at what it leaves; return the lines of its metrics."""
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    monkeypatch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    monkeypatch.setattr(episode_module, "parse_turn", read_turn)
    folder, run = fvqa(tmp_path / "FVQA"), tmp_path / "run"
    with served(replies, 0.02) as (url, bodies):
        train(job(folder, model, url, **changes), run)
    lines = records.read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert len(bodies) > 10 and all(np.isfinite(line["loss/total"]) for line in lines)
    assert 0 < sum(line["reward/unjudged"] for line in lines) < 10 and lines[-1]["eval/unjudged"] >= 0
    assert sum(line["tools/calls/image_search_tool"] for line in lines) > 0
    played = [one for path in sorted((run / "episodes").glob("*.npz")) for one in records.load(path)]
    assert all(one.judged or one.advantage == 0 for one in played)
    results = [turn.result for one in played for turn in one.turns if turn.call_name == "image_search_tool"]
    assert any("- Wikidata" in (result or "") for result in results)
    assert (run / "export" / "model.safetensors").is_file()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "verdicts.sqlite" in files
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    return lines


@pytest.mark.nightly
def test_ten_steps_on_fvqa_rows_with_the_shipped_model(tmp_path, monkeypatch):
    trained(tmp_path, monkeypatch, None)


@pytest.mark.nightly
def test_ten_steps_on_fvqa_rows_with_a_random_model_that_has_the_published_tokenizer(
    tmp_path, monkeypatch, stopping_model
):
    lines = trained(tmp_path, monkeypatch, stopping_model, **{"rollout.max_think_tokens": 6})
    assert 0 < sum(line["rollout/thoughts_closed"] for line in lines) <= sum(line["rollout/turns"] for line in lines)
    exported = {path.name for path in (tmp_path / "run" / "export").iterdir()}
    assert {path.name for path in stopping_model.iterdir()} <= exported
