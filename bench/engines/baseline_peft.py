"""peft, as an engine of W1: `python -m engines.baseline_peft BASE ADAPTERS DTYPE one|mixed [NAMES]`.

`one` calls set_adapter and runs one request at a time; it is also the reference for equality. `mixed` runs one batch
with `adapter_names=`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from common.workloads import REQUESTS, Batch, adapter_name, mixed_name
from engines.process import serve

from lorapool_runtime.cgroup import usable_cores


class Peft:
    def __init__(self, base: str, adapters: Path, dtype: str, way: str) -> None:
        import peft

        torch.set_num_threads(usable_cores())
        self.versions = {"peft": peft.__version__}
        self._way = way
        names = [name(number) for name in (adapter_name, mixed_name) for number in range(REQUESTS)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stock = transformers.AutoModelForCausalLM.from_pretrained(
                base, dtype=getattr(torch, dtype), local_files_only=True
            )
            self._model: Any = peft.PeftModel.from_pretrained(stock, adapters / names[0], adapter_name=names[0])
            for name in names[1:]:
                self._model.load_adapter(adapters / name, adapter_name=name)
            self._model.to(getattr(torch, dtype)).eval()

    def prepare(self, batch: Batch) -> None:
        pass

    def generate(self, batch: Batch) -> list[list[int]]:
        if self._way == "mixed":
            return self._run(batch.prompts, batch.new, adapter_names=list(batch.adapters))
        tokens = []
        for prompt, name in zip(batch.prompts, batch.adapters, strict=True):
            if name is None:
                with self._model.disable_adapter():
                    tokens += self._run((prompt,), batch.new)
            else:
                self._model.set_adapter(name)
                tokens += self._run((prompt,), batch.new)
        return tokens

    def _run(self, prompts: tuple[tuple[int, ...], ...], new: int, **more: Any) -> list[list[int]]:
        ids = torch.tensor(prompts)
        options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **more)
        tokens: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return tokens


if __name__ == "__main__":
    serve(lambda: Peft(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]))
