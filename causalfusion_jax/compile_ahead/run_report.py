"""Preflight of all programs of a run: verdict, table, JSON record."""

import dataclasses
from collections.abc import Callable

from causalfusion_jax.compile_ahead.compiler import Compiled, CompilerError, compile_lowered
from causalfusion_jax.compile_ahead.report import aligned, gib, roofline, time_words
from causalfusion_jax.config.slices import Listing, Program, SliceJob


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result for a program.

    Attributes:
      program: the program, and what is in HBM while it runs.
      compiled: the compiler's result; None if it failed for another reason than memory.
      error: that reason.
    """

    program: Program
    compiled: Compiled | None
    error: str = ""

    @property
    def total_bytes(self) -> int:
        """HBM of each device that the program and the resident arrays need together."""
        return self.program.resident_bytes + (self.compiled.total_bytes if self.compiled else 0)

    @property
    def fits(self) -> bool:
        """Whether it compiles, and fits beside the resident arrays."""
        return self.compiled is not None and self.compiled.fits and self.total_bytes <= self.compiled.limit_bytes


@dataclasses.dataclass(frozen=True)
class RunPreflight:
    """The results for the programs of a run on a slice.

    Attributes:
      job: settings and slice.
      listing: the programs.
      outcomes: the result for each.
    """

    job: SliceJob
    listing: Listing
    outcomes: tuple[Outcome, ...]

    @property
    def fits(self) -> bool:
        """Whether all programs fit."""
        return all(outcome.fits for outcome in self.outcomes)


def preflight_run(
    job: SliceJob, listing: Listing, say: Callable[[str], None], compiler: Callable[..., Compiled] = compile_lowered
) -> RunPreflight:
    """Compiles all programs of a run, one after the other.

    Args:
      job: settings and slice.
      listing: the programs.
      say: called with a line of text for each.
      compiler: `compile_lowered`, or a substitute.
    """
    outcomes = []
    for program in listing.programs:
        try:
            outcome = Outcome(program, compiler(program.lower, job.topology))
        except CompilerError as error:
            outcome = Outcome(program, None, one_line(str(error)))
        took = f", {outcome.compiled.seconds:.1f} s" if outcome.compiled else ""
        say(f"compiled for {job.topology.name}: {program.name}: {outcome_words(outcome)}{took}")
        outcomes.append(outcome)
    return RunPreflight(job, listing, tuple(outcomes))


def one_line(message: str, limit: int = 300) -> str:
    """An error message as one line of at most `limit` characters."""
    line = " ".join(message.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def outcome_words(outcome: Outcome) -> str:
    """Whether a program compiles and fits beside the resident arrays."""
    if outcome.compiled is None:
        return f"does not compile: {outcome.error}"
    own, resident = outcome.compiled.total_bytes, outcome.program.resident
    words = "fits" if outcome.fits else "does not fit"
    words += f", {gib(outcome.total_bytes)} of {gib(outcome.compiled.limit_bytes)} GiB HBM a device"
    if not resident:
        return words
    return f"{words}: its own {gib(own)}, {', '.join(f'{name} {gib(size)}' for name, size in resident.items())}"


def verdict(result: RunPreflight) -> str:
    """A line for each program that fails, or one if all fit; then excluded programs, and assumptions."""
    name, failed = result.job.topology.name, [outcome for outcome in result.outcomes if not outcome.fits]
    lines = [f"{name}: {outcome.program.name} {outcome_words(outcome)}" for outcome in failed]
    if not failed:
        most = max(result.outcomes, key=lambda outcome: outcome.total_bytes)
        lines = [
            f"{name}: all {len(result.outcomes)} programs compile and fit; most HBM takes {most.program.name}:"
            f" {outcome_words(most)}"
        ]
    lines += [f"{name}: no {what}: {why}" for what, why in result.listing.impossible.items()]
    return "\n".join(lines + [f"note: {note}" for note in result.listing.notes])


def table(result: RunPreflight) -> str:
    """A row for each program."""
    rows = [[result.job.topology.name, "fits", "HBM own", "resident", "together", "of GiB", "at least", "bound by"]]
    for outcome in result.outcomes:
        rows.append([outcome.program.name, *_row(result.job, outcome)])
    return aligned(rows)


def _row(job: SliceJob, outcome: Outcome) -> list[str]:
    compiled, resident = outcome.compiled, gib(outcome.program.resident_bytes)
    if compiled is None:
        return ["NO", "-", resident, "-", "-", "does not compile", ""]
    cells = [
        "yes" if outcome.fits else "NO",
        gib(compiled.total_bytes),
        resident,
        gib(outcome.total_bytes),
        gib(compiled.limit_bytes),
    ]
    if not compiled.fits:
        return [*cells, "-", ""]
    times = roofline(compiled.costs, job.topology)
    return [*cells, time_words(times.seconds), times.bound + (" *" if compiled.costs.unknown else "")]


def record(result: RunPreflight, command: str) -> dict:
    """All results, for one line of JSON; `command` is the value of --job."""
    job = result.job
    return {
        "topology": job.topology.name,
        "devices": job.topology.devices,
        "mesh": {name: int(size) for name, size in job.mesh().shape.items()},
        "job": command,
        "fits": result.fits,
        "programs": [_program_record(job, outcome) for outcome in result.outcomes],
        "impossible": dict(result.listing.impossible),
        "assumed": list(result.listing.notes),
    }


def _program_record(job: SliceJob, outcome: Outcome) -> dict:
    compiled = outcome.compiled
    values = {"name": outcome.program.name, "fits": outcome.fits, "resident_bytes": dict(outcome.program.resident)}
    if compiled is None:
        return values | {"error": outcome.error}
    values |= {
        "compile_seconds": round(compiled.seconds, 1),
        "hbm_bytes": compiled.total_bytes,
        "hbm_with_resident_bytes": outcome.total_bytes,
        "hbm_limit_bytes": compiled.limit_bytes,
    }
    if not compiled.fits:
        return values
    times = roofline(compiled.costs, job.topology)
    return values | {
        "hbm": dataclasses.asdict(compiled.memory),
        "roofline_seconds": dataclasses.asdict(times),
        "bound": times.bound,
        "not_counted": sorted(compiled.costs.unknown),
    }
