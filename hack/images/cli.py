"""Reads the command line of `python3 hack/images` and prints."""

import argparse
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

from cluster.errors import ClusterError
from cluster.kernel import end_like_interrupt
from cluster.places import state_dir
from images import build, buildah, registry, unpack


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="hack/images", description="The project's images, built without Docker.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    sub = commands.add_parser("build", help="build what changed and push it to a registry on loopback")
    sub.add_argument(
        "--registry", metavar="HOST:PORT", help="without it: into the storage that the local clusters share"
    )
    sub.add_argument("--tag", default="dev")
    sub.add_argument(
        "--only",
        choices=build.ALL_TARGETS,
        action="append",
        help="just this image; runtime-vllm is only built where it is named",
    )
    sub.add_argument("--gpu", action="store_true", help="keep what only a GPU uses (doubles the runtime image)")
    sub.add_argument("--prune", action="store_true", help="empty the local store afterwards; the registry keeps all")
    sub = commands.add_parser("unpack", help="unpack the runtime image for a local cluster that is not up yet")
    sub.add_argument("--name", default="demo", help="the cluster's name (default: demo)")
    sub = commands.add_parser("sbom", help="write the bill of materials of each built image")
    sub.add_argument("--out", type=Path, default=Path("sbom"), metavar="FOLDER", help="default: %(default)s")
    sub.add_argument("--gpu", action="store_true", help="of the runtime image that keeps what only a GPU uses")
    commands.add_parser("prune", help="empty the local store: the next change of code fetches torch again")
    options = parser.parse_args(argv)
    end_like_interrupt()
    empty_afterwards = options.command == "prune" or getattr(options, "prune", False)
    try:
        if options.command == "build":
            targets = tuple(options.only or build.TARGETS)
            with nullcontext(options.registry) if options.registry else registry.serving() as where:
                print(json.dumps(build.build(where, options.tag, targets, cpu_only=not options.gpu)))
        if options.command == "unpack":
            unpack.unpack(build.Image("runtime", cpu_only=True), state_dir(options.name))
        if options.command == "sbom":
            from images import sbom  # the other commands need no package

            sbom.write([build.Image(target, not options.gpu) for target in build.TARGETS], options.out)
        if empty_afterwards:
            prune()
    except ClusterError as error:
        print(error.report(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def prune() -> None:
    """Everything buildah kept for us."""
    with buildah.exclusive():
        buildah.run("rmi", "--all", "--force", quiet=True)
        shutil.rmtree(buildah.store(), ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
