"""Checkpoints: Orbax for the arrays, a checksum manifest of our own for their truth.

A step's folder holds `state` and `data`. Orbax restores a flipped bit silently, so once a
step is committed, the size and SHA-256 of its every file are written to `manifests/STEP.json`
beside it. A step without a manifest, or with a file that differs from it, is not restored.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import threading
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from causalfusion_jax import files
from causalfusion_jax.errors import InputError, require_number
from causalfusion_jax.models.store import read_params
from causalfusion_jax.models.transformer import Params, abstract_model
from causalfusion_jax.training.state import StepConfig


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
      every: steps between checkpoints; the last step is always saved.
      keep: newest checkpoints kept.
      keep_every: also keep every checkpoint at a multiple of this step; 0 is none.
    """

    every: int = 1000
    keep: int = 3
    keep_every: int = 0

    def __post_init__(self):
        require_number("every", self.every, 1)
        require_number("keep", self.keep, 1)
        require_number("keep_every", self.keep_every, 0)


Best = dict[str, Any]
"""The best evaluation of a run: `step`, `value`, and `of`, the settings that values are compared under."""


@dataclasses.dataclass
class _WithTheirBest(preservation_policy.PreservationPolicy):
    """What `kept` preserves, and the best checkpoint of each: going back to one loses nothing.

    Attributes:
      kept: the policy.
      best_of: step to the step of the best checkpoint when it was saved.
    """

    kept: preservation_policy.PreservationPolicy
    best_of: dict[int, int]

    def should_preserve(self, checkpoints, *, context):
        kept = self.kept.should_preserve(checkpoints, context=context)
        best = {self.best_of.get(info.step) for info, keep in zip(checkpoints, kept, strict=True) if keep}
        return [keep or info.step in best for info, keep in zip(checkpoints, kept, strict=True)]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: the run's folder.
      config: what to keep.
      read_only: never change anything on disk (for sampling and evaluation).
    """

    def __init__(self, workdir: str | os.PathLike, config: CheckpointConfig, read_only: bool = False):
        self._root = pathlib.Path(workdir).absolute()
        self._steps_dir = self._root / "checkpoints"
        self._manifests_dir = self._root / "manifests"
        self._damaged_dir = self._root / "damaged_checkpoints"
        self._read_only = read_only
        self._pending: tuple[int, threading.Thread] | None = None
        if not read_only:
            self._manifests_dir.mkdir(parents=True, exist_ok=True)
        self._best_of: dict[int, int] = {}
        self._manager = self._open(config)
        self._config = config
        if not read_only:
            for step in self.steps():
                with contextlib.suppress(Exception):
                    # A damaged one is told from a good one elsewhere.
                    self._note_best(step, self._saved_with(step))

    def _open(self, config: CheckpointConfig) -> ocp.CheckpointManager:
        policies = [preservation_policy.LatestN(config.keep)]
        if config.keep_every:
            policies.append(preservation_policy.EveryNSteps(config.keep_every))
        verbosity = logging.get_verbosity()
        if self._read_only:
            # Orbax warns that read-only is read-only.
            logging.set_verbosity(logging.ERROR)
        try:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_WithTheirBest(
                    preservation_policy.AnyPreservationPolicy(policies), self._best_of
                ),
                cleanup_tmp_directories=not self._read_only,
                create=not self._read_only,
                read_only=self._read_only,
                enable_async_checkpointing=not self._read_only,
            )
            return ocp.CheckpointManager(self._steps_dir, options=options)
        finally:
            logging.set_verbosity(verbosity)

    # --- Saving -------------------------------------------------------------------

    def save(self, step: int, state: Any, position: int, best: Best | None = None) -> None:
        """Saves in the background. Raises what the previous save failed with, if it did.

        Args:
          step: of training.
          state: all arrays.
          position: of the data.
          best: the best evaluation up to this step, whose checkpoint is kept.
        """
        self.wait()
        saved_with = {"position": position, "best": best}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(saved_with))
        self._note_best(step, saved_with)
        self._manager.save(step, args=args, force=True)
        thread = threading.Thread(target=self._finish, args=(step,), name=f"manifest-{step}")
        self._pending = (step, thread)
        thread.start()

    def _finish(self, step: int) -> None:
        """Waits for the commit, then writes the step's manifest."""
        # A failed save surfaces in wait(), on the caller's thread.
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        folder = self._steps_dir / str(step)
        if jax.process_index() == 0 and folder.is_dir():
            files.write_json(self._manifests_dir / f"{step}.json", files.describe(folder))
            kept = {str(kept) for kept in self._manager.all_steps()} | {str(step)}
            for manifest in self._manifests_dir.glob("*.json"):
                if manifest.stem not in kept:
                    manifest.unlink()

    def wait(self) -> None:
        """Until everything saved is on disk with its manifest. Raises what a save failed with."""
        if self._pending is not None:
            step, thread = self._pending
            thread.join()
            self._pending = None
            self._manager.check_for_errors()
            if not (self._steps_dir / str(step)).is_dir():
                raise OSError(f"checkpoint {step} was not written to {self._steps_dir}")

    def close(self) -> None:
        """Waits, then lets go."""
        self.wait()
        self._manager.close()

    def reload(self) -> None:
        """Looks at the disk again: another process may have moved a step away."""
        self._manager.reload()

    # --- Restoring ----------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps on disk, newest first, good or not."""
        return sorted(self._manager.all_steps(), reverse=True)

    def good_step(self, wanted: int | None = None) -> int | None:
        """The newest step whose files are what was written; None where nothing was saved.

        Damaged steps are reported and passed over; unless read-only, they are moved to
        `damaged_checkpoints/`, out of the way of the steps to come.

        Args:
          wanted: consider this step alone.

        Raises:
          InputError: `wanted` does not exist or is damaged, or all steps are.
        """
        steps = self.steps()
        if wanted is not None:
            if wanted not in steps:
                raise InputError("step", wanted, f"must be one of {', '.join(map(str, steps)) or 'none saved yet'}")
            steps = [wanted]
        damaged = []
        for step in steps:
            problem = self._problem(step)
            if problem is None:
                self._set_aside(damaged)
                return step
            logging.warning("checkpoint %d is damaged (%s); trying the one before it", step, problem)
            damaged.append(step)
        if damaged:
            raise InputError("workdir", str(self._root), f"no intact checkpoint: steps {damaged} are damaged")
        return None

    def _problem(self, step: int) -> str | None:
        """What is wrong with a step's files, or None."""
        manifest = self._manifests_dir / f"{step}.json"
        try:
            expected = json.loads(manifest.read_text())
        except FileNotFoundError:
            return "its manifest is missing: the save was cut short"
        except (OSError, ValueError) as error:
            return f"its manifest cannot be read: {error}"
        return files.difference(self._steps_dir / str(step), expected)

    def _set_aside(self, steps: list[int]) -> None:
        """Moves damaged steps away; nothing is deleted."""
        if self._read_only or not steps or jax.process_index() != 0:
            return
        self._damaged_dir.mkdir(exist_ok=True)
        for step in steps:
            target, n = self._damaged_dir / str(step), 1
            while target.exists():
                target, n = self._damaged_dir / f"{step}.{n}", n + 1
            (self._steps_dir / str(step)).rename(target)
            logging.warning("moved damaged checkpoint %d to %s", step, target)
        self._manager.reload()

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, int]:
        """The state and the data position of a step.

        Args:
          step: from `good_step`.
          abstract_state: jax.ShapeDtypeStruct with sharding for each array wanted.
        """
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
            ),
        )
        return restored["state"], restored["data"]["position"]

    def _saved_with(self, step: int) -> dict[str, Any]:
        """What was saved beside the state of a step."""
        return self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]

    def _note_best(self, step: int, saved_with: dict[str, Any]) -> None:
        if saved_with.get("best") is not None:
            self._best_of[step] = saved_with["best"]["step"]

    def best(self, step: int | None = None) -> Best | None:
        """The best evaluation up to a step (default: the newest intact one); None where there was none.

        None too where its checkpoint is gone: what is best starts anew then.
        """
        step = self.good_step() if step is None else step
        best = None if step is None else self._saved_with(step).get("best")
        return best if best is not None and best["step"] in self.steps() else None

    def restore_params(self, step: int, config: StepConfig, weights: str) -> Params:
        """`ema` or `params` of a step as host arrays; no other process need take part."""
        shapes = abstract_model(config.objective.model)[1]
        return read_params(self._steps_dir / str(step) / "state", {weights: shapes})[weights]

    def fingerprint(self, step: int) -> str:
        """One checksum for all files of a step."""
        return hashlib.sha256((self._manifests_dir / f"{step}.json").read_bytes()).hexdigest()
