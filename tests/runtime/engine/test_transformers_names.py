"""What transformers may rename without notice is known to few modules, so that an upgrade is little work."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

RUNTIME = Path(__file__).parents[3] / "runtime" / "lorapool_runtime"
FOLDER = "engines/torch/model"
MODEL = f"{FOLDER}/load.py"
PUBLIC = {
    "openai/chats/tokenizer.py": {"transformers.AutoTokenizer"},
    "engines/choose.py": {"transformers.utils.logging"},
    MODEL: {
        "transformers.AttentionInterface",
        "transformers.AutoConfig",
        "transformers.AutoModelForCausalLM",
        "transformers.GenerationConfig",
        "transformers.MODEL_FOR_CAUSAL_LM_MAPPING",
    },
    f"{FOLDER}/without_weights.py": {"transformers.AutoConfig", "transformers.AutoModelForCausalLM"},
}
"""Documented classes and functions, and who uses them."""
INTERNAL = {
    f"{FOLDER}/key_map.py": {
        "transformers.conversion_mapping.get_model_conversion_mapping",
        "transformers.core_model_loading.WeightConverter",
        "transformers.core_model_loading.WeightRenaming",
        "transformers.core_model_loading.rename_source_key",
    },
}
"""The rules by which transformers renames a checkpoint's tensors, which have no documented interface."""
STRUCTURAL = {
    "attention_mask", "get_input_embeddings", "get_output_embeddings", "get_text_config", "input_ids", "layer_idx",
    "layer_types", "logits_to_keep", "max_position_embeddings", "num_hidden_layers", "output_router_logits",
    "position_ids", "quantization_config", "rope_parameters", "rope_type", "scaling", "set_attn_implementation",
    "sliding_attention", "sliding_window", "use_cache",
}  # fmt: skip
"""Names of configurations, models and their calls: attributes, keyword arguments, parameters or strings."""
USERS = {
    "get_input_embeddings": {"lora_modules.py", "probe.py", "stored.py"},
    "get_output_embeddings": {"probe.py", "stored.py"},
    "input_ids": {"load.py", "probe.py"},
    "use_cache": {"load.py", "probe.py"},
}
"""Modules that use a name, where it is not load.py alone: they find a base's embeddings, and try it on a few tokens."""
ELSEWHERE = {"max_position_embeddings": {"engines/vllm/base.py"}}
"""Modules outside of that folder, which read the same configuration for another engine."""


def trees() -> dict[str, ast.Module]:
    return {str(path.relative_to(RUNTIME)): ast.parse(path.read_text()) for path in sorted(RUNTIME.rglob("*.py"))}


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "transformers")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "transformers":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def used(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) | ast.keyword(arg=str(name)) | ast.arg(arg=name):
                found.add(name)
            case ast.Constant(value=str(name)):
                found.add(name)
    return found & STRUCTURAL


def test_of_transformers_only_known_names_are_imported_and_by_known_modules() -> None:
    assert {name: found for name, tree in trees().items() if (found := set(imported(tree)))} == {**PUBLIC, **INTERNAL}


@pytest.mark.parametrize("name", sorted(STRUCTURAL))
def test_a_structural_name_occurs_only_in_the_modules_that_are_known_to_need_it(name: str) -> None:
    users = {f"{FOLDER}/{module}" for module in USERS.get(name, {"load.py"})} | ELSEWHERE.get(name, set())
    assert {module for module, tree in trees().items() if name in used(tree)} == users


def test_no_underscored_name_of_transformers_is_touched() -> None:
    private = {
        node.attr
        for node in ast.walk(trees()[MODEL])
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
    }
    assert private == set()


def test_the_module_that_knows_them_reads_in_one_sitting() -> None:
    assert len((RUNTIME / MODEL).read_text().splitlines()) <= 400
