"""Checkpoints: Orbax writes the arrays, manifests verify their integrity.

`checkpoints/STEP` holds `state` and `data`. A save has these stages. After a kill in any of them, the
next run continues from the newest complete step (see `manifests`):

1. Orbax copies the arrays to the host, and writes them in the background to a temporary folder.
2. Process 0 commits: it renames that folder (`STEP.orbax-checkpoint-tmp` to `STEP`).
3. Every process hashes the files that it wrote, and writes its part of the manifest
   (`write_manifest`). The step is complete when the last part is written.
4. Process 0 deletes the steps that are no longer kept (`_delete`): first the manifest, then the files.

For hashing each host reads once what it wrote, eight files at a time: the size of the checkpoint
divided by the number of hosts.
"""

import json
import os
import pathlib
import shutil
import sys
import threading
import time
from typing import Any

import jax
import orbax.checkpoint as ocp

from causalfusion_jax.checkpoints import evaluations
from causalfusion_jax.checkpoints.manifests import Manifests, writer
from causalfusion_jax.common import distributed, files
from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.common.lock import FolderLock
from causalfusion_jax.models.params import Params
from causalfusion_jax.models.store import read_params

PARTS_TIMEOUT = 60.0
"""Seconds that process 0 waits for the manifest parts of other hosts; after that the next save deletes old steps."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: the folder of the run.
      keep: number of newest checkpoints that are kept.
      keep_every: checkpoints at multiples of this step are kept too; 0: none.
      read_only: never change anything on disk (for sampling and evaluation).
      lock: the lock of process 0 on the folder of the run; a save fails if another process has taken it over.

    Raises:
      InputError: there are checkpoints, but the folder of their manifests is missing.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        keep: int = 3,
        keep_every: int = 0,
        read_only: bool = False,
        lock: FolderLock | None = None,
    ):
        self._root, self._read_only = pathlib.Path(workdir).absolute(), read_only
        self._keep, self._keep_every = keep, keep_every
        self._steps_dir = self._root / "checkpoints"
        self._manifests = Manifests(self._root)
        self._lock = lock
        self._finishing: threading.Thread | None = None
        self._error: Exception | None = None
        self._saved: int | None = None
        allowed = "its manifests/ is missing, so no checkpoint can be verified; it belongs beside checkpoints/"
        require(self._manifests.folder.is_dir() or not self.steps(), "workdir", str(self._root), allowed)
        self._checkpointer = None
        if not read_only:
            self._steps_dir.mkdir(parents=True, exist_ok=True)
            self._manifests.folder.mkdir(exist_ok=True)
            if distributed.is_primary():
                for unfinished in self._steps_dir.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(unfinished)
            self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    def _folder(self, step: int) -> pathlib.Path:
        return self._steps_dir / str(step)

    # --- Saving -------------------------------------------------------------------

    def save(self, step: int, state: Any, position: int, partial: dict[str, Any] | None = None) -> None:
        """Saves in the background; collective. Raises the error of the previous save, if it failed.

        Args:
          step: the training step.
          state: all arrays.
          position: the position in the data.
          partial: metrics that are not logged yet, as plain values; `partial(step)` returns them.
        """
        self.wait()
        if self._lock is not None:
            self._lock.require_held()
        if distributed.is_primary():
            # An interrupted save of this step may have left files.
            self._delete(step)
        data = {"position": position} | ({} if partial is None else {"partial": partial})
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        # This transfer to the host is intentional; training disallows implicit transfers.
        with jax.transfer_guard("allow"), files.writing(self._folder(step)):
            self._checkpointer.save(self._folder(step), args=args, force=True)
        self._finishing = threading.Thread(target=self.finish, args=(step,), name=f"checkpoint-{step}")
        self._saved = step
        self._finishing.start()

    def finish(self, step: int) -> None:
        """Manifest and deletions after the commit, in the background; `wait` raises their errors."""
        try:
            self._checkpointer.wait_until_finished()
            self.write_manifest(step)
            if distributed.is_primary() and self.await_parts(step):
                self.delete_outdated()
        except Exception as error:
            self._error = error

    def write_manifest(self, step: int) -> None:
        """Writes the part of the manifest that lists what this process wrote."""
        folder, process = self._folder(step), jax.process_index()
        deadline = time.monotonic() + PARTS_TIMEOUT
        while not folder.is_dir() and time.monotonic() < deadline:
            # Another host renames it, and a mounted file system may show it late.
            time.sleep(0.2)
        if not folder.is_dir():
            raise OSError(f"{folder} does not exist after it was written")
        written = [name for name in files.names(folder) if writer(name) == process]
        self._manifests.write_part(step, process, jax.process_count(), files.describe(folder, written))

    def await_parts(self, step: int) -> bool:
        """Whether all processes wrote their parts in time. Raises OSError if the parts do not list all files."""
        deadline = time.monotonic() + PARTS_TIMEOUT
        while not self._manifests.is_complete(step):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        unlisted = set(files.names(self._folder(step))) - set(self._manifests.expected(step))
        # Hidden files are those of a mounted file system.
        unlisted = {name for name in unlisted if not pathlib.PurePath(name).name.startswith(".")}
        if unlisted:
            raise OSError(f"the manifest of checkpoint {step} does not list {min(unlisted)}")
        return True

    def delete_outdated(self) -> None:
        """Deletes the steps that are older than the newest complete one and are not kept."""
        complete = self.complete_steps()
        every = self._keep_every
        kept = set(complete[: self._keep]) | {step for step in complete if every and step % every == 0}
        # For each kept step the best step up to it, so that a run can go back to any kept step.
        records = evaluations.read(self._root)
        bests = [evaluations.best(records, {s for s in complete if s <= step}) for step in kept]
        kept |= {best["step"] for best in bests if best is not None}
        for step in self.steps():
            if complete and step < complete[0] and step not in kept:
                self._delete(step)

    def _delete(self, step: int) -> None:
        """Deletes a step. After a kill during the deletion the step counts as interrupted, not as damaged."""
        self._manifests.remove(step)
        self.delete_files(step)

    def delete_files(self, step: int) -> None:
        if self._folder(step).is_dir():
            shutil.rmtree(self._folder(step))

    def wait(self) -> None:
        """Waits until the save is on disk with its manifest. Raises OSError if it failed."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        error, self._error = self._error, None
        if error is not None:
            reason = f"checkpoint {self._saved} was not saved to {self._steps_dir}: {error}"
            number = files.disk_error(error)
            raise (OSError(reason) if number is None else OSError(number, reason)) from error

    def close(self) -> None:
        """Waits for the save, then closes Orbax."""
        self.wait()
        if self._saved is not None and distributed.is_primary():
            # The last evaluation may have changed the best step.
            self.delete_outdated()
        if self._checkpointer is not None:
            self._checkpointer.close()

    # --- Restoring ----------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps on disk, newest first, complete or not."""
        if not self._steps_dir.is_dir():
            return []
        return sorted((int(path.name) for path in self._steps_dir.iterdir() if path.name.isdecimal()), reverse=True)

    def complete_steps(self) -> list[int]:
        """Complete steps on disk, newest first."""
        return [step for step in self.steps() if self._manifests.is_complete(step)]

    def good_step(self, wanted: int | None = None) -> int | None:
        """The newest complete step whose files match its manifest; None if there is no complete step.

        Newer steps that are interrupted or damaged are reported. Unless `read_only`, this is
        collective: the processes share the verification, and damaged steps are moved to
        `damaged_checkpoints/`.

        Args:
          wanted: the only step to consider.

        Raises:
          InputError: `wanted` does not exist, was interrupted or is damaged; or there are complete
            steps and all of them are damaged.
        """
        if wanted is not None:
            self._require_complete(wanted)
        damaged, step = {}, wanted if wanted is not None else self._newest_complete(sys.maxsize)
        while step is not None:
            problem = self._problem(step)
            if problem is None:
                self._report(step, damaged)
                self._set_aside(damaged)
                return step
            damaged[step] = problem
            step = None if wanted is not None else self._newest_complete(step)
        if damaged:
            reasons = "; ".join(f"step {step}: {problem}" for step, problem in damaged.items())
            raise InputError("workdir", str(self._root), f"no intact checkpoint: {reasons}")
        self._report(None, {})
        return None

    def _newest_complete(self, below: int) -> int | None:
        """The newest complete step below a step; the same on all processes that share the verification."""

        def find() -> int | None:
            return next((step for step in self.complete_steps() if step < below), None)

        return find() if self._read_only else distributed.on_primary(find, None)

    def _require_complete(self, step: int) -> None:
        complete = self.complete_steps()
        interrupted = ", was interrupted before it was saved whole" if step in self.steps() else ""
        known = ", ".join(map(str, complete)) or "none saved yet"
        require(step in complete, "step", step, f"must be one of {known}{interrupted}")

    def _problem(self, step: int) -> str | None:
        """The damage of a complete step, or None; None on all processes or on none."""
        try:
            expected = self._manifests.expected(step)
            problem = files.difference(self._folder(step), self.files_to_verify(expected))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"its manifest cannot be read: {error}"
        if not self._read_only and distributed.total(int(problem is not None)):
            return problem or "another process reports it"
        return problem

    def files_to_verify(self, expected: files.Description) -> files.Description:
        """The files that this process verifies, of about the same total size on all processes that share the work."""
        if self._read_only:
            return expected
        by_size = sorted(expected, key=lambda name: (expected[name]["bytes"], name))
        return {name: expected[name] for name in by_size[jax.process_index() :: jax.process_count()]}

    def _report(self, good: int | None, damaged: dict[int, str]) -> None:
        """Prints which newer steps are not used, and why."""
        continuation = "starting from the beginning" if good is None else f"using checkpoint {good}"
        newer = [step for step in self.steps() if good is None or step > good] if distributed.is_primary() else []
        for step in newer:
            reason = f"is damaged ({damaged[step]})" if step in damaged else "was interrupted before it was saved whole"
            print(f"warning: checkpoint {step} {reason}; {continuation}", file=sys.stderr, flush=True)

    def _set_aside(self, damaged: dict[int, str]) -> None:
        """Moves damaged steps to `damaged_checkpoints/`; deletes nothing."""
        if self._read_only or not distributed.is_primary():
            return
        for step in damaged:
            target, n = self._root / "damaged_checkpoints" / str(step), 1
            while target.exists():
                target, n = target.with_name(f"{step}.{n}"), n + 1
            target.parent.mkdir(exist_ok=True)
            self._folder(step).rename(target)
            self._manifests.remove(step)
            print(f"moved damaged checkpoint {step} to {target}", file=sys.stderr, flush=True)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, int]:
        """The state and the position in the data of a step; collective.

        Args:
          step: from `good_step`.
          abstract_state: jax.ShapeDtypeStruct with sharding for each array to restore.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
        # Orbax synchronizes several processes by arrays that it reads implicitly.
        with jax.transfer_guard("allow"):
            restored = self._checkpointer.restore(self._folder(step), args=args)
        return restored["state"], restored["data"]["position"]

    def partial(self, step: int) -> dict[str, Any] | None:
        """The metrics that were saved with a step before they were logged; None if there are none."""
        return self._data(step).get("partial")

    def _data(self, step: int) -> dict[str, Any]:
        """The plain values that were saved with a step."""
        return json.loads((self._folder(step) / "data" / "metadata").read_text())

    def restore_params(self, step: int, shapes: Params, weights: str) -> Params:
        """`ema` or `params` of a step as host arrays; not collective."""
        return read_params(self._folder(step) / "state", {weights: shapes})[weights]

    def fingerprint(self, step: int) -> str:
        """One checksum of all files of a step."""
        return self._manifests.fingerprint(step)

    # --- Evaluations --------------------------------------------------------------

    def go_back(self, step: int) -> None:
        """Removes the evaluations after the step from which training continues; on process 0 only."""
        known = self._evaluations(step)
        if known != evaluations.read(self._root):
            evaluations.write(self._root, known)

    def _evaluations(self, step: int) -> list[evaluations.Record]:
        """The evaluations up to a step."""
        known = {record["step"]: record for record in evaluations.read(self._root) if record["step"] <= step}
        # Older versions saved the best evaluation in the checkpoint.
        best = self._data(step).get("best") if step in self.complete_steps() else None
        if best is not None:
            known.setdefault(best["step"], best)
        return sorted(known.values(), key=lambda record: record["step"])

    def is_evaluated(self, step: int, settings: dict[str, Any]) -> bool:
        """Whether a step was evaluated with these settings."""
        records = evaluations.read(self._root)
        return any(record["step"] == step and record["of"] == settings for record in records)

    def is_best(self, step: int, value: float, settings: dict[str, Any]) -> bool:
        """Whether `value` is the best evaluation up to a step."""
        records = self._with_record(step, value, settings)
        best = evaluations.best(records, {*self.complete_steps(), step})
        return best is not None and best["step"] == step

    def record_evaluation(self, step: int, value: float, settings: dict[str, Any]) -> None:
        """Records an evaluation of the newest saved step; on process 0 only.

        Args:
          step: the training step.
          value: value of the metric.
          settings: settings under which values can be compared, as plain values.
        """
        evaluations.write(self._root, self._with_record(step, value, settings))

    def _with_record(self, step: int, value: float, settings: dict[str, Any]) -> list[evaluations.Record]:
        earlier = [record for record in evaluations.read(self._root) if record["step"] < step]
        return [*earlier, evaluations.record(step, value, settings)]

    def best(self, step: int | None = None) -> evaluations.Record | None:
        """The best evaluation up to a step (default: the newest intact one) whose checkpoint still exists."""
        step = self.good_step() if step is None else step
        if step is None:
            return None
        return evaluations.best(self._evaluations(step), {s for s in self.complete_steps() if s <= step})
