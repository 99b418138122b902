"""Where every thread of a rank stands, told shortly before a collective gives up on a rank.

When one rank hangs, the others wait for it until ``DEEPSPEED_TIMEOUT`` and end without a word about
where it stood. So each rank sets a timer at every step: where the step does not end, each writes
its stacks into its log, those that wait and the one they wait for.
"""

from __future__ import annotations

import faulthandler

from trelm_ds.distributed import timeout

_MARGIN_S = 60.0  # before the timeout; a tenth of it where it is short
_log = None


def enable(log) -> None:
    """Sets the timer, and again whenever ``rearm`` is called.

    Args:
        log: file of this rank, open while the timer is on.
    """
    global _log
    _log = log
    rearm()


def rearm() -> None:
    """The rank is getting on: the timer starts anew. Nothing where it is not enabled."""
    if _log is not None:
        limit = timeout().total_seconds()
        faulthandler.dump_traceback_later(max(limit - _MARGIN_S, 0.9 * limit), file=_log)


def disable() -> None:
    """No stacks from here on."""
    global _log
    _log = None
    faulthandler.cancel_dump_traceback_later()
