"""`make demo` and `make demo-down`: parses the command line, runs the steps, reports what failed and what to do.

Run as `python3 hack/demo up|down`; standard library only.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run by path: make the folder importable as the package it is
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cluster.kernel import end_like_interrupt
from demo.run import Options, down, up
from demo.schedule import StepError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="hack/demo", description="Lorapool's demo on a real one-node cluster.")
    parser.add_argument("command", choices=("up", "down"))
    parser.add_argument("--name", default="demo", help="name of the local cluster (default: demo)")
    parser.add_argument("--out", type=Path, default=None, help="folder for summary.json (default: .demo)")
    parser.add_argument("--context", help="use this context of your kubeconfig instead of a local cluster")
    parser.add_argument(
        "--registry",
        help="with --context: a registry you may push to and the cluster can pull from, e.g. ghcr.io/me/lorapool",
    )
    parser.add_argument("--purge", action="store_true", help="down: also remove the cluster's state folder")
    parser.add_argument("--train", action="store_true", help="up: also train a fine-tune by the OpenAI client")
    given = parser.parse_args(argv)
    end_like_interrupt()
    options = Options(**{name: value for name, value in vars(given).items() if name != "command"})
    try:
        (up if given.command == "up" else down)(options)
    except StepError as error:
        print(f"\n\033[31mThe step '{error.step}' failed.\033[0m\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; nothing that this run started is left running. `make demo` goes on where it stopped.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
