"""`python -m lorapool_trainer`: trains jobs of files on this machine (`laptop`)."""

import sys

from lorapool_trainer.laptop import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
