"""Loading a base takes little more memory than its weights, counted in bytes that the process allocated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LIMIT = 1.1
"""Of the weights: what is loaded, and one group of fused layers."""

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from transformers import LlamaForCausalLM  # before the count: what is imported is no weight
from lorapool_runtime.engines.torch.kernels import fused_linear
from lorapool_runtime.engines.torch.kernels.base_step import PanelLinear
from lorapool_runtime.engines.torch.model import load

folder, dtype, as_on_a_gpu = sys.argv[1], sys.argv[2], sys.argv[3] == "gpu"
torch.set_num_threads(1)
if as_on_a_gpu:  # weights are concatenated, and packed for no processor
    fused_linear.can_pack = lambda weight: False
    PanelLinear.serves = staticmethod(lambda weight: False)

def allocated():  # files that are mapped are not counted: the system may drop their pages
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

seen = []
make = fused_linear.FusedLinear.__init__
def counted(self, linears):
    seen.append(allocated())
    make(self, linears)
    seen.append(allocated())
fused_linear.FusedLinear.__init__ = counted
before = allocated()
with torch.no_grad():
    base = load.load_base(folder, dtype=dtype, device=torch.device("cpu"))
seen.append(allocated())
print(json.dumps({"stock": seen[0] - before, "peak": max(seen) - before, "end": seen[-1] - before}))
"""


def loaded(folder: Path, dtype: str, device: str) -> dict[str, float]:
    """Bytes over the bytes of the weights in `dtype`: of the stock model, at most, and at the end."""
    from safetensors import safe_open

    elements = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            elements += sum(torch.Size(file.get_slice(key).get_shape()).numel() for key in file.keys())  # noqa: SIM118
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    command = [sys.executable, "-c", PROGRAM, str(folder), dtype, device]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    weights = elements * getattr(torch, dtype).itemsize
    return {name: value / weights for name, value in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """58 million weights in bfloat16; a group of its layers is 3 % of them at most."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1792, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=4000, tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_the_peak_of_loading_is_little_more_than_the_weights(base: Path, device: str) -> None:
    """In another type than the files have, so that the weights are allocated and not mapped."""
    found = loaded(base, "float32", device)
    assert found["stock"] > 0.9  # else the test would measure nothing
    assert found["peak"] <= LIMIT, found


def test_weights_that_are_stored_as_they_are_served_are_mapped_and_not_allocated(base: Path) -> None:
    """From there a GPU's are copied to the device, one after the other."""
    found = loaded(base, "bfloat16", "gpu")
    assert found["stock"] < 0.1, found
    assert found["peak"] <= LIMIT, found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: its memory is counted")
def test_the_peak_of_a_gpu_is_little_more_than_the_weights(base: Path) -> None:
    from lorapool_runtime.engines.torch.model.load import load_base

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    with torch.no_grad():
        loaded_base = load_base(str(base), dtype="bfloat16", device=torch.device("cuda"))
    assert torch.cuda.max_memory_reserved() - before <= LIMIT * loaded_base.weight_bytes


@pytest.mark.deep
@pytest.mark.parametrize("device", ["gpu", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_loading_the_real_base_is_little_more_than_its_weights(dtype: str, device: str) -> None:
    folder = os.environ.get("LORAPOOL_TEST_BASE")
    if not folder:
        pytest.skip("LORAPOOL_TEST_BASE names no base")
    found = loaded(Path(folder), dtype, device)
    print(f"{dtype} on a {device}: {found}")
    assert found["peak"] <= LIMIT, found
