"""Cost and memory of a frame against the length of the clip: full-sequence diffusion and ACDiT, with and without cache.

    python launch/bench/long_horizon.py [--frames=32] [--picture=launch/bench/long_horizon.png] [--rounds=5]

A clip of N frames, a block of B tokens each, L = N B tokens, is made in R solver steps by

- `full sequence`: every solver step runs all L tokens, noisy, as one AR step;
- `no cache`: ACDiT block by block, every solver step running `[clean frames so far | noisy frame]`;
- `cache`: the same, the clean frames being keys and values in the cache; each but the last is
  committed to it once;
- `rolling window`: with cache, and once --window frames are full, the last --window - 1 of them enter
  a fresh cache, once a frame (causalfusion_jax.sampling.rolling).

**FLOPs** are those of the matrix products in the compiled programs, loops over layers and heads
counted as often as they run, a multiply-add as two. Dense attention computes hidden pairs too: the
clip's whole sampler, one program, attends at every step to all slots of the cache, also those still
empty (on long sequences attention in tiles skips them). So what is counted here, and timed, is one
program for a frame: its solver step against a cache of the frames before it, of which nothing is
hidden. Without cache hidden pairs are computed, and counted. Only frames at which a clip of the
table ends have a program; those between are interpolated, which is exact for FLOPs with cache.

**The formula** (ACDiT, section 3.4) is, for a layer whose matrix products have theta parameters and
hidden size h, 2 L theta + 4 h L^2 for full-sequence diffusion and 2 L theta + 2 h L^2 + 2 h L B for
ACDiT. It counts a multiply-add as two, and forward alone: of all tokens once, so a solver step of
full-sequence diffusion, and of ACDiT the sum of a solver step of each block against the cache:
block i has 4 h B (i B) in attention. It leaves out embeddings, adaLN, the head, and the commits.
These are (L - B) more tokens, once in R solver steps; with them ACDiT costs less than
full-sequence diffusion where L > B and 2 h L (R - 1) > 2 theta, so from L > theta / (h (R - 1)).

Costs are a solver step's, of one clip, divided by its frames. Time is the median of interleaved
rounds, of one solver step of a frame, added up. Memory is what the clip's last program
keeps and makes beside the parameters: cache, tokens, temporaries. Prints a Markdown table and one
JSON line.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from common import interleaved, report, seconds
from flax import nnx

from causalfusion_jax.cli import machine
from causalfusion_jax.compile_ahead import costs, hlo
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.core.factorization import Role
from causalfusion_jax.models.config import TransformerConfig
from causalfusion_jax.models.kv_cache import KVCache
from causalfusion_jax.models.presets import ACDIT
from causalfusion_jax.models.sequence import ImageTokens
from causalfusion_jax.models.transformer import abstract_model, init_params
from causalfusion_jax.sampling.sampler import Denoiser

_FRAMES = flags.DEFINE_integer("frames", 32, "The longest clip.")
_GRID = flags.DEFINE_list("grid", ["4", "8"], "Token rows and columns of a frame.")
_HIDDEN = flags.DEFINE_integer("hidden", 256, "Width; heads of 64.")
_LAYERS = flags.DEFINE_integer("layers", 2, "Depth.")
_BATCH = flags.DEFINE_integer("batch", 2, "Clips at a time.")
_WINDOW = flags.DEFINE_integer("window", 8, "Frames of the rolling window.")
_SOLVER_STEPS = flags.DEFINE_integer("solver_steps", 25, "Solver steps R of a block, which share its commit.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved rounds.")
_PICTURE = flags.DEFINE_string("picture", "", "PNG to write [none].")
WAYS = ("full sequence", "no cache", "cache", "rolling window")
NO_COMMITS = "cache, without commits"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
      frame: token rows and columns of a frame, which is a block.
      hidden, heads, layers: of the network.
      batch: clips at a time.
      window: frames of the rolling window.
      solver_steps: R.
    """

    frame: tuple[int, int] = (4, 8)
    hidden: int = 256
    heads: int = 4
    layers: int = 2
    batch: int = 2
    window: int = 8
    solver_steps: int = 25

    @property
    def block(self) -> int:
        """Tokens B in a block."""
        return self.frame[0] * self.frame[1]

    def model(self, frames: int) -> TransformerConfig:
        """ACDiT for clips of `frames` frames; attention is dense, so that all of it can be counted."""
        return TransformerConfig(
            hidden=self.hidden,
            heads=self.heads,
            layers=self.layers,
            grid=(frames, *self.frame),
            token_dim=4,
            num_classes=10,
            attention="dense",
            **ACDIT,
        )


class Cost(NamedTuple):
    """Of one solver step of a clip.

    Attributes:
      flops: of matrix products.
      bytes: beside the parameters, at the end.
      seconds: median.
    """

    flops: float
    bytes: float
    seconds: float


# --- The formula ------------------------------------------------------------------


def layer_parameters(setting: Setting) -> int:
    """theta: parameters in a layer's matrix products with tokens."""
    model = setting.model(1)
    return 4 * model.hidden**2 + 2 * model.hidden * model.mlp_hidden


def full_sequence_formula(setting: Setting, tokens: int) -> int:
    """FLOPs of a solver step of full-sequence diffusion over `tokens`."""
    return setting.layers * (2 * tokens * layer_parameters(setting) + 4 * setting.hidden * tokens**2)


def acdit_formula(setting: Setting, tokens: int) -> int:
    """FLOPs of a solver step of every block of ACDiT, with cache."""
    attention = 2 * setting.hidden * tokens**2 + 2 * setting.hidden * tokens * setting.block
    return setting.layers * (2 * tokens * layer_parameters(setting) + attention)


def break_even_tokens(setting: Setting) -> float:
    """Tokens L above which ACDiT with cache, commits included, costs less than full-sequence diffusion."""
    commits = layer_parameters(setting) / (setting.hidden * max(setting.solver_steps - 1, 1e-9))
    return max(setting.block, commits)


# --- The programs -----------------------------------------------------------------


def _prefix(setting: Setting, frames: int, batch: int):
    """Clean frames in a cache without a free slot."""
    model = setting.model(max(frames, 1))
    slots = frames * setting.block
    cache = KVCache.empty(model.layers, batch, slots, model.heads, model.head_dim, jnp.dtype(model.dtype))
    # Keys of one vector: nothing depends on their values but the result.
    return dataclasses.replace(cache, step=jnp.zeros((batch, slots), jnp.int32), length=jnp.int32(slots))


def denoise(setting: Setting, frames: int, cached: int, tokens: int):
    """Program and arguments of one solver step of `tokens` new tokens after `cached` frames."""
    model = setting.model(frames)
    cache = _prefix(setting, cached, setting.batch)
    ids = jnp.broadcast_to(cached * setting.block + jnp.arange(tokens), (setting.batch, tokens))
    x = jnp.zeros((setting.batch, tokens, model.token_dim))

    def run(params, cache, x):
        network = Denoiser(
            nnx.merge(abstract_model(model)[0], params),
            cache,
            Condition(jnp.zeros(setting.batch, jnp.int32)),
            ids,
            valid=jnp.ones(tokens, bool),
            step=jnp.int32(1),
            guided=False,
            unguided=True,
        )
        return network(x, 500, 1.0)

    return run, (cache, x)


def denoise_without_cache(setting: Setting, frames: int):
    """Program and arguments of one solver step of the last of `frames`, the others clean in the same sequence."""
    model, block = setting.model(frames), setting.block
    num_clean, batch = (frames - 1) * block, setting.batch
    ids = jnp.broadcast_to(jnp.arange(frames * block), (batch, frames * block))
    role = jnp.where(ids < num_clean, Role.CLEAN, Role.NOISY).astype(jnp.int32)
    clean = jnp.zeros((batch, num_clean, model.token_dim))
    noisy = jnp.zeros((batch, block, model.token_dim))

    def run(params, clean, noisy):
        network = nnx.merge(abstract_model(model)[0], params)
        condition, t = Condition(jnp.zeros(batch, jnp.int32)), jnp.full((batch, 1), 500)
        context, image = ImageTokens(clean, ids[:, :num_clean]), ImageTokens(noisy, ids[:, num_clean:], t)
        return network.sequence(condition, context, image, role, ids // block)[0]

    return run, (clean, noisy)


def commit(setting: Setting, frames: int, cached: int, new: int):
    """Program and arguments of `new` clean frames entering a cache after `cached` frames."""
    model, count = setting.model(frames), new * setting.block
    cache = _prefix(setting, cached, setting.batch)
    ids = cached * setting.block + jnp.arange(count)
    x = jnp.zeros((setting.batch, count, model.token_dim))

    def run(params, cache, x):
        # The new keys alone: where they are written costs no product.
        network = nnx.merge(abstract_model(model)[0], params)
        image = ImageTokens(x, jnp.broadcast_to(ids, x.shape[:2]))
        return network.trunk(network.image_tokens(image, Role.CLEAN, 1 + ids // setting.block), cache)[1]

    return run, (cache, x)


class Program:
    """A compiled program, its costs for one clip, and how it is called.

    Attributes:
      flops, bytes: of one clip, bytes without those of the parameters.
      call: runs it.
    """

    def __init__(self, setting: Setting, params, run_and_args):
        run, args = run_and_args
        compiled = jax.jit(run).lower(params, *args).compile()
        counted = costs.program_costs(hlo.parse(compiled.as_text()))
        if counted.unknown:
            raise RuntimeError(f"cannot be counted: {dict(counted.unknown)}")
        memory = compiled.memory_analysis()
        kept = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        self.flops = counted.flops / setting.batch
        self.bytes = (kept - sum(leaf.nbytes for leaf in jax.tree.leaves(params))) / setting.batch
        self.call: Callable = functools.partial(seconds, functools.partial(compiled, params, *args))


def compile_all(setting: Setting, lengths: tuple[int, ...]) -> dict[tuple[str, int], Program]:
    """The programs of clips of `lengths`, by what they do and the frame, or number of frames, they do it to."""
    params = jax.jit(init_params, static_argnums=0)(setting.model(1), jax.random.key(0))
    programs = {}
    for frames in lengths:
        programs["full", frames] = denoise(setting, frames, 0, frames * setting.block)
        programs["without", frames] = denoise_without_cache(setting, frames)
        programs["cached", frames] = denoise(setting, frames, frames - 1, setting.block)
        programs["commit", frames] = commit(setting, frames, frames - 1, 1)
    if max(lengths) > setting.window > 1:
        programs["refill", setting.window] = commit(setting, setting.window, 0, setting.window - 1)
    return {key: Program(setting, params, program) for key, program in programs.items()}


# --- The clips --------------------------------------------------------------------


def clip_parts(setting: Setting, way: str, frames: int) -> list[tuple[tuple[str, int], float]]:
    """What a solver step of a clip runs, and how often; commits are a part of R solver steps."""
    often = 1 / setting.solver_steps
    if way == "full sequence":
        return [(("full", frames), 1.0)]
    if way == "no cache":
        return [(("without", frame), 1.0) for frame in range(1, frames + 1)]
    filled = min(frames, setting.window) if way == "rolling window" else frames
    parts = [(("cached", frame), 1.0) for frame in range(1, filled + 1)]
    if way == NO_COMMITS:
        return parts
    parts += [(("commit", frame), often) for frame in range(1, filled)]
    rolls = frames - filled
    return parts + ([(("cached", filled), float(rolls)), (("refill", filled), rolls * often)] if rolls else [])


def interpolated(values: dict[tuple[str, int], float], name: str, frames: int) -> float:
    """The value of programs of this name at `frames` frames."""
    known = sorted((n, value) for (kind, n), value in values.items() if kind == name)
    return float(np.interp(frames, *zip(*known, strict=True)))


def clip_cost(setting: Setting, programs, times: dict[tuple[str, int], float], way: str, frames: int) -> Cost:
    """The sum of a clip's parts; memory is that of the last frame's solver step."""
    parts = clip_parts(setting, way, frames)
    flops = {key: program.flops for key, program in programs.items()}
    kept = {key: program.bytes for key, program in programs.items()}
    last = [key for key, _ in parts if key[0] in ("full", "without", "cached")][-1]
    return Cost(
        sum(count * interpolated(flops, *key) for key, count in parts),
        interpolated(kept, *last),
        sum(count * interpolated(times, *key) for key, count in parts) / setting.batch,
    )


def measure(setting: Setting, lengths: tuple[int, ...], rounds: int) -> dict[str, dict[int, Cost]]:
    """Costs of a solver step of a clip, by way and frames."""
    programs = compile_all(setting, lengths)
    measured = interleaved(rounds, **{f"{name} {frames}": program.call for (name, frames), program in programs.items()})
    times = {key: measured[f"{key[0]} {key[1]}"] for key in programs}
    return {way: {n: clip_cost(setting, programs, times, way, n) for n in lengths} for way in (*WAYS, NO_COMMITS)}


def against_formula(setting: Setting, measured, frames: int) -> tuple[float, float]:
    """FLOPs counted over those of the formula, of full-sequence diffusion and of ACDiT without its commits."""
    tokens = frames * setting.block
    return (
        measured["full sequence"][frames].flops / full_sequence_formula(setting, tokens),
        measured[NO_COMMITS][frames].flops / acdit_formula(setting, tokens),
    )


def break_even_frames(measured, lengths, quantity: str) -> int | None:
    """The first of `lengths` from which on ACDiT with cache costs less than full-sequence diffusion."""
    cheaper = [
        getattr(measured["cache"][n], quantity) < getattr(measured["full sequence"][n], quantity) for n in lengths
    ]
    return next((n for i, n in enumerate(lengths) if all(cheaper[i:])), None)


# --- Output -----------------------------------------------------------------------


def table_rows(setting: Setting, measured, lengths) -> list[dict]:
    """A row for each length, costs by frame."""
    rows = []
    for n in lengths:
        full, acdit = against_formula(setting, measured, n)
        row = {"frames": n, "tokens": n * setting.block}
        for way in WAYS:
            row[f"{way} MFLOPs"] = round(measured[way][n].flops / n / 1e6, 1)
        row |= {"full / formula": round(full, 3), "cache less commits / formula": round(acdit, 3)}
        for way in WAYS:
            row[f"{way} ms"] = round(measured[way][n].seconds / n * 1e3, 2)
        for way in WAYS:
            row[f"{way} MB"] = round(measured[way][n].bytes / 1e6, 2)
        rows.append(row)
    return rows


def plot(setting: Setting, measured, lengths, path: str) -> None:
    """FLOPs with the formula, time, and memory, by frame, against the length of the clip."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    drawn = (
        ("MFLOPs a frame and solver step", lambda cost, n: cost.flops / n / 1e6),
        ("ms a frame and solver step", lambda cost, n: cost.seconds / n * 1e3),
        ("MB at the last frame", lambda cost, n: cost.bytes / 1e6),
    )
    for panel, (title, value) in zip(panels, drawn, strict=True):
        for way, style in zip(WAYS, ("o-", "s-", "^-", "v-"), strict=True):
            panel.plot(lengths, [value(measured[way][n], n) for n in lengths], style, markersize=4, label=way)
        panel.set(title=title, xlabel=f"frames of {setting.block} tokens", yscale="log")
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_locator(ticker.NullLocator())
        panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        panel.grid(alpha=0.3)
    tokens = [n * setting.block for n in lengths]
    formulas = (("full sequence, formula", full_sequence_formula, "k:"), ("ACDiT, formula", acdit_formula, "k--"))
    for label, formula, style in formulas:
        by_frame = [formula(setting, t) / n / 1e6 for t, n in zip(tokens, lengths, strict=True)]
        panels[0].plot(lengths, by_frame, style, label=label)
    frames = break_even_tokens(setting) / setting.block
    panels[0].axvline(frames, color="gray", linewidth=0.8, label="break-even, formula")
    panels[0].legend(fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.58))
    figure.savefig(path, dpi=90)


def main(argv):
    """Runs the benchmark."""
    del argv
    machine.keep_freed_memory()
    setting = Setting(
        frame=tuple(int(side) for side in _GRID.value),
        hidden=_HIDDEN.value,
        heads=_HIDDEN.value // 64,
        layers=_LAYERS.value,
        batch=_BATCH.value,
        window=_WINDOW.value,
        solver_steps=_SOLVER_STEPS.value,
    )
    lengths = tuple(n for n in (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if n <= _FRAMES.value)
    measured = measure(setting, lengths, _ROUNDS.value)
    report(table_rows(setting, measured, lengths))
    parted = [abs(ratio - 1) for n in lengths for ratio in against_formula(setting, measured, n)]
    print(f"counted against the formula: at most {max(parted):.1%} apart")
    predicted = break_even_tokens(setting)
    counted, timed = (break_even_frames(measured, lengths, quantity) for quantity in ("flops", "seconds"))
    print(
        "with cache cheaper than full sequence: by the formula, commits added, above "
        f"{predicted:g} tokens, {predicted / setting.block:g} frames; counted from {counted} frames; timed from {timed}"
    )
    if _PICTURE.value:
        plot(setting, measured, lengths, _PICTURE.value)


if __name__ == "__main__":
    app.run(main)
