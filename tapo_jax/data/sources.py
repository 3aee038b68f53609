"""Build what a config names: the questions of a split, the tools that can answer them, and the reward of an answer.

`data.source` is "atlas" (the embedded world), one of `readers.READERS` (a data set in the folder data.dir), or your own
"package.module:function", called as function(config, split) -> Sequence[Prompt]. `tools.source` is "atlas", "recorded"
(zoom, and the image searches that were recorded for the questions), "mcp" (zoom; the tools of `tools.mcp` are added to
any source), "verl" (the YAML file `tools.verl`) or "package.module:function", called as function(config) -> list[Tool];
`reward.source` is "rewards" or "package.module:function", called as function(episode) -> {name: number}, including
"accuracy", or -> `rewards.judged.Scored`, which can also say that it is unknown whether the answer is right.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from tapo_jax import rewards
from tapo_jax.atlas.play import Settings, make_tools
from tapo_jax.atlas.world import real_world
from tapo_jax.config import UserError
from tapo_jax.data import atlas
from tapo_jax.data.foreign_tools import mcp_tools, verl_tools
from tapo_jax.data.readers import READERS, read
from tapo_jax.rewards import judge
from tapo_jax.rewards.judged import JudgedScore, Scored
from tapo_jax.tools.base import Tool, stop
from tapo_jax.tools.page_reader import read_page
from tapo_jax.tools.recorded_image_search import RecordedImageSearch
from tapo_jax.tools.remote_search import RemoteTextSearch
from tapo_jax.tools.search_store import Kept
from tapo_jax.tools.visit import Visit
from tapo_jax.tools.zoom import ZoomTool
from tapo_jax.types import IMAGE_SEARCH, TEXT_SEARCH, VISIT, ZOOM, BadPrompt, Episode, Prompt


def prompts(config: Any, split: str) -> Sequence[Prompt]:
    """Return all questions of a split. Raises UserError if the data set or the split does not exist."""
    if ":" in config.data.source:
        return _own_prompts("data.source", config.data.source, config, split)
    if config.data.source not in READERS:
        raise UserError(
            f"data.source is '{config.data.source}': use {', '.join(READERS)} or your own \"package.module:function\"."
        )
    if config.data.source == "atlas":
        return _atlas_prompts(config, split)
    return read(config.data.source, config.data.dir, split)


def _own_prompts(field: str, path: str, config: Any, split: str) -> Sequence[Prompt]:
    """Return the questions of a user's function. If they are a list, equal ids have to be equal questions."""
    try:
        found = _function(field, path)(config, split)
    except BadPrompt as error:
        raise UserError(f"{field} is '{path}', and {error}.") from error
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise UserError(f"{field} is '{path}', which gave a {type(found).__name__}: give a sequence of Prompt.")
    asked: dict[str, tuple] = {}
    for prompt in found if isinstance(found, (list, tuple)) else ():
        if not isinstance(prompt, Prompt):
            raise UserError(f"{field} is '{path}', which gave a {type(prompt).__name__} for a Prompt.")
        question = (prompt.question, prompt.answers)
        if asked.setdefault(prompt.id, question) != question:
            raise UserError(f"{field} is '{path}', and two of its questions have the id '{prompt.id}'.")
    return found


def tools(config: Any) -> list[Tool]:
    """Return the tools of config.tools.names, in that order. Raises UserError if a name does not exist."""
    if ":" in config.tools.source:
        found = _function("tools.source", config.tools.source)(config)
    elif config.tools.source == "atlas":
        found = make_tools(real_world("train"), atlas_settings(config))
    elif config.tools.source == "recorded":
        found = [ZoomTool(), RecordedImageSearch(results=config.tools.image_top_k)]
    elif config.tools.source == "mcp":
        if not config.tools.mcp:
            raise UserError('tools.source is "mcp" and tools.mcp is empty: name the JSON file of the servers.')
        found = [ZoomTool()]
    elif config.tools.source == "verl":
        found = []
    else:
        raise UserError(
            f"tools.source is '{config.tools.source}': use atlas, recorded, mcp, verl or your own "
            '"package.module:function".'
        )
    made = {tool.name: tool for tool in found}
    made |= {tool.name: tool for tool in remote_tools(config.tools, own=tuple(made))}
    theirs = _foreign_tools(config.tools)
    made |= {tool.name: tool for tool in theirs}
    unknown = next((name for name in config.tools.names if name not in made), None)
    if theirs and (unknown or not {tool.name for tool in theirs} & set(config.tools.names)):
        stop(theirs)  # they would never be called
    if unknown:
        raise UserError(f"tools.names has '{unknown}': the tools of this source are {', '.join(made)}.")
    return [made[name] for name in config.tools.names]


def _foreign_tools(c: Any) -> list[Tool]:
    """Return the tools of MCP servers and of verl's file."""
    found: list[Tool] = []
    if c.source == "verl":
        if not c.verl:
            raise UserError('tools.source is "verl" and tools.verl is empty: name the YAML file of the tools.')
        found += verl_tools(c.verl, timeout_s=c.timeout_s, known=lambda name: _known_tool(name, c), imported=_function)
    if c.mcp:
        try:
            found += mcp_tools(c.mcp, timeout_s=c.timeout_s)
        except BaseException:
            stop(found)
            raise
    return found


def _known_tool(name: str, c: Any) -> Tool:
    if name == ZOOM:
        return ZoomTool()
    if name == IMAGE_SEARCH:
        return RecordedImageSearch(results=c.image_top_k)
    search = next((tool for tool in remote_tools(c) if tool.name == TEXT_SEARCH), None)
    if search is None:
        raise UserError(f"tools.verl '{c.verl}' has a text search, and no service is named: set tools.endpoint.")
    return search


def remote_tools(c: Any, own: Sequence[str] = ()) -> list[Tool]:
    """Return the tools that ask somebody else: the text search of a service or of a recording, and visits.

    own: the names of the tools of the source; one of its own named "visit" stays.

    In a replay of nothing but visits, the text search is that of this process, as it was when they were recorded.
    """
    searches, visits = bool(c.endpoint or c.replay or c.backend != "search-r1"), VISIT in c.names and VISIT not in own
    if not searches and not visits:
        if c.record or c.cache:
            field = "record" if c.record else "cache"
            raise UserError(
                f"tools.{field} is '{c[field]}' without tools.endpoint: only searches of a service are kept."
            )
        return []
    kept, found = Kept(cache=c.cache, record=c.record, replay=c.replay), []
    if kept.replays(VISIT) and not kept.replays(c.backend) and not c.endpoint and c.backend == "search-r1":
        searches = False
    if searches:
        search = RemoteTextSearch(
            c.endpoint,
            backend=c.backend,
            asked=not c.replay,
            top_k=c.text_top_k,
            budget=c.text_budget,
            timeout_s=c.timeout_s,
            retries=c.retries,
            per_second=c.requests_per_second,
            request=dict(c.request),
            kept=kept,
        )
        found.append(search)
    if visits:
        read = None if c.replay else read_page
        visit = Visit(
            budget=c.visit_budget, timeout_s=c.timeout_s, per_second=c.requests_per_second, kept=kept, read=read
        )
        found.append(visit)
    return found


def score(config: Any, *, evaluating: bool = False) -> Callable[[Episode], dict[str, float] | Scored]:
    """Return the function that gives an episode its named rewards, in training or in evaluations.

    Raises UserError if the source does not exist or a judge has no key; the function raises it if accuracy, or a
    reward that has a weight in reward.weights, is missing.
    """
    settings = judge_settings(config, evaluating=evaluating)
    if config.reward.source == "rewards":
        return rewards.score if settings is None else JudgedScore(judge.Judge(settings))
    if settings is not None:
        raise UserError(
            f"reward.source is '{config.reward.source}' and a judge has an endpoint: your own function asks its own "
            'judge, so leave the endpoint empty, or set reward.source to "rewards".'
        )
    if ":" not in config.reward.source:
        raise UserError(
            f"reward.source is '{config.reward.source}': use rewards or your own \"package.module:function\"."
        )
    function, weighted = _function("reward.source", config.reward.source), set(config.reward.weights)
    extra = dict(config.reward.extra)

    def checked(episode: Episode) -> dict[str, float] | Scored:
        given = function(episode, **extra)
        named = given.rewards if isinstance(given, Scored) else given
        found = {name: float(value) for name, value in named.items()}
        if missing := sorted((weighted | {"accuracy"}) - found.keys()):
            raise UserError(
                f"reward.source '{config.reward.source}' gave no {', '.join(missing)}: every name of reward.weights is "
                "needed, and accuracy, by which TAPO knows a success."
            )
        return dataclasses.replace(given, rewards=found) if isinstance(given, Scored) else found

    return checked


def judge_settings(config: Any, *, evaluating: bool = False) -> judge.Settings | None:
    """Return the judge of training or of evaluations; None if there is none.

    Raises UserError if it has no name, or a key in its address.
    """
    section = "eval" if evaluating and config.eval.judge.endpoint else "reward"
    fields = dict(config[section].judge)
    if not fields["endpoint"]:
        return None
    if not fields["model"]:
        raise UserError(f"{section}.judge.model is empty: give the name that the endpoint knows the judge by.")
    address = urllib.parse.urlsplit(fields["endpoint"])
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UserError(f'{section}.judge.endpoint has no host: give "http://host:port/v1".')
    if address.username or address.password or address.query:
        raise UserError(
            f"{section}.judge.endpoint holds more than an address: a key belongs into the environment variable that "
            f"{section}.judge.key_variable names, because the config is written to files."
        )
    return judge.Settings(**fields)


def score_workers(config: Any, *, evaluating: bool = False) -> int:
    """Return the number of threads that score episodes."""
    settings = judge_settings(config, evaluating=evaluating)
    return config.reward.workers if settings is None else settings.concurrency


def _function(field: str, path: str) -> Callable:
    module, _, name = path.partition(":")
    try:
        return vars(importlib.import_module(module))[name]
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module}.".startswith(f"{error.name}."):
            raise UserError(
                f"{field} is '{path}', and {module} imports {error.name}, which is not installed here: install it."
            ) from error
        raise UserError(f"{field} is '{path}', and there is no function of this name to import.") from error
    except (ImportError, KeyError, ValueError) as error:
        raise UserError(f"{field} is '{path}', and there is no function of this name to import.") from error


def _atlas_prompts(config: Any, split: str) -> Sequence[Prompt]:
    settings, sizes = atlas_settings(config), tuple(config.data.sizes)
    described = json.dumps([dataclasses.asdict(settings), config.data.world_seed, sizes])
    folder = hashlib.blake2b(described.encode(), digest_size=6).hexdigest()
    directory = _data_dir(config) / folder
    return atlas.read(directory, split, settings=settings, seed=config.data.world_seed, sizes=sizes)


def atlas_settings(config: Any) -> Settings:
    return Settings(
        hops=tuple(config.data.hops),
        outlines=config.data.outlines,
        size=config.data.size,
        outline=tuple(config.data.outline),
        zoom_size=config.tools.zoom_size,
        image_top_k=config.tools.image_top_k,
        thumbnails=config.tools.thumbnails,
        text_top_k=config.tools.text_top_k,
        text_budget=config.tools.text_budget,
        mix=_mix(config.data.mix),
    )


def _mix(shares: Any) -> tuple[tuple[str, float], ...]:
    """Return the kinds of question with a share above 0; () if all are open, which needs no draw."""
    kinds = tuple((kind, float(share)) for kind, share in shares.items() if share > 0)
    return () if [kind for kind, _ in kinds] == ["open"] else kinds


def _data_dir(config: Any) -> pathlib.Path:
    """Return config.data.dir, or a folder of the user's cache."""
    if config.data.dir:
        return pathlib.Path(config.data.dir)
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "tapo_jax" / "atlas"
