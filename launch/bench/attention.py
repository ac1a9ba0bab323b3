"""Times attention by the rule, forward and gradient: dense, blockwise and, on a TPU, the Pallas kernel.

    python launch/bench/attention.py [--layout=scam --tokens=1024 --block=256] [--dtype=bfloat16] [--values]

All implementations and a matrix product of the same type take turns in interleaved rounds.
Model FLOPs count the pairs that the rule makes visible, six products each, whatever an
implementation computes. With --values, also the largest error of outputs and of gradients against
dense attention in float32, relative to the largest value; float32 is computed in full precision
for it. Prints a Markdown table, and one JSON line at the end.
"""

import functools

import jax
import numpy as np
from absl import app, flags
from common import interleaved, machine_rates, report, seconds, shares

from causalfusion_jax.core.factorization import FactorizationConfig, attends, draw_plan, training_layout
from causalfusion_jax.models.attention.dense import KeySegment, dense_attention, mask_bias
from causalfusion_jax.models.attention.flash import (
    attended_fraction,
    blockwise_attention,
    computed_fraction,
    flash_attention,
)
from causalfusion_jax.models.attention.tiles import AttentionLayout

_LAYOUT = flags.DEFINE_enum("layout", "scam", ["scam", "causalfusion"], "Steps of --block tokens, or random plans.")
_TOKENS = flags.DEFINE_integer("tokens", 1024, "Image tokens; the sequence has them clean and noisy.")
_BLOCK = flags.DEFINE_integer("block", 256, "Tokens in a step of scam.")
_CONDITION = flags.DEFINE_integer("condition_tokens", 0, "Condition tokens.")
_BATCH = flags.DEFINE_integer("batch", 2, "Samples.")
_HEADS = flags.DEFINE_integer("heads", 4, "Attention heads.")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Values in a head.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of queries, keys and values.")
_TILE = flags.DEFINE_integer("tile", None, "Tokens in a tile; default: each implementation's.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Interleaved rounds.")
_VALUES = flags.DEFINE_bool("values", False, "Also compare the values with those of dense attention in float32.")
_SKIP = flags.DEFINE_multi_enum("skip", [], ["dense", "blockwise", "pallas"], "Implementations to leave out.")


def dense(q, k, v, layout):
    """The logits of all pairs at once."""
    return dense_attention(q, [KeySegment(k, v, mask_bias(attends(*layout)))])


def implementations():
    """Attention by name."""
    tiles = dict(q_tile=_TILE.value, k_tile=_TILE.value)
    found = {"dense": dense, "blockwise": functools.partial(blockwise_attention, **tiles)}
    if jax.default_backend() == "tpu":
        found["pallas"] = functools.partial(flash_attention, interpret=False, **tiles)
    return {name: attention for name, attention in found.items() if name not in _SKIP.value}


def layout():
    """Roles and steps, int32 [batch, sequence], of queries and of keys."""
    tokens = _TOKENS.value
    if _LAYOUT.value == "scam":
        step = np.tile(np.arange(tokens) // _BLOCK.value, (_BATCH.value, 1))
    else:
        keys = jax.random.split(jax.random.key(0), _BATCH.value)
        step = jax.vmap(lambda key: draw_plan(FactorizationConfig(), (1, tokens), key).step)(keys)
    role, step = training_layout(_CONDITION.value, step)
    return AttentionLayout(role, step, role, step)


def compile_gradient(attention, q, k, v, d_out, layout):
    """Forward and gradient of traced roles and steps, compiled."""

    def run(q, k, v, d_out, layout):
        out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, layout), q, k, v)
        return out, vjp(d_out)

    return jax.jit(run).lower(q, k, v, d_out, layout).compile()


def errors(found: dict, args) -> dict[str, dict]:
    """Columns with the largest errors, by implementation.

    Args:
      found: implementations by name.
      args: of the programs that `compile_gradient` makes.
    """

    def values(attention, arrays):
        with jax.default_matmul_precision("highest" if arrays[0].dtype == np.float32 else None):
            out, gradients = compile_gradient(attention, *arrays)(*arrays)
        return jax.device_get((out, gradients))

    def largest(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return max(float(np.abs(np.float32(x) - y).max() / np.abs(y).max()) for x, y in pairs)

    exact = values(dense, (*(x.astype(np.float32) for x in args[:4]), args[4]))
    columns = {}
    for name, attention in found.items():
        out, gradients = values(attention, args)
        columns[name] = {
            "error of outputs": float(f"{largest(out, exact[0]):.2g}"),
            "error of gradients": float(f"{largest(gradients, exact[1]):.2g}"),
        }
    return columns


def main(argv):
    """Runs the benchmark."""
    del argv
    roles_and_steps = layout()
    shape = (*roles_and_steps.q_role.shape, _HEADS.value, _HEAD_DIM.value)
    args = *(jax.random.normal(jax.random.key(i), shape, _DTYPE.value) for i in range(4)), roles_and_steps
    compared = errors(implementations(), args) if _VALUES.value else {}
    compiled = {name: compile_gradient(attention, *args) for name, attention in implementations().items()}
    runs = {name: functools.partial(seconds, functools.partial(run, *args)) for name, run in compiled.items()}
    found = interleaved(_ROUNDS.value, **runs, **machine_rates(_DTYPE.value))
    visible = float(attended_fraction(roles_and_steps))
    computed = {"pallas": float(computed_fraction(roles_and_steps, _TILE.value, _TILE.value)), "dense": 1.0}
    # Two products forward, four backward, each of head_dim multiply-adds a visible pair and head.
    flops = 12 * visible * shape[0] * shape[1] ** 2 * shape[2] * shape[3]
    report(
        [
            {
                "attention": name,
                "layout": _LAYOUT.value,
                "shape": "x".join(map(str, shape)),
                "dtype": _DTYPE.value,
                "visible": round(visible, 4),
                "computed": round(computed[name], 4) if name in computed else "",
                "model GFLOPs": round(flops / 1e9, 2),
                "ms": round(found[name] * 1e3, 2),
                **shares(found, found[name], flops, run),
                "temporaries MB": round(run.memory_analysis().temp_size_in_bytes / 1e6, 1),
                **compared.get(name, {}),
            }
            for name, run in compiled.items()
        ]
    )


if __name__ == "__main__":
    app.run(main)
