"""Damages every file of the newest checkpoint, and its manifest, and lets training continue.

    python launch/drills/damage.py --out=drills/damage

Each damage is done to a copy of one stopped run. Training must detect and report it, resume from the
previous checkpoint and end as an uninterrupted run. The same command continues. Prints a table and
one JSON line; exit status 1 if damage was not detected, a restart was refused, more than
`checkpoint.every` steps were lost, or an end differs.
"""

import functools
import pathlib
import random
import shutil
import signal
import sys
from collections.abc import Callable
from typing import Any

import drill
import moments

STOPPED_AT = 5 * drill.EVERY
"""The step at which the run to be damaged was stopped; its previous checkpoint is `checkpoint.every` older."""

Damage = Callable[[pathlib.Path, pathlib.Path, pathlib.Path, random.Random], None]
"""Called with the file, the same file of the previous checkpoint (which may not exist), another file, and an RNG."""


def flip_bit(path: pathlib.Path, older: pathlib.Path, other: pathlib.Path, rng: random.Random) -> None:
    """Flips one random bit."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: pathlib.Path, older: pathlib.Path, other: pathlib.Path, rng: random.Random) -> None:
    """Cuts the file at a random byte."""
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def delete(path: pathlib.Path, older: pathlib.Path, other: pathlib.Path, rng: random.Random) -> None:
    """Deletes the file."""
    path.unlink()


def swap(path: pathlib.Path, older: pathlib.Path, other: pathlib.Path, rng: random.Random) -> None:
    """Exchanges the file with another one."""
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def make_stale(path: pathlib.Path, older: pathlib.Path, other: pathlib.Path, rng: random.Random) -> None:
    """Replaces the file by that of the previous checkpoint."""
    path.write_bytes(older.read_bytes())


DAMAGES: dict[str, Damage] = {
    "a flipped bit": flip_bit, "truncated": truncate, "deleted": delete, "swapped with another file": swap,
    "that of the step before": make_stale,
}  # fmt: skip


def files_of(workdir: pathlib.Path, step: int) -> list[pathlib.Path]:
    """Files of a checkpoint and its manifests, relative to the run's folder, sorted."""
    folders = workdir / "checkpoints" / str(step), workdir / "manifests" / str(step)
    return sorted(path.relative_to(workdir) for folder in folders for path in folder.rglob("*") if path.is_file())


def cases(workdir: pathlib.Path) -> list[tuple[str, pathlib.Path, pathlib.Path, pathlib.Path]]:
    """(damage, file, the same file of the previous checkpoint, another file) of a run, by paths below it.

    Only damages that change something: an empty file has no bit, and some files are the same in every step.
    """
    step, before = drill.steps_of(workdir)[:2]
    files = files_of(workdir, step)
    content = {path: (workdir / path).read_bytes() for path in files}
    damages = []
    for path in files:
        # checkpoints/STEP/..., or manifests/STEP/...
        older = pathlib.Path(path.parts[0], str(before), *path.parts[2:])
        other = next(other for other in reversed(files) if content[other] != content[path])
        is_stale = (workdir / older).is_file() and (workdir / older).read_bytes() != content[path]
        left_out = set() if content[path] else {"a flipped bit", "truncated"}
        left_out |= set() if is_stale else {"that of the step before"}
        damages += [(name, path, older, other) for name in DAMAGES if name not in left_out]
    return damages


def undetected_bits(workdir: pathlib.Path, step: int, count: int, rng: random.Random) -> list[str]:
    """Flips and restores `count` bits of each manifest of a step, one by one; returns those that were not detected."""
    missed = []
    for path in (path for path in files_of(workdir, step) if path.parts[0] == "manifests"):
        content = (workdir / path).read_bytes()
        for _ in range(count):
            byte, bit = rng.randrange(len(content)), rng.randrange(8)
            flipped = bytearray(content)
            flipped[byte] ^= 1 << bit
            (workdir / path).write_bytes(flipped)
            try:
                if drill.is_intact(workdir, step):
                    missed.append(f"{path}: bit {bit} of byte {byte}")
            except Exception as error:
                missed.append(f"{path}: bit {bit} of byte {byte}: {error!r}")
        (workdir / path).write_bytes(content)
    return missed


def damaged_run(workdir: pathlib.Path, step: int, expected: dict[str, Any]) -> dict[str, Any]:
    """Continues a damaged run; returns its record."""
    process = drill.train(workdir)
    process.wait()
    resumed = drill.started_at(process.output)
    outcome = {
        "detected": resumed != step and f"checkpoint {step} " in process.output,
        "survived": process.returncode == 0,
        "lost": None if resumed is None else step - resumed,
        "error": process.output[-2000:],
    }
    return outcome | drill.compared(expected, functools.partial(drill.read_end, workdir), outcome["survived"])


def rows_of(records: list[dict], flips: int, missed: list[str]) -> list[dict]:
    """The table: a row for each damage, of the files of a step and of its manifest."""
    rows = []
    for folder, kind in (("checkpoints", "a file of the step"), ("manifests", "its manifest")):
        for name in DAMAGES:
            group = [r for r in records if r["damage"] == name and r["file"].startswith(folder)]
            if group:
                row = {"damage": f"{kind}: {name}", "tried": len(group), "detected": sum(r["detected"] for r in group)}
                rows.append(row | drill.continued_columns(group) | drill.identical_column(group))
    return rows + [{"damage": "its manifest: bits, not restarted", "tried": flips, "detected": flips - len(missed)}]


def failures_of(records: list[dict]) -> list[str]:
    """A line for each damage that missed the goal."""
    failures = []
    for record in records:
        failure = drill.missed_goal(record)
        if record["survived"] and not record["detected"]:
            failure = "not detected"
        if failure:
            failures.append(f"{record['file']} {record['damage']}: {failure}")
    return failures


def main() -> int:
    """Runs the drill; the exit status."""
    args = drill.start(
        __doc__,
        seed=dict(type=int, default=0),
        files=dict(type=int, default=0, help="number of files to damage, drawn at random; 0 is all"),
        manifest_bits=dict(type=int, default=200, help="bits of the manifest that are flipped"),
    )
    out = args.out
    expected, _ = drill.reference(out)
    stopped = out / "stopped"
    if not stopped.is_dir() or STOPPED_AT not in drill.steps_of(stopped):
        drill.remove(stopped)
        stop = moments.at(moments.METRICS, STOPPED_AT, functools.partial(moments.kill, signal.SIGTERM))
        drill.train(stopped, fault=stop).wait()
    todo = cases(stopped)
    if args.files:
        todo = random.Random(args.seed).sample(todo, args.files)
    done = drill.Records(out / "damage.jsonl")
    for name, path, older, other in todo:
        if any((r["damage"], r["file"]) == (name, str(path)) for r in done.records):
            continue
        workdir = out / "damaged"
        drill.remove(workdir)
        shutil.copytree(stopped, workdir)
        rng = random.Random(f"{args.seed} {name} {path}")
        DAMAGES[name](workdir / path, workdir / older, workdir / other, rng)
        outcome = damaged_run(workdir, STOPPED_AT, expected)
        done.add([{"damage": name, "file": str(path)} | outcome])
        detected = "detected" if outcome["detected"] else "NOT DETECTED"
        print(f"{path} {name}: {detected}, {outcome['lost']} steps lost", flush=True)
    missed = drill.value_of(lambda: undetected_bits(stopped, STOPPED_AT, args.manifest_bits, random.Random(args.seed)))
    failures = failures_of(done.records) + [f"not detected: {bit}" for bit in missed]
    return drill.report("damage", rows_of(done.records, args.manifest_bits, missed), failures, seed=args.seed)


if __name__ == "__main__":
    sys.exit(main())
