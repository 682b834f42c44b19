"""`python -m lorapool_trainer`: trains jobs of files on this machine, or with `serve` those of an operator."""

import sys

from lorapool_runtime.cgroup import wait_passively


def main() -> int:
    """Returns the process's exit code."""
    wait_passively()  # what is imported below imports torch
    if sys.argv[1:2] == ["serve"]:
        from lorapool_trainer.serve.process import main as serve

        return serve()
    from lorapool_trainer.laptop import main as train

    return train(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
