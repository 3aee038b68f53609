"""Time the policy losses: value and gradient with respect to the log-probabilities of a whole batch."""

import jax
import numpy as np

from tapo_jax.bench import timing
from tapo_jax.learn import losses


def add_arguments(parser) -> None:
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2048)


def run(args) -> list[dict]:
    rng = np.random.default_rng(0)
    shape = args.rows, args.tokens
    old = -rng.random(shape, np.float32)
    logp = old + 0.1 * rng.standard_normal(shape, np.float32)
    advantage = rng.standard_normal(shape, np.float32)
    arrays = jax.device_put((logp, old, advantage, rng.random(shape) < 0.7))
    rows = []
    for algorithm, chosen in losses.LOSSES.items():

        def loss(logp, old, advantage, mask, algorithm=algorithm):
            return losses.policy_loss(logp, old, advantage, mask, losses.Settings(algorithm))

        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*arrays).compile()
        median, fastest = timing.timed(compiled, *arrays, repeats=args.repeats)
        rows.append(
            {
                "loss": algorithm,
                "aggregation": chosen.aggregation,
                "tokens": args.rows * args.tokens,
                "ms": median * 1e3,
                "fastest_ms": fastest * 1e3,
                "ns_per_token": median * 1e9 / (args.rows * args.tokens),
                "memory_mib": timing.memory_mib(compiled),
            }
        )
    return rows
