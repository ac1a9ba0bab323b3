"""Kills training at random times and at named moments, and lets it continue.

    python launch/drills/kill.py --kills=100 --out=drills/kill

Each run is killed up to five times, then trained to its end, which must be that of an uninterrupted
run. The same command continues; another --seed needs another --out. Prints a table and one JSON
line; exit status 1 if a restart was refused, more than `checkpoint.every` steps were lost, or an
end differs.
"""

import collections
import dataclasses
import functools
import itertools
import pathlib
import random
import signal
import sys

import drill
import moments

MOMENTS = {
    "at random": None, "arrays are written": moments.ARRAYS, "between arrays and commit": moments.COMMIT,
    "between commit and manifest": moments.MANIFEST, "half of the manifest": moments.HALF_MANIFEST,
    "deletion of an old step": moments.DELETION, "in a grid": moments.GRID, "in an evaluation": moments.EVALUATION,
}  # fmt: skip
SIGNALS = ("SIGKILL", "SIGTERM")
KEPT = (1, 3)
KILLS_OF_A_RUN = 5


@dataclasses.dataclass(frozen=True)
class Kill:
    """A kill.

    Attributes:
      number: unique in the drill.
      moment: name of one of `MOMENTS`.
      signal: SIGKILL or SIGTERM.
      keep: `checkpoint.keep` of its run.
    """

    number: int
    moment: str
    signal: str
    keep: int


def all_kills(count: int) -> list[Kill]:
    """`count` kills: every moment, signal and number of kept checkpoints equally often."""
    kinds = itertools.cycle(itertools.product(MOMENTS, SIGNALS, KEPT))
    return [Kill(number, *next(kinds)) for number in range(count)]


class KilledRun:
    """One run, killed up to five times and then trained to its end.

    Args:
      workdir: its folder.
      keep: `checkpoint.keep`.
      rng: draws the times and counts.
      seconds: time that the whole run takes.

    Attributes:
      outcomes: a record of each kill, in order.
    """

    def __init__(self, workdir: pathlib.Path, keep: int, rng: random.Random, seconds: float):
        self._workdir, self._flags, self._rng, self._seconds = workdir, f"--config.checkpoint.keep={keep}", rng, seconds
        self.outcomes, self._unjudged = [], []

    def run(self, kills: list[Kill]) -> None:
        """Kills it by some of `kills`; a kill whose moment does not come is left for another run."""
        for kill in kills:
            process, fired = self._killed(kill)
            refused = not self._judge(process)
            if fired:
                reached = drill.reached(self._workdir)
                outcome = dataclasses.asdict(kill) | {"reached": reached, "status": process.returncode}
                self.outcomes.append(outcome)
                self._unjudged.append(outcome)
            if refused or process.returncode == 0 or len(self.outcomes) == KILLS_OF_A_RUN:
                break
        process = drill.train(self._workdir, self._flags)
        process.wait()
        if self._judge(process) and self._unjudged:
            raise RuntimeError(f"{self._workdir}: the output does not say how it continued:\n{process.output}")

    def _killed(self, kill: Kill) -> tuple[drill.Process, bool]:
        """A process that has ended, and whether it was killed."""
        number = getattr(signal, kill.signal)
        # The first time is the first step that is saved.
        moment, count = MOMENTS[kill.moment], self._rng.randint(1, 2) if self.outcomes else 1
        if moment is None:
            process = drill.train(self._workdir, self._flags)
            process.wait(self._rng.uniform(0, self._seconds), number)
            return process, process.was_killed
        # After SIGTERM the process continues and must find its files whole.
        moment = moment._replace(half=moment.half and number == signal.SIGKILL)
        fault = moments.at(moment, count, functools.partial(moments.kill, number))
        process = drill.train(self._workdir, self._flags, fault=fault)
        process.wait()
        return process, moments.FIRED in process.output

    def _judge(self, process: drill.Process) -> bool:
        """Judges the kills before `process` by how it continued; False if it refused."""
        resumed = drill.started_at(process.output)
        refused = process.returncode in (1, 2)
        if resumed is not None or refused:
            for outcome in self._unjudged:
                outcome |= {"survived": not refused, "error": process.output[-2000:] if refused else ""}
                if resumed is not None:
                    outcome["repeated"] = outcome["reached"] - resumed
                    outcome["lost"] = drill.lost_steps(outcome["reached"], resumed)
            self._unjudged.clear()
        return not refused


def rows_of(outcomes: list[dict]) -> list[dict]:
    """The table: a row for each moment and number of kept steps."""
    groups = collections.defaultdict(list)
    for outcome in outcomes:
        groups[outcome["moment"], outcome["keep"]].append(outcome)
    rows = []
    for (moment, keep), group in sorted(groups.items(), key=lambda item: (list(MOMENTS).index(item[0][0]), item[0][1])):
        rows.append({"moment": moment, "keep": keep} | _row(group))
    return rows + [{"moment": "all", "keep": ""} | _row(outcomes)]


def _row(group: list[dict]) -> dict:
    signals = [sum(outcome["signal"] == name for outcome in group) for name in SIGNALS]
    repeated = (outcome["repeated"] for outcome in group if outcome["survived"])
    return {
        "tried": len(group),
        "SIGKILL, SIGTERM": f"{signals[0]}, {signals[1]}",
        **drill.continued_columns(group),
        "most steps repeated": max(repeated, default=""),
        **drill.identical_column(group),
    }


def failures_of(outcomes: list[dict]) -> list[str]:
    """A line for each kill that missed the goal."""
    failures = []
    for outcome in outcomes:
        failure = drill.missed_goal(outcome)
        if not failure and outcome["status"] == 75 and outcome["repeated"]:
            failure = f"said it was saved, and {outcome['repeated']} steps were repeated"
        if not failure and outcome["signal"] == "SIGTERM" and outcome["status"] not in (75, -signal.SIGTERM, 0):
            failure = f"status {outcome['status']}"
        if failure:
            name = f"run {outcome['run']}: {outcome['signal']} {outcome['moment']}, keep={outcome['keep']}"
            failures.append(f"{name}: {failure}")
    return failures


def main() -> int:
    """Runs the drill; the exit status."""
    args = drill.start(__doc__, kills=dict(type=int, default=100), seed=dict(type=int, default=0))
    out = args.out
    expected, seconds = drill.reference(out)
    done = drill.Records(out / "kill.jsonl")
    left = [kill for kill in all_kills(args.kills) if kill.number not in {r["number"] for r in done.records}]
    rng = random.Random(args.seed)
    rng.shuffle(left)
    while left:
        number = 1 + max((record["run"] for record in done.records), default=0)
        workdir = out / f"run{number}"
        drill.remove(workdir)
        rng = random.Random(f"{args.seed} {number}")
        run = KilledRun(workdir, left[0].keep, rng, seconds)
        run.run([kill for kill in left if kill.keep == left[0].keep])
        if not run.outcomes:
            raise RuntimeError(f"run {number}: the moment of {left[0]} did not come")
        survived = all(outcome["survived"] for outcome in run.outcomes)
        end = drill.compared(expected, functools.partial(drill.read_end, workdir), survived)
        for outcome in run.outcomes:
            outcome |= {"run": number, **end}
        done.add(run.outcomes)
        kills = ", ".join(f"{o['signal']} {o['moment']} at step {o['reached']}" for o in run.outcomes)
        print(f"run {number}, keep={left[0].keep}{'' if end['identical'] else ' DIFFERS'}: {kills}", flush=True)
        numbers = {outcome["number"] for outcome in run.outcomes}
        left = [kill for kill in left if kill.number not in numbers]
    return drill.report("kill", rows_of(done.records), failures_of(done.records), seed=args.seed)


if __name__ == "__main__":
    sys.exit(main())
