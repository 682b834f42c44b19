"""`python -m lorapool_trainer`: trains jobs of files on this machine, or with `serve` those of an operator."""

import os
import sys


def main() -> int:
    # Read when torch is imported: threads that spin while they wait slow a busy machine down several times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.argv[1:2] == ["serve"]:
        from lorapool_trainer.serve.process import main as serve

        return serve()
    from lorapool_trainer.laptop import main as train

    return train(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
