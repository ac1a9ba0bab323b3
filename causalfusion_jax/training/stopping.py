"""How training ends before its last step: by a signal, or because it diverged."""

import signal

import jax

from causalfusion_jax.common import distributed


class TrainingDiverged(RuntimeError):
    """Too many steps in a row without a finite gradient."""


class Stopped(Exception):
    """A signal ended training before its last step, or before its last evaluation; its state is saved."""


class Interrupted(Exception):
    """A stop was requested in the middle of something that is repeated after the resume."""


class StopSignal:
    """Notes SIGTERM and SIGINT, so that training can stop at the next place where it polls.

    With several processes jax's runtime watches SIGTERM, and they agree on the place.

    Attributes:
      received: the signal's name; None where this process itself received none.
      stopping: whether a poll said so.
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
        # A second one ends the process at once.
        signal.signal(number, self._previous[number])

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str:
        """The signal; of several processes any one may have received it, which is SIGTERM."""
        return self.received or "SIGTERM"

    def poll(self) -> bool:
        """Whether to stop here. All processes poll at the same places, and get the same answer."""
        if not self.stopping:
            # The runtime picks the number of a poll that no process has reached yet.
            self._polls += 1
            self.stopping = distributed.should_stop(self._polls, bool(self.received))
        return self.stopping

    def interrupt(self) -> None:
        """Polls. Raises Interrupted where training is to stop."""
        if self.poll():
            raise Interrupted(self.name)
