"""Runs a probe: opens the network, measures it and stores the result with its request."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from causalfusion_jax.common import distributed, files
from causalfusion_jax.common.charts import heat_map, save_chart
from causalfusion_jax.common.errors import require, require_one_of
from causalfusion_jax.common.requests import plain, require_same
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.config.probe import PROBES
from causalfusion_jax.config.workdir import EXECUTION
from causalfusion_jax.data.class_names import names_difference
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.evaluation.understanding import Study, combined
from causalfusion_jax.models.params import Params
from causalfusion_jax.sampling.trained import Trained, WeightsChoice

Networks = Mapping[str, Callable[[], Params]]
"""Reads the weights of each network, by name."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """A probe of a network.

    Attributes:
      kind: one of `config.probe.PROBES`.
      network: the weights that are probed.
      untrained: also probe the same network with fresh weights.
      config: data and settings of the probe; None: the run's own settings.
      out: the .json file of the result; None: probe_KIND.json in the run. Fine-tuning keeps its
        checkpoints in the folder of that name without .json.

    Raises:
      InputError: settings that do not fit together.
    """

    kind: str
    network: WeightsChoice
    untrained: bool = False
    config: ExperimentConfig | None = None
    out: str | None = None

    def __post_init__(self):
        require_one_of("kind", self.kind, PROBES)
        converted = self.network.workdir is None
        allowed = "is needed with --checkpoint: it says on which images, and how"
        require(self.config is not None or not converted, "config", None, allowed)
        require(self.out is not None or not converted, "out", None, "is needed with --checkpoint: a .json file")
        require(self.path.suffix == ".json", "out", str(self.path), "must be a .json file")

    @property
    def path(self) -> pathlib.Path:
        """The file of the result."""
        return pathlib.Path(self.out or f"{self.network.workdir}/probe_{self.kind}.json")


def run_probe(probe: Probe) -> None:
    """Probes a network, prints one JSON line and writes it to a file; a result that exists is only printed.

    Raises:
      InputError: the probe does not fit the network or the data, or its file holds another result.
      Stopped, TrainingDiverged: see fine-tuning.
    """
    trained = probe.network.open()
    config = combined(trained.config, probe.config or trained.config)
    data = (probe.config or trained.config).data
    request = _request(probe.kind, trained, config, data)
    result_line = _stored_result(probe.path, request | {"untrained": probe.untrained})
    if result_line is not None:
        print(result_line)
        return
    study = Study(config, data, _progress())
    renamed = names_difference(trained.class_names, study.source.class_names) if probe.config is None else None
    if renamed is not None and distributed.is_primary():
        print(f"warning: {renamed}: these are not the data that the run was trained on", file=sys.stderr)
    # stdout has the result alone.
    networks = {"trained": lambda: trained.announced_params(sys.stderr)}
    networks |= {"untrained": study.untrained} if probe.untrained else {}
    if probe.kind == "map":
        result = _maps(study, networks)
    elif probe.kind == "finetune":
        result = fine_tuned(study, networks, probe.path.with_suffix(""), request)
    else:
        classified = {name: study.classify(probe.kind, params(), name) for name, params in networks.items()}
        result = _with_untrained(classified, study.described | {"layer": study.layer})
    line = {"probe": probe.kind, **result}
    if distributed.is_primary():
        probe.path.parent.mkdir(parents=True, exist_ok=True)
        if probe.kind == "map":
            _draw(probe.path.with_suffix(".png"), result)
        files.write_json(probe.path, line | {"request": request | {"untrained": probe.untrained}})
        if sys.stderr.isatty():
            print(file=sys.stderr)
        print(json.dumps(line))


def _request(kind: str, trained: Trained, config: ExperimentConfig, data: DataConfig) -> dict[str, Any]:
    """The values that determine the result."""
    settings = {"probe": dataclasses.asdict(config.probe)}
    if kind == "finetune":
        settings["finetune"] = dataclasses.asdict(config.finetune)
    measured = {name: value for name, value in dataclasses.asdict(data).items() if f"data.{name}" not in EXECUTION}
    return plain({"kind": kind, "of": trained.origin, "data": measured, **settings, "dtype": config.model.dtype})


def _stored_result(path: pathlib.Path, request: dict[str, Any]) -> str | None:
    """The result line that is stored for this request, or None. Raises InputError for another request's result."""
    if not path.exists():
        return None
    stored = files.read_json(path)
    stored_request = stored.pop("request", None) if isinstance(stored, dict) else None
    require_same("--out", path, stored_request, request, "exists with another result", "give a new file, or remove it")
    return json.dumps(stored)


def _claim(folder: pathlib.Path, request: dict[str, Any]) -> None:
    """Stores the request in a new folder of a fine-tuning. Raises InputError for other content."""
    path = folder / "request.json"
    if path.is_file():
        problem, remedy = "holds fine-tuning by other settings", "give a new --out, or remove it"
        require_same("--out", folder, files.read_json(path), request, problem, remedy)
        return
    files.require_new("--out", folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, request)


def _progress() -> Callable[[str], None]:
    """Prints progress to stderr if it is a terminal; the result is on stdout."""

    def show(line: str) -> None:
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    return show if sys.stderr.isatty() else lambda line: None


def _with_untrained(results: dict[str, dict[str, Any]], described: dict[str, Any]) -> dict[str, Any]:
    """The trained network's result, how images were read, and the untrained network's result, if there is one."""
    others = {name: result for name, result in results.items() if name != "trained"}
    return {**results["trained"], **described, **others}


def _maps(study: Study, networks: Networks) -> dict[str, Any]:
    """Tables of `top1` by layer and tokens, and the maximum of the trained network's."""
    maps = {name: study.map(params(), name) for name, params in networks.items()}
    table, columns = maps["trained"], list(study.columns())
    layer, column = divmod(int(table.argmax()), table.shape[1])
    return {
        "layers": list(range(1, len(table) + 1)),
        "tokens": columns,
        "best": {"top1": float(table.max()), "layer": layer + 1, "tokens": columns[column]},
        **{name: values.tolist() for name, values in maps.items()},
    }


def fine_tuned(study: Study, networks: Networks, folder: pathlib.Path, request: dict[str, Any]) -> dict[str, Any]:
    """Accuracies after fine-tuning.

    Args:
      study: data and settings.
      networks: reads the initial weights, by name; each is fine-tuned in the folder of that name.
      folder: where checkpoints are kept, of this request only.
      request: the values that determine the result.

    Raises:
      InputError: the folder holds another fine-tuning.
      Stopped, TrainingDiverged: see `evaluation.finetune`.
    """
    tunings = {name: study.finetuning(name, folder / name) for name in networks}
    for tuning in tunings.values():
        distributed.on_primary(lambda tuning=tuning: _claim(tuning.folder, request), None)
    results = {name: study.finetune(tunings[name], params) for name, params in networks.items()}
    return _with_untrained(results, study.described)


def _draw(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Draws the maps."""
    panels = {f"linear probe, {name}": np.array(result[name]) for name in ("trained", "untrained") if name in result}
    rows = [str(layer) for layer in result["layers"]]
    save_chart(path, heat_map(panels, rows, result["tokens"], row_label="layer", column_label="noise level t / T"))
