"""A probe from its request to its result: which network, how it is probed, and where the result goes."""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np

from causalfusion_jax.common import distributed, files
from causalfusion_jax.common.errors import require, require_one_of
from causalfusion_jax.common.heat_map import Panel, heat_map
from causalfusion_jax.common.pictures import save_png
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.config.probe import PROBES
from causalfusion_jax.data.class_names import names_difference
from causalfusion_jax.evaluation.understanding import Study, combined
from causalfusion_jax.sampling.trained import Trained, from_converted, from_run


@dataclasses.dataclass(frozen=True)
class Probe:
    """A probe of a network.

    Attributes:
      kind: one of `config.probe.PROBES`.
      workdir: the run whose network is probed; or None.
      checkpoint: the converted checkpoint that is probed instead; or None.
      weights, step: of a run, as of `trained.from_run`; None: the averaged weights of the newest intact step.
      untrained: also probe the same network with fresh weights.
      config: says on which data and how; None: the run's own settings.
      out: the .json file of the result; None: probe_KIND.json in the run. Fine-tuning keeps its
        checkpoints in the folder of that name without .json.

    Raises:
      InputError: settings that do not go together.
    """

    kind: str
    workdir: str | None = None
    checkpoint: str | None = None
    weights: str | None = None
    step: int | str | None = None
    untrained: bool = False
    config: ExperimentConfig | None = None
    out: str | None = None

    def __post_init__(self):
        require_one_of("kind", self.kind, PROBES)
        given = (self.workdir is None) + (self.checkpoint is None)
        require(given == 1, "workdir", self.workdir, "give --workdir, or --checkpoint, and not both")
        allowed = "is needed with --checkpoint: it says on which images, and how"
        require(self.config is not None or self.checkpoint is None, "config", None, allowed)
        allowed = "is needed with --checkpoint: a .json file"
        require(self.out is not None or self.workdir is not None, "out", None, allowed)
        require(self.path.suffix == ".json", "out", str(self.path), "must be a .json file")
        for name in ("weights", "step"):
            value = getattr(self, name)
            allowed = "a converted checkpoint has one; leave it out"
            require(value is None or self.workdir is not None, name, value, allowed)

    @property
    def path(self) -> pathlib.Path:
        """The file of the result."""
        return (
            pathlib.Path(self.workdir or "") / f"probe_{self.kind}.json" if self.out is None else pathlib.Path(self.out)
        )

    def open(self) -> Trained:
        """The network. Raises InputError where there is none."""
        if self.workdir is None:
            return from_converted(self.checkpoint)
        return from_run(self.workdir, self.weights or "ema", self.step)


def run_probe(probe: Probe) -> None:
    """Probes a network, prints one JSON line, and writes it. A result that is already there is printed again.

    Raises:
      InputError: the probe does not fit the network or the data, or its file holds another result.
      Stopped, TrainingDiverged: as fine-tuning does.
    """
    trained = probe.open()
    config = combined(trained.config, probe.config or trained.config)
    data = (probe.config or trained.config).data
    request = _request(probe.kind, trained, config, data)
    done = _written(probe.path, request | {"untrained": probe.untrained})
    if done is not None:
        print(done)
        return
    study = Study(config, data, _progress())
    renamed = names_difference(trained.class_names, study.source.class_names) if probe.config is None else None
    if renamed is not None and distributed.is_primary():
        print(f"warning: {renamed}: these are not the data that the run was trained on", file=sys.stderr)
    # The result alone is on stdout.
    networks = {"trained": lambda: trained.announced_params(sys.stderr)}
    networks |= {"untrained": study.untrained} if probe.untrained else {}
    if probe.kind == "map":
        result = _maps(study, networks)
    elif probe.kind == "finetune":
        result = _finetuned(study, networks, probe.path.with_suffix(""), request)
    else:
        classified = {name: study.classify(probe.kind, params(), name) for name, params in networks.items()}
        result = _beside(classified, study.described | {"layer": study.layer})
    line = {"probe": probe.kind, **result}
    if distributed.is_primary():
        probe.path.parent.mkdir(parents=True, exist_ok=True)
        if probe.kind == "map":
            _draw(probe.path.with_suffix(".png"), result)
        files.write_json(probe.path, line | {"request": request | {"untrained": probe.untrained}})
        if sys.stderr.isatty():
            print(file=sys.stderr)
        print(json.dumps(line))


def _request(kind: str, trained, config, data) -> dict[str, Any]:
    """What decides the result, as plain values."""
    learned = {"probe": dataclasses.asdict(config.probe)}
    if kind == "finetune":
        learned["finetune"] = dataclasses.asdict(config.finetune)
    of_data = {
        name: value
        for name, value in dataclasses.asdict(data).items()
        if name not in ("workers", "verify", "max_corrupt")
    }
    request = {"kind": kind, "of": trained.origin, "data": of_data, **learned, "dtype": config.model.dtype}
    return json.loads(json.dumps(request))


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


def _beside(found: dict[str, dict[str, Any]], described: dict[str, Any]) -> dict[str, Any]:
    """The trained network's result, how it was read, and the untrained one's result, if there is one."""
    return {**found["trained"], **described, **{name: found[name] for name in found if name != "trained"}}


def _maps(study, of) -> dict[str, Any]:
    """Tables of `top1`, and the best place of the first."""
    maps = {name: study.map(params(), name) for name, params in of.items()}
    best, columns = maps["trained"], list(study.columns())
    layer, column = divmod(int(best.argmax()), best.shape[1])
    return {
        "layers": list(range(1, len(best) + 1)),
        "tokens": columns,
        "best": {"top1": float(best.max()), "layer": layer + 1, "tokens": columns[column]},
        **{name: values.tolist() for name, values in maps.items()},
    }


def _finetuned(study, of, folder: pathlib.Path, request: dict[str, Any]) -> dict[str, Any]:
    """Accuracies after fine-tuning. Raises Stopped or TrainingDiverged."""
    tunings = {name: study.finetuning(name, folder / name) for name in of}
    for tuning in tunings.values():
        distributed.on_primary(lambda tuning=tuning: _claim(tuning.folder, request), None)
    results = {name: study.finetune(tunings[name], params) for name, params in of.items()}
    return _beside(results, study.described)


def _draw(path: pathlib.Path, found: dict[str, Any]) -> None:
    """The map as a picture."""
    panels = [
        Panel(f"linear probe, {name}", np.array(found[name])) for name in ("trained", "untrained") if name in found
    ]
    rows = [str(layer) for layer in found["layers"]]
    save_png(path, heat_map(panels, rows, found["tokens"], "layer", "noise level t / T"))
