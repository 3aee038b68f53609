"""Show the progress of a sweep as a table: one line for each row, one column for each seed."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tapo_jax.config import UserError
from tapo_jax.records import read_json
from tapo_jax.report.results import AGAIN
from tapo_jax.sweep import processes
from tapo_jax.sweep import runs as sweep
from tapo_jax.sweep.runs import Run

STYLES = {"done": "green", "failed": "bold red", "running": "cyan", "interrupted": "yellow", "elsewhere": "dim"}
REFRESH_S = 2.0


class Progress:
    """`with Progress(runs) as watch: …`, where watch(run, state) is called at every event.

    If the output is not a terminal (a log file), every event is a line.
    """

    def __init__(self, runs: Sequence[Run], console: Console | None = None) -> None:
        self._runs, self._console = runs, console or Console()
        self._cells = {(run.row, run.seed): cell(run, sweep.state(run)) for run in runs}
        self._told: dict[tuple[str, int], str] = {}
        self._live = Live(self.table(), console=self._console, auto_refresh=False)
        self._drawn = 0.0

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._live.update(self.table(), refresh=True)
            self._live.__exit__(*error)
        else:
            self._console.print(self.table())

    def __call__(self, run: Run, state: str) -> None:
        key = run.row, run.seed
        self._cells[key] = cell(run, state)
        if self._told.get(key) != state and not self._console.is_terminal:
            self._console.print(f"{run.row} seed {run.seed}: {self._cells[key][0]}", soft_wrap=True)
        self._told[key] = state
        if self._console.is_terminal and time.monotonic() - self._drawn > REFRESH_S:
            self._drawn = time.monotonic()
            self._live.update(self.table(), refresh=True)

    def table(self) -> Table:
        seeds = sorted({run.seed for run in self._runs})
        made = Table("row", *(f"seed {seed}" for seed in seeds))
        for row in dict.fromkeys(run.row for run in self._runs):
            cells = [self._cells.get((row, seed), ("", "")) for seed in seeds]
            made.add_row(row, *(f"[{style}]{text[:28]}[/]" if style else text for text, style in cells))
        return made


def cell(run: Run, state: str) -> tuple[str, str]:
    """Return (text, style) of a run: its held-out accuracy, its step, or why it failed."""
    text = state
    if state == "done":
        found = read_json(run.result / "result.json", way=AGAIN, needs=("evals",))
        try:
            text = f"{100 * found['evals'][-1][2]:.1f} %"
        except (TypeError, IndexError) as error:
            raise UserError(f"{run.result / 'result.json'} is damaged (it has no evaluations): {AGAIN}.") from error
    elif state == "failed":
        found = read_json(run.result / "failed.json", way=AGAIN)
        text = f"failed: {found.get('error', 'no reason given')}"
    elif state == "running":
        text = "{}/{}".format(*processes.progress(run))
    return text, STYLES.get(state, "")
