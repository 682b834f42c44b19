"""transformers' continuous batching with default settings, base only, as an engine of W1: `… BASE DTYPE`.

One manager is kept over all rounds, because `generate_batch` without it sizes and allocates its KV cache at each call.
The cache's size is given, because without a GPU it would otherwise take all free memory.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers
from common.workloads import Batch
from engines.process import serve
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from lorapool_runtime.cgroup import usable_cores


class ContinuousBatching:
    def __init__(self, base: str, dtype: str) -> None:
        torch.set_num_threads(usable_cores())
        self.versions = {"transformers": transformers.__version__}
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=getattr(torch, dtype), local_files_only=True
        ).eval()
        self._generation = transformers.GenerationConfig(
            do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=64
        )
        self._batching = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512, allow_block_sharing=False)

    def prepare(self, batch: Batch) -> None:
        if any(batch.adapters):
            raise ValueError("this engine runs the base alone")

    def generate(self, batch: Batch) -> list[list[int]]:
        answers = self._model.generate_batch(
            inputs=[list(prompt) for prompt in batch.prompts],
            generation_config=self._generation,
            continuous_batching_config=self._batching,
            max_new_tokens=batch.new,
            persistent_manager=True,
        )
        return [[int(token) for token in answer.generated_tokens] for answer in answers.values()]


if __name__ == "__main__":
    serve(lambda: ContinuousBatching(sys.argv[1], sys.argv[2]))
