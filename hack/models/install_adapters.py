"""Puts what the trainer made of examples/finetunes/jobs.yaml into the folders of the examples. `make train` runs it.

`python hack/models/install_adapters.py FOLDER`, the trainer's --out: each task gets its adapter, with weights in bf16
and the base's public name, and its loss curve as CSV and as a picture.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from finetune_tasks import BASE_NAME, TASKS
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CURVES = ("step_metrics.csv", "loss.svg")


def install(trained: Path, folder: Path) -> None:
    """`trained`: the trainer's folder of one job, `folder`: that of the task."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(trained / "adapter" / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((trained / "adapter" / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = BASE_NAME
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in CURVES:
        shutil.copy(trained / name, folder / name)


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    for task in TASKS.values():
        install(Path(sys.argv[1]) / task.name, task.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
