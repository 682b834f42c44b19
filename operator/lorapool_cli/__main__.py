"""`lorapool COMMAND …`: finds the command, and imports it only when it is used: no image has all that all need."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence


def _inspect(argv: Sequence[str]) -> int:
    from lorapool_artifacts.inspect_command import main

    return main(argv)


def _serve(argv: Sequence[str]) -> int:
    from lorapool_serve.__main__ import main

    return main(argv)


def _usage(argv: Sequence[str]) -> int:
    from lorapool_cli.usage_command import main

    return main(argv)


COMMANDS: Mapping[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "inspect": (_inspect, "report whether an adapter would be served, and every reason why not"),
    "serve": (_serve, "serve the BaseModels and LoraAdapters of a folder on this machine, without Kubernetes"),
    "usage": (_usage, "report usage and costs of a release as a table or CSV, from its gateway"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lorapool",
        epilog="\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help="see below; `lorapool COMMAND --help` describes each")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="…", help="its arguments")
    given = parser.parse_args(argv)
    run, _ = COMMANDS[given.command]
    return run(given.rest)


if __name__ == "__main__":
    sys.exit(main())
