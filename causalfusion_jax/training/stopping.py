"""Ends of training before its last step: a signal, or divergence."""

import os
import signal

import jax

from causalfusion_jax.common import distributed


class TrainingDiverged(RuntimeError):
    """Too many steps in a row without a finite gradient."""


class Stopped(Exception):
    """A signal ended training before its last step or its last evaluation; the state is saved."""


class Interrupted(Exception):
    """A stop was requested during work that is repeated when training resumes."""


class StopSignal:
    """Records SIGTERM and SIGINT, so that training can stop at its next poll; a context manager.

    With several processes jax's runtime watches SIGTERM, and all processes stop at the same poll.

    Attributes:
      received: name of the signal; None if this process itself received none.
      stopping: whether a poll has answered that training is to stop.
    """

    def __init__(self):
        self.received: str | None = None
        self._polls = 0
        self.stopping = False

    def __enter__(self) -> "StopSignal":
        watched = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._previous = {s: signal.signal(s, self._note) for s in watched}
        return self

    def _note(self, number, frame):
        self.received = signal.Signals(number).name
        # A second signal ends the process at once.
        signal.signal(number, self._previous[number])

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str:
        """Name of the signal; SIGTERM if another process received it."""
        return self.received or "SIGTERM"

    def poll(self) -> bool:
        """Whether to stop here. All processes poll at the same steps and get the same answer."""
        if not self.stopping:
            # The runtime picks the number of a poll that no process has reached yet.
            self._polls += 1
            self.stopping = distributed.should_stop(self._polls, bool(self.received))
        return self.stopping

    def interrupt(self) -> None:
        """Polls. Raises Interrupted if training is to stop."""
        if self.poll():
            raise Interrupted(self.name)

    def stopped(self, step: int, total: int, folder: str | os.PathLike) -> Stopped:
        """The exception that reports a stop after saving step `step` of `total` in a folder."""
        return Stopped(f"{self.name}: saved step {step} of {total} in {folder}; run the same command again to continue")
