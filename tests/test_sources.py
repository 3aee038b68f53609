"""Where questions and tools come from: Atlas, a folder of JSON lines, a function of the user's, a service."""

import json
from types import SimpleNamespace

import httpx
import pytest

from configs import tapo_grpo
from tapo_jax import rewards
from tapo_jax.config import UserError
from tapo_jax.data import sources
from tapo_jax.data.corpus import read_corpus
from tapo_jax.tools.base import ToolRunner
from tapo_jax.tools.passage_index import build
from tapo_jax.tools.remote_search import RemoteTextSearch
from tapo_jax.tools.retrieval_service import make_app
from tapo_jax.tools.text_search import TextSearch
from tapo_jax.types import Prompt, ToolCall
from tests.served import serving

PASSAGES = ["Peru: capital\nThe capital of Peru: Lima.", "Chad: capital\nThe capital of Chad: N'Djamena."]


def config(**changes):
    made = tapo_grpo.get_config("test")
    made.update_from_flattened_dict(changes)
    return made


def my_prompts(config, split):
    return [Prompt(split, "?", (), ("x",))]


def letters(config, split):
    return [Prompt("1", "?", (), "Paris")]


def twins(config, split):
    return [Prompt("1", "?", (), ("x",)), Prompt("1", "which?", (), ("x",))]


def no_prompts(config, split):
    return ["?"]


def one_prompt(config, split):
    return Prompt("1", "?", (), ("x",))


def my_tools(config):
    return [TextSearch(PASSAGES, top_k=1, budget=100)]


def my_score(episode):
    return {"accuracy": 1, "format": 0.5, "turns": len(episode.turns)}


def forgetful_score(episode):
    return {"accuracy": 1.0}


def test_atlas_by_default(tmp_path):
    prompts = sources.prompts(config(**{"data.dir": str(tmp_path)}), "held_out")
    assert len(prompts) == 16 and prompts[0].images[0].shape == (256, 256, 3)
    assert [tool.name for tool in sources.tools(config())] == [
        "image_zoom_in_tool",
        "image_search_tool",
        "text_search_tool",
    ]


def test_your_own_functions():
    made = config(**{"data.source": "tests.test_sources:my_prompts", "tools.source": "tests.test_sources:my_tools"})
    made.tools.names = ("text_search_tool",)
    assert sources.prompts(made, "train")[0].id == "train" and len(sources.tools(made)) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data.source": "vqa"}, "data.source is 'vqa': use atlas, jsonl, fvqa, mars"),
        ({"data.source": "tests.test_sources:nothing"}, "no function of this name"),
        ({"data.source": "os.no_such:thing"}, "no function of this name"),
        (
            {"data.source": "tests.test_sources:letters"},
            "the answers of question '1' are 'Paris': give a tuple of strings",
        ),
        ({"data.source": "tests.test_sources:twins"}, "two of its questions have the id '1'"),
        ({"data.source": "tests.test_sources:no_prompts"}, "gave a str for a Prompt"),
        ({"data.source": "tests.test_sources:one_prompt"}, "gave a Prompt: give a sequence of Prompt"),
        ({"data.source": "jsonl", "data.dir": "/nonexistent"}, "data folder /nonexistent does not exist"),
        ({"data.source": "fvqa", "data.dir": ""}, "data.dir is empty"),
    ],
)
def test_a_wrong_source_is_one_sentence(changes, says):
    with pytest.raises(UserError, match=says):
        sources.prompts(config(**changes), "train")
    with pytest.raises(UserError, match="The split 'test' does not exist"):
        sources.prompts(config(), "test")


def test_a_wrong_tool_is_one_sentence():
    made = config()
    made.tools.names = ("calculator",)
    with pytest.raises(UserError, match="'calculator': the tools of this source are image_zoom_in_tool"):
        sources.tools(made)


def test_recorded_tools():
    made = config(**{"tools.source": "recorded", "tools.endpoint": "http://127.0.0.1:9"})
    assert [tool.name for tool in sources.tools(made)] == list(made.tools.names)
    made.tools.endpoint = ""
    with pytest.raises(UserError, match="'text_search_tool': the tools of this source are image_zoom_in_tool, image_s"):
        sources.tools(made)


def test_your_own_rewards():
    """Names without a weight are kept, for the metrics; those with one must be there."""
    episode = SimpleNamespace(turns=[1, 2, 3])
    assert sources.score(config()) is rewards.score
    own = sources.score(config(**{"reward.source": "tests.test_sources:my_score"}))(episode)
    assert own == {"accuracy": 1.0, "format": 0.5, "turns": 3.0} and all(type(value) is float for value in own.values())
    with pytest.raises(UserError, match="reward.source 'tests.test_sources:forgetful_score' gave no format: every"):
        sources.score(config(**{"reward.source": "tests.test_sources:forgetful_score"}))(episode)
    for path, says in (
        ("exact", "use rewards or your own"),
        ("tests.test_sources:nothing", "no function of this name"),
    ):
        with pytest.raises(UserError, match=says):
            sources.score(config(**{"reward.source": path}))


def test_a_folder_of_questions(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "q", "answers": ["x", "y"]}))
    prompts = sources.prompts(config(**{"data.source": "jsonl", "data.dir": str(tmp_path)}), "train")
    assert [(prompt.id, prompt.answers) for prompt in prompts] == [("1", ("x", "y"))]


@pytest.fixture
def service():
    with serving(make_app(build(PASSAGES))) as address:
        yield address


def test_the_service_gives_what_the_local_search_gives(service):
    local = TextSearch(PASSAGES, top_k=1, budget=100)
    remote = RemoteTextSearch(service, top_k=1, budget=100, timeout_s=5)
    for query in ("Chad: capital", "nothing like it"):
        assert remote({"query": query}, []).text == local({"query": query}, []).text
    assert remote.schema == local.schema


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"queries": "x"}', b'{"queries": [1]}', b'{"queries": ["x"], "topk": 0}']
)
def test_the_service_survives_bad_requests(service, body):
    assert httpx.post(f"{service}/retrieve", content=body).status_code in (400, 413)
    assert httpx.post(f"{service}/other", content=b"{}").status_code == 404
    assert httpx.post(f"{service}/retrieve", json={"queries": ["Peru"]}).status_code == 200


def test_a_service_that_is_gone_is_an_observation():
    runner = ToolRunner(
        [RemoteTextSearch("http://127.0.0.1:9", top_k=1, budget=9, timeout_s=1)], workers=1, timeout_s=5, retries=1
    )
    _, result = runner.run(ToolCall("text_search_tool", {"query": "x"}), [])
    assert result.error == "service" and "ConnectError" in result.text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"contents": "a"}\n{"text": "b"}', "line 2: the field 'contents' is missing"),
        (b'{"contents": "a"}\n\n{"contents": 5}', "line 3: the field 'contents' is 5"),
        (b'{"contents": "caf\xe9"}', "line 1: byte 18 is not UTF-8"),
        (b'{"contents": "a \\ud83d"}', "line 1: .* surrogate"),
        ('{"contents": "a"}'.encode("utf-16"), "is UTF-16"),
        (b'["a"]', "line 1|JSON list"),
        (b"", "has no passage with a word in it"),
        (b'{"contents": "..."}\n{"contents": " "}\n', "has no passage with a word in it"),
    ],
)
def test_a_corpus_that_cannot_be_searched_is_one_sentence(tmp_path, data, says):
    (tmp_path / "c.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=says):
        list(read_corpus(str(tmp_path / "c.jsonl")))


def test_no_character_of_a_passage_ends_a_line(tmp_path):
    texts = ["one\u2028two", "three\x85four", "five\u2029six"]
    lines = "\n\n".join(json.dumps({"contents": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\r\n")
    assert list(read_corpus(str(tmp_path / "c.jsonl"))) == texts


def test_a_package_that_an_own_module_lacks_is_named(tmp_path, monkeypatch):
    (tmp_path / "own_questions.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="own_questions imports no_such_package, which is not installed here"):
        sources._function("data.source", "own_questions:prompts")
    for path in ("nowhere.at_all:prompts", "no_module:prompts", "json:nothing", ":prompts"):
        with pytest.raises(UserError, match="there is no function of this name to import"):
            sources._function("data.source", path)
