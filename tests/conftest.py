"""What must be set before any test module is imported."""

import os
from pathlib import Path

# Triton reads it once, when something first imports it, and on a CPU its kernels run by its interpreter alone.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
