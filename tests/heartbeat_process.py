"""One of two processes that wait for each other: python heartbeat_process.py PORT RANK FOLDER. Process 1 comes late."""

import os
import sys
import time
from pathlib import Path

os.environ["JAX_NUM_CPU_DEVICES"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from tapo_jax import processes


def main(port: str, rank: int, folder: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    heart = processes.Heartbeat(Path(folder), 1.0, lambda text: print(f"said: {text}", flush=True))
    processes.any_of(False)  # both have begun
    with heart.beating():
        for heart.step in (1, 2):
            heart.come("rollout")
            if heart.step == 2 and rank == 1:
                heart.note("rollout, waiting for tools,")
                time.sleep(4.0)
            heart.come("update")
            processes.any_of(False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
