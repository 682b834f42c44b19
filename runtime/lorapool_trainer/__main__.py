"""`python -m lorapool_trainer`: trains jobs of files on this machine, or with `serve` those of an operator."""

import sys

from lorapool_runtime.cgroup import wait_passively


def main() -> int:
    """Returns the process's exit code."""
    wait_passively()  # what is imported below imports torch
    if sys.argv[1:2] == ["serve"]:
        from lorapool_trainer.serve.process import main as serve

        return serve()
    from lorapool_trainer.laptop import read_command

    command = read_command(sys.argv[1:])
    from lorapool_trainer.local_run import train  # imports torch, and so comes after what can be wrong

    return train(command)


if __name__ == "__main__":
    sys.exit(main())
