"""Has the disk fail while training, sampling and encoding write to it, and lets them continue.

    python launch/drills/disk.py --out=drills/disk

Each command writes to a small file system (a tmpfs, which root may mount; or the folder
--small_disk, which should be one) that becomes full at a named moment, or under a limit on file
size, beyond which each write fails. It must end with one line that names the file and the reason,
and continue to the same bytes once there is space. The same command continues. Prints a table and
one JSON line; exit status 1 if any of this does not hold.
"""

import contextlib
import errno
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import drill
import moments
from moments import Moment

DISK_BYTES = 64 * 2**20


class Case(NamedTuple):
    """A command of `COMMANDS`, and when the disk fails.

    Attributes:
      command: its name.
      writing: what it is writing then.
      moment: the moment at which the disk fails.
      count: the number of times that the moment comes until then.
    """

    command: str
    writing: str
    moment: Moment
    count: int = 1


CASES = (
    Case("train", "config.json", moments.CONFIG), Case("train", "arrays of the first checkpoint", moments.ARRAYS),
    Case("train", "arrays of a later checkpoint", moments.ARRAYS, 3),
    Case("train", "the commit of a checkpoint", moments.COMMIT, 3), Case("train", "a manifest", moments.MANIFEST, 3),
    Case("train", "metrics", moments.METRICS, 6), Case("train", "an evaluation", moments.EVALUATION),
    Case("train", "a grid", moments.GRID_FILE),
    Case("sample", "the request", Moment("open", r"/parts/\.?request\.json\S*")),
    Case("sample", "a part", Moment("open", r"/parts/\.?\d+\.\S+"), 2),
    Case("sample", "samples.npz", Moment("open", r"/\.?samples\.npz\S*")),
    Case("sample", "grid.png", Moment("open", r"/\.?grid\.png\S*")),
    Case("encode", "the request", Moment("open", r"/progress/\.?request\.json\S*")),
    Case("encode", "a shard", Moment("call", "causalfusion_jax.data.latents:pack"), 350),
    Case("encode", "a shard's statistics", Moment("open", r"/progress/\.?\d+\.json\S*"), 2),
    Case("encode", "the manifest", Moment("open", r"/\.?manifest\.json\S*")),
)  # fmt: skip

ERRORS = {"no space left": errno.ENOSPC, "file too large": errno.EFBIG}


def command(name: str, out: pathlib.Path, folder: pathlib.Path) -> tuple[str, ...]:
    """A command, as what follows `python -m`, that writes to `folder`."""
    if name == "train":
        return ("causalfusion_jax.train", *drill.TINY, f"--workdir={folder}")
    if name == "sample":
        return (
            "causalfusion_jax.sample",
            f"--workdir={out / 'reference'}",
            f"--out={folder}",
            "--num=20",
            "--batch_size=8",
            "--ar_steps=2",
            "--solver_steps=3",
        )
    return (
        "causalfusion_jax.encode",
        f"--config={drill.ROOT / 'configs' / 'digits.py'}",
        f"--vae={out / 'vae'}",
        f"--out={folder}",
        "--records_per_shard=300",
    )


def end_of(name: str, folder: pathlib.Path) -> dict[str, Any]:
    """The end of a command, the same whether it was interrupted or not."""
    return drill.read_end(folder) if name == "train" else drill.digests(folder)


def write_vae(folder: pathlib.Path) -> None:
    """A tiny random autoencoder of grey images, as `convert` writes them; 8x8x1 to 4x4x4."""
    import dataclasses

    import jax

    from causalfusion_jax.models.autoencoder import AutoencoderConfig, init_autoencoder
    from causalfusion_jax.models.store import write_converted

    config = AutoencoderConfig(
        channels=8,
        channel_multipliers=(1, 1),
        latent_channels=4,
        scaling_factor=0.5,
        residual_blocks=1,
        norm_groups=4,
        mid_attention=False,
        image_channels=1,
    )
    params = jax.device_get(init_autoencoder(config, jax.random.key(0)))
    write_converted(folder, "sd_vae", dataclasses.asdict(config), {"file": "none"}, params)


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, is_mounted: bool) -> Iterator[None]:
    """A file system of DISK_BYTES at `folder`, unless there is one."""
    if is_mounted:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "causalfusion_jax-drill", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def failing(case: Case, error: str, disk: pathlib.Path) -> Callable[[], None]:
    """A function that has the disk fail at the moment of a case."""
    if error == "no space left":
        return moments.at(case.moment, case.count, lambda: moments.fill_disk(disk))
    return moments.at(case.moment, case.count, lambda: moments.limit_file_size(0))


def judged(output: str, error: str, folder: pathlib.Path) -> str:
    """What is wrong with the output of a failed command; "" if it ends in one line with file and reason."""
    # Libraries log what they raise, tracebacks too; the line of the command itself comes last.
    last = drill.last_line(output)
    if not last.startswith("error: "):
        return "a traceback" if "Traceback" in output else "no line of error"
    if sum(line.startswith("error: ") for line in output.splitlines()) > 1:
        return "more than one line of error"
    if os.strerror(ERRORS[error]) not in last:
        return "the reason is not said"
    if not re.search(re.escape(str(folder)) + r"/\S", last):
        return "the file is not named"
    return ""


def tried(case: Case, error: str, out: pathlib.Path, disk: pathlib.Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Fails a command's disk, then lets it continue; returns its record."""
    folder = disk / case.command
    drill.remove(folder)
    module, *args = command(case.command, out, folder)
    process = drill.Process(module, args, failing(case, error, disk))
    process.wait()
    fired = moments.FIRED in process.output
    (disk / "ballast").unlink(missing_ok=True)
    reached = drill.reached(folder) if case.command == "train" else 0
    outcome = {
        "fired": fired,
        "status": process.returncode,
        "wrong": judged(process.output, error, folder),
        "output": process.output[-4000:],
    }
    again = drill.Process(module, args)
    again.wait()
    resumed = drill.started_at(again.output) or 0
    outcome |= {
        "survived": again.returncode == 0,
        "repeated": reached - resumed,
        "lost": drill.lost_steps(reached, resumed),
        "error": again.output[-2000:],
    }
    return outcome | drill.compared(expected, lambda: end_of(case.command, folder), outcome["survived"])


def rows_of(records: list[dict]) -> list[dict]:
    """The table: a row for each case."""
    yes = {True: "yes", False: "no"}
    return [
        {
            "command": r["command"],
            "writing": r["writing"],
            "error": r["disk error"],
            "status": r["status"],
            "one line, with file and reason": r["wrong"] or "yes",
            "survived": yes[r["survived"]],
            "steps lost": r["lost"] if r["command"] == "train" else "",
            "byte-identical at the end": yes[r["identical"]],
        }
        for r in records
    ]


def failures_of(records: list[dict]) -> list[str]:
    """A line for each way in which a case missed the goal."""
    failures = []
    for record in records:
        name = f"{record['command']}, {record['writing']}, {record['disk error']}"
        if not record["fired"]:
            failures.append(f"{name}: the moment did not come")
        elif record["status"] in (0, 75) or record["wrong"]:
            failures.append(f"{name}: status {record['status']}, {record['wrong'] or 'one line'}")
        if failure := drill.missed_goal(record):
            failures.append(f"{name}: {failure}")
    return failures


def main() -> int:
    """Runs the drill; the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    args = drill.start(
        __doc__,
        small_disk=dict(type=pathlib.Path, help="folder on a small file system [mounted]"),
        errors=dict(choices=ERRORS, action="append", help="only these [all]"),
        commands=dict(choices=("train", "sample", "encode"), action="append", help="only these [all]"),
    )
    out = args.out
    expected = {"train": drill.reference(out)[0]}
    if not (out / "vae").is_dir():
        drill.value_of(lambda: write_vae(out / "vae"))
    for name in ("sample", "encode"):
        module, *flags = command(name, out, out / name)
        drill.finished(drill.Process(module, flags), name)
        expected[name] = end_of(name, out / name)
    done = drill.Records(out / "disk.jsonl")
    for error in args.errors or ERRORS:
        disk = args.small_disk.absolute() if args.small_disk else out / "disk"
        with small_disk(disk, args.small_disk is not None or error != "no space left"):
            for case in CASES:
                named = {"command": case.command, "writing": case.writing, "disk error": error}
                wanted = args.commands is None or case.command in args.commands
                if not wanted or any(named.items() <= record.items() for record in done.records):
                    continue
                outcome = tried(case, error, out, disk, expected[case.command])
                done.add([named | outcome])
                print(f"{', '.join(named.values())}: {outcome['wrong'] or 'one line'}", flush=True)
    return drill.report("disk", rows_of(done.records), failures_of(done.records))


if __name__ == "__main__":
    sys.exit(main())
