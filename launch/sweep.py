"""Run the rows of a sweep over seeds: `python launch/sweep.py --sweep=main --seeds=0-4 --out=DIR`.

The sweeps are in configs/ablations.py; `--sweep=beta,support` runs two into one folder, where they share base rows, and
`--sweep=support,beta_0.4` a sweep and a single row of another. All rows of a seed run before the next seed, so that the
results are balanced at any time. The same command resumes the sweep: finished and failed runs are skipped (`--retry`
repeats failed ones), interrupted ones continue. Then: `python -m tapo_jax.report sweep DIR`.
"""

import sys
from pathlib import Path

from absl import flags

from tapo_jax.check import check
from tapo_jax.config import UserError, beside, check_positive, run_main
from tapo_jax.models.shipped import model_directory
from tapo_jax.sweep import processes
from tapo_jax.sweep import runs as sweep
from tapo_jax.sweep.table import Progress

SWEEP = flags.DEFINE_string("sweep", None, "A sweep or a row of configs/ablations.py, or several: support,beta_0.4.")
SEEDS = flags.DEFINE_string("seeds", "0-2", "Seeds: 0,1,2 or 0-4.")
OUT = flags.DEFINE_string("out", None, "Where the small results are kept.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs themselves are kept; left out: in --out.")
JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time; each gets its share of the cores.")
ARG = flags.DEFINE_string("arg", "", "Further arguments of the config: test, steps=20.")
WORLD = flags.DEFINE_string("world", "open", "Which questions all runs ask: a world of configs/ablations.py.")
RETRY = flags.DEFINE_bool("retry", False, "Also run again what has failed.")
flags.mark_flags_as_required(["sweep", "out"])

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "ablations.py"


def main(argv: list[str]) -> None:
    del argv
    check_positive("--jobs", JOBS.value)
    for name in ("row", "seed", "world"):
        if any(part.partition("=")[0].strip() == name for part in ARG.value.split(",")):
            raise UserError(f"--arg sets {name}, which --sweep, --seeds and --world choose: leave it out of --arg.")
    rows, sweeps, get_config = (beside(str(CONFIG), CONFIG.name, name) for name in ("ROWS", "SWEEPS", "get_config"))
    names, seeds = sweep.parse_sweeps(SWEEP.value, sweeps, rows), sweep.parse_seeds(SEEDS.value)
    out = Path(OUT.value).absolute()
    workdir = Path(WORKDIR.value).absolute() if WORKDIR.value else out
    runs, models = [], {}
    for seed in seeds:
        for name in names:
            arg = f"row={name},seed={seed},world={WORLD.value}" + (f",{ARG.value}" if ARG.value else "")
            config = get_config(arg)
            check(config)
            directory = model_directory(config.model.path, config.model.shape)
            models[directory] = models.get(directory) or sweep.fingerprint(directory)
            command = (sys.executable, str(ROOT / "launch" / "train.py"), f"--config={CONFIG}:{arg}")
            places = (root / name / f"seed_{seed}" for root in (out, workdir))
            runs.append(sweep.Run(name, seed, *places, command, sweep.as_json(config), models[directory]))
    for run in runs:
        sweep.check_same(run)
    sweep.save_plan(out, rows, names, seeds)
    if RETRY.value:
        for run in runs:
            (run.result / "failed.json").unlink(missing_ok=True)
    with Progress(runs) as watch:
        processes.work(runs, jobs=JOBS.value, cache=workdir / "compiled", watch=watch)
    states = [sweep.state(run) for run in runs]
    print(", ".join(f"{states.count(state)} {state}" for state in ("done", "failed", "waiting")))
    if states.count("waiting"):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
