"""The pages under docs/ are current: generated ones, code in them, the commands, links and pictures."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import recorded

from tapo_jax import records
from tapo_jax.tools import ToolRunner
from tapo_jax.types import Identity, Text, ToolCall

ROOT = Path(__file__).parents[1]
MAKE = ROOT / "docs" / "make"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LARGEST_PICTURE = 150_000  # bytes


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts of docs/make can be imported by their names."""
    monkeypatch.syspath_prepend(str(MAKE))


def test_the_page_of_config_fields_is_that_of_the_config():
    import config_page

    assert config_page.PAGE.read_text(encoding="utf-8") == config_page.page(), "run python docs/make/config_page.py"


@pytest.mark.nightly
def test_the_pictures_of_an_episode_and_of_a_rollout_can_be_drawn(tmp_path):
    import tour_figures
    from player import make_player, watch

    player = make_player(slots=6)
    tour_figures.draw_episode(player, tmp_path / "episode.png")
    tour_figures.draw_round(watch(player, 4, 4, step=2), 6, tmp_path / "rollout.png")
    assert all((tmp_path / name).stat().st_size > 9_000 for name in ("episode.png", "rollout.png"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_of_a_page_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_and_the_commands_of_a_page_name_what_exists(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "tapo_jax":
                module = __import__(node.module, fromlist=["*"])
                for alias in node.names:
                    if not hasattr(module, alias.name):  # a module of its own
                        __import__(f"{node.module}.{alias.name}")
    for command in blocks(page, "bash"):
        for path in re.findall(r"(?:launch|configs|docs/make)/\w+\.(?:py|sh)", command):
            assert (ROOT / path).exists(), f"{page.name} runs {path}"


def test_pictures_are_small():
    for picture in [*(ROOT / "docs").glob("*.png"), *(ROOT / "docs" / "images").glob("*.png")]:
        assert picture.stat().st_size < LARGEST_PICTURE, picture.name


def test_the_figure_of_tapo_shows_a_failure_and_the_success_that_it_borrowed_from(tmp_path):
    import credit_figure

    path = tmp_path / "episodes" / "step_000001.npz"
    records.save(path, recorded.recorded(6, 8))
    (tmp_path / "config.json").write_text(json.dumps({"tapo": {"beta": 0.8}}))
    witness, failing = credit_figure.choose([path])
    assert witness.success and not failing.success and witness.prompt == failing.prompt
    assert {turn.witness[1] for turn in failing.turns if turn.corrected} == {witness.sample}
    credit_figure.draw([path], tmp_path / "tapo.png")
    assert 10_000 < (tmp_path / "tapo.png").stat().st_size < LARGEST_PICTURE


def test_the_tool_of_the_page_works_as_it_says():
    page = ROOT / "docs" / "extend.md"
    (code,) = [block for block in blocks(page, "python") if "class Visit" in block]
    names: dict = {}
    exec(code, names)
    runner = ToolRunner(names["tools"](None), workers=1, timeout_s=5, retries=0)
    call, result = runner.run(ToolCall("visit", {"page": "contents", "goal": "an overview"}), ())
    assert (result.text, result.error) == ("1 Zooming, 2 Searching", None)
    assert call.parameters == (Identity('"contents"'), Text("an overview"))
    _, wrong = runner.run(ToolCall("visit", {"page": "9", "goal": "x"}), ())
    assert wrong.error == "no_page" and "try 'contents'" in wrong.text


def test_the_tool_that_remembers_of_the_page_works_as_it_says():
    page = ROOT / "docs" / "extend.md"
    names: dict = {}
    for word in ("class Visit", "class Notes"):
        (code,) = [block for block in blocks(page, "python") if word in block]
        exec(code, names)
    tool = names["Notes"]()
    runner = ToolRunner([tool], workers=1, timeout_s=5, retries=0)
    texts = [runner.run(ToolCall("notes", {"line": line}), (), None, "a")[1].text for line in ("x", "x")]
    runner.end("a")
    runner.close()
    assert texts == ["x", "x\nx"] and tool.lines == {}


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the site needs the extra [docs]")
    pytest.importorskip("material", reason="the site needs the extra [docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr
