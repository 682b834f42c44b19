"""The real base and the five committed fine-tunes in one batch give, token for token, what peft gives one by one."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_kit import Collector, greedy, request, started

from lorapool_runtime.engines.interface import BASE_SLOT

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

EXAMPLES = Path(__file__).parents[3] / "examples" / "finetunes"
REQUESTS = 24
MAX_TOKENS = 24


def real_base() -> Path:
    folder = os.environ.get("LORAPOOL_TEST_BASE", "")
    if not folder or not (Path(folder) / "config.json").is_file():
        pytest.skip("LORAPOOL_TEST_BASE names no base model folder: `make test` makes it and sets it")
    return Path(folder)


def finetunes() -> list[Path]:
    found = sorted(folder for folder in EXAMPLES.iterdir() if (folder / "heldout.jsonl").is_file())
    missing = [folder.name for folder in found if not (folder / "adapter_model.safetensors").is_file()]
    if missing:
        pytest.skip(f"not trained yet: {', '.join(missing)}; `make train` does it")
    return found


def prompts(tokenizer: Any, folder: Path, count: int) -> list[list[int]]:
    """Held-out conversations without their answers."""
    asked = []
    for line in (folder / "heldout.jsonl").read_text().splitlines()[:count]:
        messages = json.loads(line)["messages"][:-1]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        asked.append([int(token) for token in rendered["input_ids"]])
    return asked


def peft_one_by_one(base: Path, folder: Path | None, asked: list[list[int]]) -> list[list[int]]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
        if folder is not None:
            model = PeftModel.from_pretrained(model, folder)
    answers = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        answers.append([int(token) for token in out[0, len(prompt) :]])
    return answers


def check_equality(base: Path, folders: list[Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    each = REQUESTS // (len(folders) + 1)
    asked: dict[Path | None, list[list[int]]] = {folder: prompts(tokenizer, folder, each) for folder in folders}
    asked[None] = [asked[folders[i % len(folders)]][i] for i in range(each)]
    slots = {None: BASE_SLOT} | {folder: slot for slot, folder in enumerate(folders)}
    engine = started(base, dtype="float32", max_batch=REQUESTS, max_batch_tokens=256)
    got = Collector()
    try:
        for folder in folders:
            engine.load(slots[folder], engine.read_adapter(str(folder), max_rank=16)).result(30)
        for i in range(each):
            for folder, batch in asked.items():
                engine.submit(request(name(folder, i), batch[i], greedy(MAX_TOKENS), slot=slots[folder]), got)
            got.next(60)  # the first ones answer already when the next ones join
        got.wait([name(folder, i) for folder in asked for i in range(each)], 120)
    finally:
        engine.stop(10)
    for folder, batch in asked.items():
        for i, answer in enumerate(peft_one_by_one(base, folder, batch)):
            assert got.tokens(name(folder, i)) == answer, tokenizer.decode(batch[i])


def name(folder: Path | None, i: int) -> str:
    return f"{folder.name if folder else 'base'}-{i}"


def test_24_requests_over_the_five_finetunes_and_the_base_equal_peft_one_by_one() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # like the engine's: two threads on two busy cores wait for each other
    try:
        check_equality(real_base(), finetunes())
    finally:
        torch.set_num_threads(threads)
