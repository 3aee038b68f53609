"""One of two processes of a rollout test: python rollout_process.py PORT RANK FIRST STOP OUT TENSOR PAGE plays
prompts FIRST … STOP - 1. TENSOR 2: a layout of its own, in which every two devices that share the heads belong to two
processes; 0: that of training. PAGE: tokens of a page, of which there are as few as are allowed; 0: no pages."""

import dataclasses
import json
import os
import sys

os.environ["JAX_NUM_CPU_DEVICES"] = "4"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import rollout_world as world
import test_rollout

from tapo_jax import sharding
from tapo_jax.rollout import episode as episode_module
from tapo_jax.rollout.schedule import Shapes


def main(port: str, rank: int, first: int, stop: int, out: str, tensor: int, page: int) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    episode_module.parse_turn = world.read_turn
    devices = jax.devices()
    if tensor:
        devices = [device for pair in zip(devices[:4], devices[4:], strict=True) for device in pair]
    mesh = sharding.make_mesh(data=4, fsdp=2, devices=devices)
    shapes = Shapes(
        extend_rows=(1,), decode_rows=(1,), lengths=(192,), patches=(128,), windows=(192,), chunk=5, merge=2
    )
    if page:
        shapes = dataclasses.replace(shapes, page=page, pages=-(-192 // page) + 1)
    sampler = test_rollout.make_sampler(shapes=shapes, mesh=sharding.rollout_mesh(mesh, tensor=tensor))
    params = sharding.put_replicated(jax.device_get(world.params()), mesh)
    questions = world.prompts(4)[first:stop]
    episodes, _ = test_rollout.play(sampler, params, prompts=questions, first_prompt=first)
    result = {
        "slots": sampler.slots,
        "mesh": dict(sampler.mesh.shape),
        "tokens": [episode.token_T.tolist() for episode in episodes],
    }
    with open(out, "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5], *map(int, sys.argv[6:8]))
