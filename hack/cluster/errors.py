"""Errors for people to read: which part failed, why, and what to do. `cli` prints them.

ClusterError
├── MissingTool      a program that the machine must have is not there
├── BuildFailed      Go could not build a program
├── StartFailed      a component did not become ready
└── NotRunning       the command needs a running cluster
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


class MissingTool(ClusterError):
    exit_code = 3


class BuildFailed(ClusterError):
    exit_code = 4


class StartFailed(ClusterError):
    exit_code = 5


class NotRunning(ClusterError):
    exit_code = 6
