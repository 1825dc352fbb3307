"""FedJAX on the reference work, for ``benchmarks/rounds.py --fedjax PYTHON``.

Runs in an environment of its own (``uv venv x && uv pip install --python x/bin/python fedjax``) and
prints one JSON line. Imports nothing of fedtl.
"""

from __future__ import annotations

import json
import time

import fedjax
import jax
import jax.numpy as jnp
import numpy as np

CLIENTS, EXAMPLES, FEATURES, CLASSES, EPOCHS, BATCH, ROUNDS = 100, 500, 512, 10, 5, 50, 5


def loss(params: dict[str, jax.Array], batch: dict[str, jax.Array], rng: jax.Array) -> jax.Array:
    """Mean softmax cross-entropy of a linear head."""
    logits = batch["x"] @ params["w"] + params["b"]
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, batch["y"][:, None], axis=1))


def main() -> None:
    """Five rounds after one to compile."""
    rng = np.random.default_rng(0)
    data = [
        fedjax.ClientDataset(
            {
                "x": rng.normal(size=(EXAMPLES, FEATURES)).astype(np.float32),
                "y": rng.integers(0, CLASSES, EXAMPLES).astype(np.int32),
            }
        )
        for _ in range(CLIENTS)
    ]
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        jax.grad(loss),
        fedjax.optimizers.sgd(0.05),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=BATCH, num_epochs=EPOCHS),
    )
    params = {"w": jnp.zeros((FEATURES, CLASSES)), "b": jnp.zeros(CLASSES)}
    state = algorithm.init(params)
    seconds = []
    for round in range(ROUNDS + 1):
        keys = jax.random.split(jax.random.PRNGKey(round), CLIENTS)
        clients = [(i, data[i], keys[i]) for i in range(CLIENTS)]
        started = time.perf_counter()
        state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state.params)
        seconds.append(time.perf_counter() - started)
    each = sorted(seconds[1:])[ROUNDS // 2] / CLIENTS
    print(json.dumps({"milliseconds_per_client_round": 1e3 * each, "jax": jax.__version__}))


if __name__ == "__main__":
    main()
