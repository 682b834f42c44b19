"""Errors for people to read: which part failed, why, and what to do. `cli` prints them.

ClusterError
├── MissingToolError      a program that the machine must have is not there
├── BuildFailedError      Go could not build a program
├── StartFailedError      a component did not become ready
└── NotRunningError       the command needs a running cluster
"""


class ClusterError(Exception):
    """The base: `remedy` is the next thing to try, `log_tail` the last lines of the log that explains it."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "", log_tail: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy
        self.log_tail = log_tail

    def report(self) -> str:
        """All of it as text."""
        parts = [f"error: {self}"]
        if self.log_tail:
            parts += ["last lines of its log:", *(f"  | {line}" for line in self.log_tail.splitlines())]
        if self.remedy:
            parts.append(f"what to do: {self.remedy}")
        return "\n".join(parts)


class MissingToolError(ClusterError):
    exit_code = 3


class BuildFailedError(ClusterError):
    exit_code = 4


class StartFailedError(ClusterError):
    exit_code = 5


class NotRunningError(ClusterError):
    exit_code = 6
