"""A program for test_benchmarks: all seven benchmarks from invented rows, answered by the model of `rollout_world`.

    python tests/benchmarks_process.py DATA MODEL OUT JUDGE KILL [QUESTION …]

KILL: the process kills itself (signal 9) when it has written so many answers; 0: it does not.
QUESTION: those that get a page. The last line of the output is the number of answers that the process wrote.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import published
import tiny_run

from tapo_jax.config import run_main

NAMES = ("mmsearch", "hr_mmsearch", "fvqa_test", "infoseek", "simplevqa", "livevqa", "mat_search")


def write_data(folder: Path) -> None:
    """Two questions of each benchmark, with rows between them that are no part of it."""
    published.parquet(folder / "mmsearch" / "end2end.parquet", [published.mmsearch_row(i) for i in range(4)])
    published.parquet(
        folder / "hr_mmsearch" / "data" / "train-00000-of-00001.parquet", [published.hr_row(i) for i in range(2)]
    )
    rows = [published.fvqa_row(i) for i in range(2)]
    published.parquet(folder / "fvqa_test" / "fvqa_test.parquet", rows, published.fvqa_schema("published"))
    rows = [
        {"data_id": f"i{i}", "image_id": f"oven_{i}", "question": "how?", "answer": [f"g{i}"], "answer_eval": [f"g{i}"]}
        for i in range(2)
    ]
    published.json_lines(folder / "infoseek" / "infoseek_val.jsonl", rows)
    published.parquet(
        folder / "simplevqa" / "test-00000-of-00001.parquet", [published.simplevqa_row(i) for i in range(4)]
    )
    for i in range(2):
        published.save(folder / "infoseek" / "images" / f"oven_{i}.png", 10 + i)
        published.save(folder / "livevqa" / "image" / f"{i}.png", 20 + i)
        published.save(folder / "mat_search" / "MAT-Benchmark" / "MAT-Search-image" / f"{i}.png", 30 + i)
    rows = [
        {"sample_id": f"l{i}", "query": "who?", "query_image": f"/image/{i}.png", "gt_answer": "g1"} for i in (0, 1)
    ]
    (folder / "livevqa" / "qa.json").write_text(json.dumps(rows))
    rows = [{"id": i, "question": "age?", "answer": ["g1", "g2"], "image_path": f"{i}.png"} for i in range(2)]
    (folder / "mat_search" / "MAT-Benchmark" / "MAT-Search.json").write_text(json.dumps(rows))


def read_turn(text: str):
    """As in `tiny_run`, with answers that differ: some of them are accepted."""
    parsed = tiny_run.read_turn(text)
    return parsed if parsed.answer is None else dataclasses.replace(parsed, answer=f"g{sum(text.encode()) % 4}")


def config(data: Path, model: Path, judge: str):
    made = tiny_run.config(model, "benchmarks.py")
    made.benchmarks.update({name: str(data / name) for name in NAMES})
    made.rollout.slots = 4
    made.reward.judge.update(endpoint=judge, model="m", retries=0, max_failed=1.0)
    return made


def main(argv: list[str]) -> None:
    from tapo_jax import processes

    processes.join()
    from tapo_jax.evaluate import asking, checkpoint
    from tapo_jax.rollout import episode

    data, model, out, judge, kill = Path(argv[1]), Path(argv[2]), argv[3], argv[4], int(argv[5])
    tiny_run.patch(setattr)
    episode.parse_turn = read_turn
    written, add = 0, asking.AnswerFile.add

    def counted(file, answer):
        nonlocal written
        add(file, answer)
        written += 1
        if written == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    asking.AnswerFile.add = counted
    checkpoint.run(
        config(data, model, judge), str(model), out, samples=2, page=bool(argv[6:]), questions=tuple(argv[6:])
    )
    print(written)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_main(main, words=True)
