"""A stop request: a signal sets a flag, the ranks agree on it at the next step."""

from __future__ import annotations

import signal


class StopRequest:
    """Set by SIGUSR1, SIGTERM or SIGINT. Installed as early as possible, because
    SIGUSR1's default action would end the process."""

    def __init__(self):
        self.requested = False

    def install(self) -> None:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def ignore(self) -> None:
        """From here on the exit code is decided: a launcher that ends the other tasks when the
        first one exits must not turn it into "killed by SIGTERM"."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        self.requested = True
