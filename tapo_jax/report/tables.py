"""Write the report of a sweep: Markdown tables, the numbers as JSON, and the figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tapo_jax.report import claims
from tapo_jax.report import figures as report_figures
from tapo_jax.report.results import load, summarise


def write_sweep(directory: Path) -> str:
    """Write report.md, report.json and the figures next to the rows; return the Markdown. Raises UserError."""
    sweep = load(directory)
    summary = summarise(sweep)
    summary["claims"] = claims.claims(sweep, summary["step"])
    figures = {
        "held-out accuracy over training": ("report_curves.png", report_figures.draw_curves),
        "paired differences to the base and to the reference": (
            "report_differences.png",
            report_figures.draw_differences,
        ),
        "rows that change one number": ("report_fields.png", report_figures.draw_fields),
        "what training does to the policy": ("report_dynamics.png", report_figures.draw_dynamics),
        "credit that could be corrected, by threshold": ("report_credit.png", report_figures.draw_credit),
    }
    shown = {text: name for text, (name, draw) in figures.items() if draw(sweep, summary, directory / name)}
    text = markdown(summary, directory.resolve().name) + "".join(
        f"\n![{text}]({name})\n" for text, name in shown.items()
    )
    (directory / "report.md").write_text(text, encoding="utf-8")
    (directory / "report.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return text


def markdown(summary: Mapping[str, Any], name: str) -> str:
    """Return the tables as Markdown.

    Brackets hold 95 % bootstrap intervals over seeds; a difference is paired by seed, in points of accuracy.
    """
    lines = [
        f"# Sweep {name}",
        "",
        f"Held-out accuracy in %, at {summary['step']:g} steps and at {summary['seconds']:.0f} s of training (the "
        "shortest run's). Brackets: 95 % bootstrap interval over seeds. Differences are paired by seed, in points; a "
        "verdict needs both the bootstrap's and Student's interval to leave out 0."
        + (
            f" {summary['later']} of {summary['runs']} runs were evaluated again at their end, with up to "
            f"{summary['answers']} answers, whose mean counts."
            if summary["later"]
            else ""
        ),
        "",
        "| row | seeds | at equal steps | at equal time | base | Δ at equal steps | seeds improved | Δ at equal time "
        "| relative | verdict |",
        "|---|---:|---|---|---|---|---:|---|---:|---|",
    ]
    for row, found in summary["rows"].items():
        delta, later = found["base_at_step"], found["base_at_time"]
        cells = [
            row,
            str(len(found["seeds"])) + (f" + {found['failed']} failed" if found["failed"] else ""),
            _percent(found["at_step"]),
            _percent(found["at_time"]),
            found["base"] or "–",
        ]
        if delta is None:
            cells += ["–"] * 5
        else:
            relative = "–" if delta["relative"] is None else f"{100 * delta['relative']:+.1f} %"
            cells += [
                _points(delta),
                f"{delta['improved']}/{delta['seeds']}",
                _points(later),
                relative,
                delta["verdict"],
            ]
        lines.append("| " + " | ".join(cells) + " |")
    broken = [row for row, _, _ in summary["failed"] if row not in summary["rows"]]
    for row in dict.fromkeys(broken):
        lines.append(f"| {row} | 0 + {broken.count(row)} failed |" + " – |" * 8)
    against = [(row, found) for row, found in summary["rows"].items() if found["reference_at_step"]]
    if against:
        lines += ["", "| row | compared with | Δ at equal steps | seeds improved | verdict |", "|---|---|---|---:|---|"]
        for row, found in against:
            delta = found["reference_at_step"]
            cells = [row, found["reference"], _points(delta), f"{delta['improved']}/{delta['seeds']}", delta["verdict"]]
            lines.append("| " + " | ".join(cells) + " |")
    shares = {row: found["tapo_share"] for row, found in summary["rows"].items() if found["tapo_share"] is not None}
    if shares:
        lines += ["", f"TAPO's share of a step's time: {_range(shares.values())} % over the rows (median over steps)."]
    for row, seed, sentence in summary["failed"]:
        lines += ["", f"**Failed:** {row}, seed {seed}: {' '.join(sentence.split())}"]
    if summary["unfinished"]:
        lines += ["", "Not finished: " + ", ".join(f"{row} seed {seed}" for row, seed in summary["unfinished"]) + "."]
    lines += claims.markdown(summary.get("claims", ()))
    return "\n".join(lines) + "\n"


def _percent(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    interval = found["interval"]
    return f"{100 * found['mean']:.1f}" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")


def _points(found: Mapping[str, Any]) -> str:
    interval = found["interval"]
    return f"{100 * found['mean']:+.1f}" + (
        f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]" if interval else ""
    )


def _range(values: Any) -> str:
    low, high = 100 * min(values), 100 * max(values)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
