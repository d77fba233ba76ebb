"""How a run is asked to stop: SIGTERM from a scheduler that wants the machine, SIGINT from a person.

The first signal lets the step that is being done end; then a checkpoint is written and the command ends with 128 plus
the signal's number (143, 130), as shells and schedulers expect of what a signal ended. A second SIGINT ends it at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from calsmooth import console
from calsmooth.errors import CalsmoothError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedError(CalsmoothError):
    """The run was asked to stop, and did, behind a whole checkpoint. Exit code 128 + the signal's number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopRequest:
    """Which signal has asked the run to stop; None while none has."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name if self.signal is not None else ""

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        console.warn(f"{self.name}: stopping after this step, with a checkpoint")


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within the block the signals ask instead of killing; outside the main thread they do what they did before."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.ask) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
