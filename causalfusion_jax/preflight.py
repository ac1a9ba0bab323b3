"""Compiles a run for a TPU slice that is not present, and reports whether it fits and how fast it can be.

    python -m causalfusion_jax.preflight --config=configs/imagenet_causalfusion.py:XL --topology=v5e:16x16
    python -m causalfusion_jax.preflight --config=configs/imagenet_causalfusion.py:XL --topology=v5e:16x16,v5p:4x4x4
    python -m causalfusion_jax.preflight --config=... --topology=v5e:2x2 --job=sample --num=64
    python -m causalfusion_jax.preflight --config=... --topology=v5e:16x16 --job=run

The program (the training step, or the sampler of `config.sampling`) is compiled by the TPU
compiler, `libtpu`: pip install 'causalfusion_jax[preflight]'. The report has memory, FLOPs,
collectives, lower bounds on the time, and the largest batch that fits; if the program does not
fit, the cheapest change of settings that does, compiled too. Machine code, which takes most of
the compile time, is not generated. The last line is one JSON object. Settings are changed as for
train: --config.train.batch_size=1024.

`--job=run` compiles every program of a run instead, each with the arrays that are in HBM while it runs:
initial state, every length of the training step, the grid's sampler, the evaluator's with decoder and
Inception (`config.evaluation`), then the programs of probes and of fine-tuning, and I3D for videos. Folders
of weights need not exist: an autoencoder is then known by its name (mar_vae, sd_vae) or by the model's
latents. `--job=encode` compiles the autoencoder's encoder for a host of the slice; the config is that of
`encode`.

Topologies are GENERATION:SHAPE: v5e:16x16, v6e:4x4, v4:2x2x4, v5p:2x2x4. Exit status: 0 if every
program fits on every topology, 1 if one does not fit or does not compile, 2 for wrong input.

Bounds follow from the vendor's peak figures: no run is faster, but they are not a forecast.
"""

import json
import os
import sys

from absl import flags
from ml_collections import config_flags

from causalfusion_jax.cli import app
from causalfusion_jax.common.errors import require

# Before JAX starts: do not search for a TPU or its metadata, allow several processes, silence libtpu.
os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    JAX_PLATFORMS="cpu",
    TPU_STDERR_LOG_LEVEL="3",
    TPU_MIN_LOG_LEVEL="3",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
)

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file: configs/NAME.py or configs/NAME.py:ARG.")
_TOPOLOGY = flags.DEFINE_list("topology", None, "Slices: v5e:16x16, or several separated by commas.")
_JOB = flags.DEFINE_enum(
    "job",
    "train",
    ["train", "sample", "run", "encode"],
    "The training step, the sampler, all programs of a run, or the autoencoder's encoder.",
)
_NUM = flags.DEFINE_integer(
    "num", None, "Images in a batch that is sampled [8 for each device], or that a host encodes [64]."
)
_SEARCH = flags.DEFINE_bool("search", True, "Search for the largest batch that fits.")
_MACHINE_CODE = flags.DEFINE_bool("machine_code", False, "Generate machine code too, which takes minutes.")
_SECONDS = flags.DEFINE_float("seconds", 100.0, "Time after which no further compilation starts, for each topology.")


def _specs():
    """The jobs to compile for, checked."""
    from causalfusion_jax.common import hardware
    from causalfusion_jax.config import experiment, slices

    config = experiment.from_dict(_CONFIG.value.to_dict())
    require(_SECONDS.value >= 0, "--seconds", _SECONDS.value, "must be >= 0")
    require(_NUM.value is None or _NUM.value >= 1, "--num", _NUM.value, "must be >= 1")
    allowed = "belongs to --job=sample and --job=encode"
    require(_NUM.value is None or _JOB.value in ("sample", "encode"), "--num", _NUM.value, allowed)
    job = "sample" if _JOB.value == "sample" else "train"
    specs = []
    for topology in [hardware.topology(name) for name in _TOPOLOGY.value]:
        spec = slices.SliceJob(config, topology, job)
        if job == "sample":
            spec = spec.with_batch(_NUM.value or 8 * spec.batch_devices)
        if _JOB.value != "encode":
            slices.check(spec)
        specs.append(spec)
    return specs


def _compile(spec):
    """Compiles one program and prints its memory."""
    from causalfusion_jax.compile_ahead import compiler, report

    print(f"compiling for {spec.topology.name}: {report.settings_words(spec)} ...", end=" ", flush=True)
    try:
        compiled = compiler.compile_program(spec, _MACHINE_CODE.value)
    except compiler.CompilerError as error:
        print()
        from causalfusion_jax.compile_ahead.run_report import one_line

        print(f"error: {report.settings_words(spec)} does not compile: {one_line(str(error))}", file=sys.stderr)
        sys.exit(1)
    print(f"{report.memory_words(compiled)}, {compiled.seconds:.1f} s", flush=True)
    return compiled


def _check_programs(specs) -> None:
    """Compiles all programs of a job, prints the report and ends the process."""
    from causalfusion_jax.compile_ahead import run_report
    from causalfusion_jax.evaluation import programs
    from causalfusion_jax.prepare.settings import EncodeConfig

    if _JOB.value == "run":
        listings = [programs.run_programs(spec) for spec in specs]
    else:
        settings = EncodeConfig() if _NUM.value is None else EncodeConfig(batch_size=_NUM.value)
        listings = [programs.encode_programs(spec, settings) for spec in specs]
    results = []
    for spec, listing in zip(specs, listings, strict=True):
        results.append(run_report.preflight_run(spec, listing, lambda line: print(line, flush=True)))
        print(run_report.table(results[-1]))
        print(run_report.verdict(results[-1]))
    fits = all(result.fits for result in results)
    print(json.dumps({"fits": fits, "results": [run_report.record(result, _JOB.value) for result in results]}))
    sys.exit(0 if fits else 1)


def main(argv):
    """Runs the command."""
    del argv
    specs = _specs()
    if _JOB.value in ("run", "encode"):
        _check_programs(specs)
    from causalfusion_jax.compile_ahead import report

    results = [report.preflight(spec, _SECONDS.value, _SEARCH.value, _compile) for spec in specs]
    print(report.table(results))
    for result in results:
        print(report.verdict(result))
    fits = all(result.compiled.fits for result in results)
    print(json.dumps({"fits": fits, "results": [report.record(result) for result in results]}))
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    app.run(main, required=("config", "topology"))
