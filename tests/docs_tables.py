"""The tables of docs/metrics.md, read for tests."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `([^`]+)` \|[^|]*\|[^|]*\|([^|]*)\|$", re.M)
# What the capital letters of a name stand for. A reward of one's own is no metric of a run with the built-in rewards.
LETTERS = {
    "TOOL": r"[a-z_]+",
    "KIND": r"[a-z_]+",
    "SERVICE": r"[a-z0-9_-]+",
    "MEASURE": r"[a-z0-9_]+",
    "N": r"\d+",
    "X": r"[01]\.\d+",
    "NAME": r"(?!mean$|overlong$|unjudged$).+",
}


def documented() -> dict[str, str]:
    """Give every name of the page with its "when"."""
    return {name: when.strip() for name, when in ROW.findall(PAGE.read_text(encoding="utf-8"))}


def pattern(name: str) -> re.Pattern:
    """Turn `tools/errors/KIND` into what a metric's name has to match."""
    parts = re.split(r"(TOOL|KIND|NAME|SERVICE|MEASURE|\bX\b|(?<=_)X\b|(?<=_)N\b)", name)
    return re.compile("".join(LETTERS.get(part, re.escape(part)) for part in parts))


def undocumented(names: set[str]) -> list[str]:
    """List the metrics that no name of the page matches."""
    known = [pattern(name) for name in documented() if name != "reward/NAME"]
    return sorted(name for name in names if not any(one.fullmatch(name) for one in known))


def missing(names: set[str], condition: str) -> list[str]:
    """List the names of the page with this "when" that no metric matches."""
    wanted = [name for name, when in documented().items() if when == condition]
    return [name for name in wanted if not any(pattern(name).fullmatch(metric) for metric in names)]
