"""Compares the averaged weights of two runs at their newest checkpoints.

    python launch/bench/compare_runs.py WORKDIR OTHER_WORKDIR

Prints one JSON line: the steps, whether all weights are bit-identical, and the norm of the
difference relative to that of the weights.
"""

import json
import math
import sys

import jax
import numpy as np

from causalfusion_jax.sampling.trained import from_run


def difference(a, b) -> dict:
    """`identical`, and the relative difference of two trees of arrays."""
    a, b = (jax.tree.leaves(jax.device_get(tree)) for tree in (a, b))
    distance = math.sqrt(sum(float(np.sum((x - y) ** 2, dtype=np.float64)) for x, y in zip(a, b, strict=True)))
    norm = math.sqrt(sum(float(np.sum(x**2, dtype=np.float64)) for x in a))
    return {
        "weights identical": all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True)),
        "relative difference of weights": float(f"{distance / norm:.3g}"),
    }


def main(workdirs: list[str]) -> None:
    """Prints the comparison."""
    runs = [from_run(workdir) for workdir in workdirs]
    steps = [run.origin["step"] for run in runs]
    print(json.dumps({"steps": steps, **difference(*(run.params() for run in runs))}))


if __name__ == "__main__":
    main(sys.argv[1:])
