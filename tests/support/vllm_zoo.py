"""Whether vLLM serves each architecture of `model_zoo`: the last column of docs/reference/models.md.

    VLLM-PYTHON tests/support/vllm_zoo.py [WORD ...] [--write]

Runs the models whose names contain a word, or all; prints one JSON object, the outcome by models, and with --write
writes them into the page. Runs in vLLM's own environment (`make vllm`), on its build for CPUs. The runtime's own code
checks and configures the base; vLLM then computes it in this process, with the same calls to its worker as the engine
makes. Greedy tokens of the base, and of an adapter of its attention layers made by peft, must equal transformers'. Each
architecture has a process of its own, forked from one that has imported vLLM.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import select
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from model_zoo import CASES, NEW_TOKENS, PAGE, PROMPT, SERVED, Case

CASE_S = 240.0
UNTESTED = "not tested"
"""What the page says where the build for CPUs does not compute the tiny model; the reason is only printed."""
_ATTENTION = ("q_proj", "v_proj", "qkv_proj", "query_key_value", "dense", "o_proj", "out_proj")
_WIDER = ("hidden_size", "head_dim", "n_embd", "word_embed_proj_dim", "query_pre_attn_scalar")
"""Settings that are doubled: on a CPU vLLM has no attention for heads of 16."""


def wider(case: Case) -> Case:
    def doubled(value: Any, name: str = "") -> Any:
        if isinstance(value, Mapping):
            return {key: one if key == "vision_config" else doubled(one, key) for key, one in value.items()}
        if name in _WIDER:
            return 2 * value
        if name == "mrope_section":
            return [2 * one for one in value]
        return value * 2 if name in ("short_factor", "long_factor") else value

    return dataclasses.replace(case, changes=doubled(case.changes), common=doubled(case.common))


def answer_of(model: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    return [int(token) for token in out[0, len(PROMPT) :]]


def adapted(model: Any, names: set[str], folder: Path) -> Any:
    """The model with an adapter of its attention layers, which is saved."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=sorted(names), init_lora_weights=False)
    made = get_peft_model(copy.deepcopy(model), config).eval()
    made.save_pretrained(str(folder))
    return made


def outcome(case: Case, folder: Path) -> str:
    """SERVED, the words of a refusal, or UNTESTED with the reason."""
    from vllm.v1.engine.llm_engine import LLMEngine

    from lorapool_runtime.engines.errors import UnsupportedBaseError
    from lorapool_runtime.engines.interface import SamplingParams
    from lorapool_runtime.engines.vllm.base import adaptable, read_base
    from lorapool_runtime.engines.vllm.config import EngineConfig
    from lorapool_runtime.engines.vllm.loaded import prepare
    from lorapool_runtime.engines.vllm.names import Vllm
    from lorapool_runtime.engines.vllm.slots import check_placed

    model = wider(case).build()
    model.save_pretrained(folder / "base")
    path = folder / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(case.stored)))
    config = EngineConfig(
        str(folder / "base"), dtype="float32", threads=1, slots=1, max_batch=2, max_rank=8, kv_bytes=64 << 20,
        max_model_len=64, prefix_cache=False,
    )  # fmt: skip
    vllm = Vllm(config)
    try:
        base = read_base(folder / "base")
        engine = LLMEngine.from_vllm_config(prepare(vllm, config, base), disable_log_stats=True)
        [worker] = engine.collective_rpc("lorapool_describe")
        found = adaptable(base.modules, worker["layers"])
    except UnsupportedBaseError as error:
        return f"refused: {str(error).partition(': ')[0]}"
    except Exception as error:
        return f"{UNTESTED} ({_short(error)})"
    params = vllm.sampling(SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True), None, None, ())

    def tokens(lora: Any) -> list[int]:
        engine.add_request(f"{lora}", {"prompt_token_ids": list(PROMPT)}, params, lora_request=lora)
        got: list[int] = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                got += output.outputs[0].token_ids
        return got

    try:
        same = tokens(None) == answer_of(model)
    except Exception as error:
        return f"{UNTESTED} ({_short(error)})"
    if not same:
        return f"{UNTESTED} (greedy tokens differ from transformers')"
    names = {module.name.rpartition(".")[2] for module in found.modules} & set(_ATTENTION)
    if not names:
        return "refused: vLLM adapts none of its attention layers"
    reference = adapted(model, names, folder / "adapter")
    wanted = {found.vllm_names[one.name]: one for one in found.modules if one.name.rpartition(".")[2] in names}
    shapes = {name: (4, one.in_features, one.out_features) for name, one in wanted.items()}
    check_placed(shapes, engine.collective_rpc("lorapool_load", args=("a", 1, str(folder / "adapter"))))
    if tokens(vllm.lora("a", 1, str(folder / "adapter"))) != answer_of(reference):
        return f"{UNTESTED} (with an adapter, greedy tokens differ from peft's)"
    return SERVED


def _short(error: Exception) -> str:
    return " ".join(str(error).split()).removeprefix("vLLM does not start (")[:120] or type(error).__name__


def in_own_process(work: Callable[[], str]) -> str:
    """What `work` returns in a fork of this process, or how that ended."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = work()
        except BaseException as error:
            text = f"{UNTESTED} (it failed: {type(error).__name__}: {' '.join(str(error).split())})"
        os.write(writing, text.encode()[:4000])
        os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], CASE_S)
    text = os.read(reading, 4000).decode() if ready else ""
    os.close(reading)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return text or f"{UNTESTED} (its process ended without an answer)"


def main() -> int:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "VLLM_HOST_IP": "127.0.0.1"}
    from transformers.utils import logging as transformers_logging

    from lorapool_runtime.engines.vllm.config import EngineConfig
    from lorapool_runtime.engines.vllm.names import Vllm

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    Vllm(EngineConfig(""))  # imports it, which takes half a minute
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401

    words, outcomes = [word for word in sys.argv[1:] if word != "--write"], {}
    for case in CASES:
        if words and not any(word in case.models for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcomes[case.models] = in_own_process(lambda one=case, at=Path(folder): outcome(one, at))  # type: ignore[misc]
        print(f"{case.models}: {outcomes[case.models]}", file=sys.stderr, flush=True)
        if "--write" in sys.argv:
            write(outcomes)
    print(json.dumps(outcomes, indent=1))
    return 0


def write(outcomes: Mapping[str, str]) -> None:
    """Replaces the last column of the page's lines for these models."""
    known = {models: text.partition(" (")[0] for models, text in outcomes.items()}
    lines = []
    for line in PAGE.read_text().splitlines():
        parts = line.strip("| ").split(" | ")
        lines.append(f"| {' | '.join([*parts[:-1], known[parts[0]]])} |" if parts[0] in known else line)
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
