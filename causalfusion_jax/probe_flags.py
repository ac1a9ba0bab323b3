"""What `evaluate --probe` takes: which network, how it is tried on understanding, and where the result goes."""

import dataclasses
import json
import pathlib
import sys
from typing import Any

from absl import flags

from causalfusion_jax import cli, files
from causalfusion_jax.errors import require, require_one_of

_PROBE = flags.DEFINE_string("probe", None, "linear, knn, finetune or map: how well a network's features tell classes.")
_UNTRAINED = flags.DEFINE_bool("untrained", False, "With --probe: the same network with fresh weights beside it.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "With --probe: folder of a converted checkpoint, not --workdir.")
_WEIGHTS = flags.DEFINE_enum("weights", None, ["ema", "params"], "With --probe: averaged weights [ema], or the last.")
_STEP = flags.DEFINE_string("step", None, "With --probe: checkpoint to use, a step or `best` [the newest intact one].")
_join_processes = cli.define_processes()
_PROCESSES = ("multihost", "coordinator_address", "num_processes", "process_id")


def given() -> bool:
    """Whether the command line asks for a probe. Raises InputError for a flag that needs --probe."""
    if _PROBE.value is not None:
        return True
    for name in ("untrained", "checkpoint", "weights", "step", *_PROCESSES):
        require(not flags.FLAGS[name].present, f"--{name}", flags.FLAGS[name].value, "needs --probe")
    return False


def _trained(workdir: str | None):
    """The network, a `trained.Trained`."""
    from causalfusion_jax.sampling.trained import from_converted, from_run

    if workdir is not None:
        step = int(_STEP.value) if (_STEP.value or "").isdigit() else _STEP.value
        return from_run(workdir, _WEIGHTS.value or "ema", step)
    for flag in (_WEIGHTS, _STEP):
        require(flag.value is None, f"--{flag.name}", flag.value, "a converted checkpoint has one; leave it out")
    return from_converted(_CHECKPOINT.value)


def _request(kind: str, trained, config, data) -> dict[str, Any]:
    """What decides the result, as plain values."""
    learned = {"probe": dataclasses.asdict(config.probe)}
    if kind == "finetune":
        learned["finetune"] = dataclasses.asdict(config.finetune)
    of_data = {
        name: value for name, value in dataclasses.asdict(data).items()
        if name not in ("workers", "verify", "max_corrupt")
    }
    request = {"kind": kind, "of": trained.origin, "data": of_data, **learned, "dtype": config.model.dtype}
    return json.loads(json.dumps(request))


def _result_path(kind: str, workdir: str | None, out: str | None) -> pathlib.Path:
    """Where the result goes."""
    require(out is not None or workdir is not None, "--out", None, "is needed with --checkpoint: a .json file")
    path = pathlib.Path(out) if out is not None else pathlib.Path(workdir) / f"probe_{kind}.json"
    require(path.suffix == ".json", "--out", str(path), "must be a .json file")
    return path


def _written(path: pathlib.Path, request: dict[str, Any]) -> str | None:
    """The result that is there already; None where there is none. Raises InputError where it is another's."""
    if not path.exists():
        return None
    kept = files.read_json(path)
    same = isinstance(kept, dict) and kept.pop("request", None) == request
    require(same, "--out", str(path), "exists with another result; give a new file, or remove it")
    return json.dumps(kept)


def _claim(folder: pathlib.Path, request: dict[str, Any]) -> None:
    """Makes a folder this fine-tuning's. Raises InputError where it holds anything else."""
    path = folder / "request.json"
    if path.is_file():
        same = files.read_json(path) == request
        require(same, "--out", str(folder), "holds fine-tuning by other settings; give a new --out, or remove it")
        return
    files.require_new("--out", folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, request)


def _progress():
    """Prints to stderr, which the result is not on, where a person watches."""
    def show(line: str) -> None:
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    return show if sys.stderr.isatty() else lambda line: None


def run(workdir: str | None, config_values, out: str | None) -> None:
    """Probes, prints one JSON line, and writes it.

    Args:
      workdir: --workdir.
      config_values: of --config, or None: the run's own.
      out: --out.

    Raises:
      InputError: what is asked for does not fit together; nothing was touched.
    """
    from causalfusion_jax import distributed, experiment
    from causalfusion_jax.data.class_names import names_difference
    from causalfusion_jax.evaluation.probe_settings import PROBES
    from causalfusion_jax.evaluation.understanding import Study, combined

    kind = _PROBE.value
    require_one_of("--probe", kind, PROBES)
    require(
        (workdir is None) + (_CHECKPOINT.value is None) == 1, "--workdir", workdir,
        "give --workdir, or --checkpoint, and not both",
    )
    require(
        config_values is not None or _CHECKPOINT.value is None, "--config", None,
        "is needed with --checkpoint: it says on which images, and how",
    )
    path = _result_path(kind, workdir, out)
    probing = None if config_values is None else experiment.from_dict(config_values.to_dict())
    _join_processes()
    trained = _trained(workdir)
    probing = trained.config if probing is None else probing
    config = combined(trained.config, probing)
    request = _request(kind, trained, config, probing.data)
    done = _written(path, request | {"untrained": _UNTRAINED.value})
    if done is not None:
        print(done)
        return
    study = Study(config, probing.data, _progress())
    renamed = names_difference(trained.class_names, study.source.class_names) if config_values is None else None
    if renamed is not None and distributed.is_primary():
        print(f"warning: {renamed}: these are not the data that the run was trained on", file=sys.stderr)
    # The result alone is on stdout.
    of = {"trained": lambda: trained.announced_params(sys.stderr)}
    of |= {"untrained": study.untrained} if _UNTRAINED.value else {}
    if kind == "map":
        found = _maps(study, of)
    elif kind == "finetune":
        found = _finetuned(study, of, path.with_suffix(""), request)
    else:
        classified = {name: study.classify(kind, params(), name) for name, params in of.items()}
        found = _beside(classified, study.described | {"layer": study.layer})
    line = {"probe": kind, **found}
    if distributed.is_primary():
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "map":
            _draw(path.with_suffix(".png"), study, found)
        files.write_json(path, line | {"request": request | {"untrained": _UNTRAINED.value}})
        if sys.stderr.isatty():
            print(file=sys.stderr)
        print(json.dumps(line))


def _beside(found: dict[str, dict[str, Any]], described: dict[str, Any]) -> dict[str, Any]:
    """The trained network's result, how it was read, and the untrained one's result, if there is one."""
    return {**found["trained"], **described, **{name: found[name] for name in found if name != "trained"}}


def _maps(study, of) -> dict[str, Any]:
    """Tables of `top1`, and the best place of the first."""
    maps = {name: study.map(params(), name) for name, params in of.items()}
    best, ways = maps["trained"], list(study.ways())
    layer, way = divmod(int(best.argmax()), best.shape[1])
    return {
        "layers": list(range(1, len(best) + 1)), "tokens": ways,
        "best": {"top1": float(best.max()), "layer": layer + 1, "tokens": ways[way]},
        **{name: values.tolist() for name, values in maps.items()},
    }


def _finetuned(study, of, folder: pathlib.Path, request: dict[str, Any]) -> dict[str, Any]:
    """Accuracies after fine-tuning; ends the process where it diverges (status 1) or is stopped (INTERRUPTED)."""
    from causalfusion_jax import distributed

    tunings = {name: study.finetuning(name, folder / name) for name in of}
    for tuning in tunings.values():
        distributed.on_primary(lambda tuning=tuning: _claim(tuning.folder, request), None)
    with cli.exit_status_of_training():
        found = {name: study.finetune(tunings[name], params) for name, params in of.items()}
        return _beside(found, study.described)


def _draw(path: pathlib.Path, study, found: dict[str, Any]) -> None:
    """The map as a picture."""
    import numpy as np

    from causalfusion_jax.evaluation.heat_map import Panel, heat_map
    from causalfusion_jax.sampling.images import save_png

    panels = [
        Panel(f"linear probe, {name}", np.array(found[name])) for name in ("trained", "untrained") if name in found
    ]
    rows = [str(layer) for layer in found["layers"]]
    save_png(path, heat_map(panels, rows, found["tokens"], "layer", "noise level t / T"))
