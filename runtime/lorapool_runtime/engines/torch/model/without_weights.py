"""Lists the modules of a base from its settings and the names in its files, without its weights.

The model is built of tensors without values, with which the probe calls the same modules and computes nothing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from lorapool_api.base_modules import BaseModule
from lorapool_runtime.engines.torch.model.key_map import KeyMap
from lorapool_runtime.engines.torch.model.probe import adaptable, holds_experts, run_probe


def modules_of(config: Mapping[str, object], file_keys: Iterable[str]) -> tuple[BaseModule, ...]:
    """As `Base.modules` of the loaded base.

    config: the content of config.json; file_keys: all names of tensors in the files. Raises what transformers raises
    for settings that it cannot make a model of.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        settings: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    meta = torch.device("meta")
    with meta:
        model: Any = AutoModelForCausalLM.from_config(settings, attn_implementation="eager", trust_remote_code=False)
    model.eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _experts_without_values(model):
        _, calls = run_probe(model, meta)
    return adaptable(model, calls, KeyMap(model, file_keys)).modules


@contextmanager
def _experts_without_values(model: nn.Module) -> Iterator[None]:
    """Which expert computes a row depends on values, which do not exist here: the experts return their input."""
    holders = [module for module in model.modules() if holds_experts(module)]
    for holder in holders:
        holder.forward = _unchanged  # an attribute of the instance, which hides the method until it is deleted
    try:
        yield
    finally:
        for holder in holders:
            del holder.forward


def _unchanged(hidden_states: Tensor, *_chosen: Tensor) -> Tensor:
    return hidden_states
