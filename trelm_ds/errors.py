"""Errors a user can act on, each one clear line, and the exit codes they end with."""

import sys

EXIT_DONE = 0
EXIT_BAD_INPUT = 2
EXIT_FAILED = 1
EXIT_STOPPED = 75  # stopped on request, checkpoint written: start again to go on
EXIT_BAD_NODE = 76  # a node of the job is not fit for it: start again without


class TrelmError(Exception):
    """Base of every error whose message is meant for the user; the process exits with 2, or with
    the class's own code.

    Attributes:
        everywhere: whether all ranks of a job raise it alike, so that rank 0 alone says it. None:
            before the ranks have met they fail alike, on flags and files; then each has data of
            its own and speaks for itself.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str, everywhere: bool | None = None):
        super().__init__(message)
        self.everywhere = everywhere


class ConfigError(TrelmError):
    """A flag, preset or configuration file asks for something unknown or impossible."""


class DataError(TrelmError):
    """A corpus, shard, graph, table or vocabulary is missing, corrupt or inconsistent."""


class CheckpointError(TrelmError):
    """A checkpoint is missing, incomplete, corrupt or belongs to a different run."""


class WriteError(TrelmError):
    """A run cannot write what it has to: a full disk is no one's bad input."""

    exit_code = EXIT_FAILED


class LoaderError(TrelmError):
    """A loader process died (out of memory, killed): not the data's fault."""

    exit_code = EXIT_FAILED


def one_line(error: Exception, limit: int = 300) -> str:
    """Another library's message as one line of at most ``limit`` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def exit_code(error: Exception) -> int:
    """Of a script that ends by this error."""
    return getattr(error, "exit_code", EXIT_FAILED)


def report(error: Exception, heading: str = "error") -> int:
    """Says on stderr in one line what went wrong; the exit code of a script that ends by it.

    Args:
        error: a ``TrelmError``, or an OSError that no one could foresee: a full disk.
        heading: what the line begins with.
    """
    print(f"{heading}: {' '.join(str(error).split())}", file=sys.stderr)
    return exit_code(error)
