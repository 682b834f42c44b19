"""Adapters of every module that peft can adapt, under every name it may have: equal to peft, mixed in one batch.

Each adapter is checked as the operator does, with the list that a runtime publishes, and read and run by the engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_kit import Collector, PeftWorld, greedy, peft_world, request, started, tiny_model
from multimodal_kit import glm_with_extra_layers, llama_without_prefix, tiny_gemma3
from safetensors.torch import load_file, save_file

from lorapool_api.base_modules import BaseModules, ModuleKind, compact
from lorapool_artifacts.checks.base_facts import BaseFacts
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.inspect import base_files_from_folder, inspect_adapter_folder
from lorapool_artifacts.loaded_base import facts_of
from lorapool_artifacts.settings import AdapterLimits
from lorapool_runtime.engines.interface import BASE_SLOT
from lorapool_runtime.engines.torch.engine import TorchEngine

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning")

PROMPTS = ([17, 40, 33, 90, 122, 55], [9, 9, 201, 33, 64, 4, 150, 3, 77])
TOKENS = 12
QV = ["q_proj", "v_proj"]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def published(engine: TorchEngine) -> BaseFacts:
    """The facts as the operator gets them."""
    sent = compact(engine.facts.modules).model_dump_json(by_alias=True)
    return BaseFacts.published(BaseModules.model_validate_json(sent))


def equal_to_peft(world: PeftWorld, **settings: Any) -> None:
    """All adapters and the base in one batch, token for token as peft alone; the operator's check accepts them all."""
    engine, got = started(world.base, slots=len(world.adapters), **settings), Collector()
    try:
        facts, slots = published(engine), {None: BASE_SLOT}
        for slot, (name, folder) in enumerate(world.adapters.items()):
            checked = inspect_adapter_folder(folder, facts, AdapterLimits(max_rank=16)).compatibility
            assert checked.ok, (name, checked.message)
            engine.load(slot, engine.read_adapter(str(folder), max_rank=16)).result(10)
            slots[name] = slot
        asked = {f"{name}-{number}": (name, prompt) for name in slots for number, prompt in enumerate(PROMPTS)}
        for request_id, (name, prompt) in asked.items():
            engine.submit(request(request_id, prompt, greedy(TOKENS), slot=slots[name]), got)
        got.wait(asked)
        answers = {request_id: got.tokens(request_id) for request_id in asked}
        assert answers == {key: world.answer(name, prompt, TOKENS) for key, (name, prompt) in asked.items()}
        for name in world.adapters:
            assert answers[f"{name}-0"] != answers["None-0"] or answers[f"{name}-1"] != answers["None-1"], name
    finally:
        engine.stop(5)


EDGES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": QV},
    "output": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]},
    "embedding": {"r": 8, "lora_alpha": 8, "target_modules": ["v_proj", "embed_tokens"]},
    "both": {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("Llama", {"tie_word_embeddings": False}), ("Llama", {}), ("Gemma3", {"tie_word_embeddings": False})],
    ids=["untied", "tied", "scaled"],
)
def test_lora_on_embedding_and_output_layer_equals_peft(
    architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    equal_to_peft(peft_world(tmp_path, tiny_model(architecture, **changes), EDGES))


def test_lora_on_the_output_layer_without_a_native_kernel_equals_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPOOL_NATIVE", "0")
    equal_to_peft(peft_world(tmp_path, tiny_model("Llama", tie_word_embeddings=False), EDGES), max_batch_tokens=32)


MIXTURES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": QV},
    "seven": {"r": 2, "lora_alpha": 4, "target_modules": SEVEN},
    "parameters": {
        "r": 3, "target_modules": ["q_proj"], "lora_alpha": 6,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "down": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["Qwen3Moe", "Olmoe", "Mixtral"])
def test_lora_on_the_experts_of_a_mixture_equals_peft(architecture: str, tmp_path: Path) -> None:
    kinds = MIXTURES | {"all-linear": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}}
    if architecture == "Mixtral":
        kinds["seven"] = {**kinds["seven"], "target_modules": ["q_proj", "v_proj", "w1", "w2", "w3"]}
    equal_to_peft(peft_world(tmp_path, tiny_model(architecture), kinds))


@pytest.mark.parametrize(
    ("architecture", "holder", "parts"),
    [
        ("Qwen3Moe", "mlp.experts", {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}),
        ("Mixtral", "block_sparse_moe.experts", {"w1": (96, 64), "w3": (96, 64), "w2": (64, 96)}),
    ],
)
def test_experts_that_an_older_trainer_saved_one_by_one_equal_peft(
    architecture: str, holder: str, parts: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    world = peft_world(tmp_path, tiny_model(architecture), {"one by one": {"r": 4, "target_modules": QV}})
    folder = world.adapters["one by one"]
    tensors = load_file(folder / "adapter_model.safetensors")
    random = torch.Generator().manual_seed(3)
    for layer in range(2):
        for expert in range(4):
            for part, (out, in_) in parts.items():
                name = f"base_model.model.model.layers.{layer}.{holder}.{expert}.{part}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(4, in_, generator=random) * 0.2
                tensors[f"{name}.lora_B.weight"] = torch.randn(out, 4, generator=random) * 0.2
    rewrite(folder, tensors, target_modules=[*QV, *parts])
    world.models["one by one"] = loaded_by_peft(world.base, folder)
    equal_to_peft(world)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def loaded_by_peft(base: Path, folder: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()


# --- the names of modules ---------------------------------------------------------------------------------------


def renamed(folder: Path, of: Callable[[str], str], to: Path, **config: Any) -> Path:
    """A copy of an adapter with other names for the same modules."""
    to.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (to / name).write_bytes((folder / name).read_bytes())
    rewrite(to, {of(name): value for name, value in load_file(folder / "adapter_model.safetensors").items()}, **config)
    return to


TEXT = r".*language_model.*\.(q_proj|v_proj)"


def test_a_multimodal_base_serves_adapters_by_all_names_of_its_text_model(tmp_path: Path) -> None:
    """Gemma 3: names as loaded, as on disk (which is how older versions named them), and as of the text model alone."""
    world = peft_world(
        tmp_path, tiny_gemma3(), {"loaded": {"r": 4, "target_modules": TEXT}, "plain": {"r": 4, "target_modules": QV}}
    )
    own, now = world.adapters["loaded"], "model.model.language_model."
    assert all(now in name for name in load_file(own / "adapter_model.safetensors"))
    spelled = {
        "on disk": (lambda n: n.replace(now, "model.language_model.model."), TEXT),
        "text alone": (lambda n: n.replace(now, "model.model."), QV),
    }
    for name, (of, targets) in spelled.items():
        world.adapters[name] = renamed(own, of, tmp_path / name, target_modules=targets)
        world.models[name] = world.models["loaded"]
    equal_to_peft(world)


def test_layers_that_exist_only_on_disk_are_not_expected_of_an_adapter(tmp_path: Path) -> None:
    """GLM-4 MoE: its files have the layers that predict several tokens, which transformers does not load."""
    world = peft_world(tmp_path, tiny_model("Llama"), {})
    extra = glm_with_extra_layers(tmp_path / "glm")
    world = peft_world(tmp_path / "made", extra.model, {"plain": {"r": 4, "target_modules": QV}})
    world.base = extra.folder
    assert any("layers.2." in name for name in base_files_from_folder(extra.folder).shapes), "the case tests nothing"
    equal_to_peft(world)


def test_a_base_that_was_saved_without_its_prefix_serves_adapters(tmp_path: Path) -> None:
    model = tiny_model("Llama")
    world = peft_world(tmp_path, model, {"plain": {"r": 4, "target_modules": QV}})
    world.base = llama_without_prefix(tmp_path, model)
    assert not any(name.startswith("model.") for name in base_files_from_folder(world.base).shapes)
    world.adapters["without prefix"] = renamed(
        world.adapters["plain"], lambda name: name.replace("model.model.layers", "model.layers"), tmp_path / "other"
    )
    world.models["without prefix"] = world.models["plain"]
    equal_to_peft(world)


@pytest.mark.parametrize("make", [lambda: tiny_model("Llama"), lambda: tiny_model("Qwen3Moe"), tiny_gemma3])
def test_the_list_made_without_weights_is_the_list_of_the_loaded_base(make: Callable[[], Any], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    engine = started(tmp_path, slots=1)
    try:
        without = facts_of(base_files_from_folder(tmp_path))
        assert without is not None
        assert without.modules == published(engine).modules
        assert without.spelled == published(engine).spelled
    finally:
        engine.stop(5)


# --- whole matrices ---------------------------------------------------------------------------------------------


def resized(world_folder: Path, model: Any, tokens: int, **config: Any) -> Path:
    """An adapter of a model with more tokens than the base, saved with the embeddings that peft adds by itself."""
    import copy

    from peft import LoraConfig, get_peft_model

    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(tokens)
    larger.config._name_or_path = str(world_folder / "base")
    larger.name_or_path = str(world_folder / "base")
    torch.manual_seed(5)
    adapted = get_peft_model(larger, LoraConfig(r=4, target_modules=QV, init_lora_weights=False, **config))
    folder = world_folder / f"resized-{tokens}"
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tokens", [328, 312], ids=["more", "fewer"])
def test_embeddings_of_a_resized_model_that_were_not_trained_are_left_out(tokens: int, tmp_path: Path) -> None:
    world = peft_world(tmp_path, tiny_model("Llama"), {"plain": {"r": 4, "target_modules": QV}})
    folder = resized(tmp_path, world.models[None], tokens)
    names = load_file(folder / "adapter_model.safetensors")
    assert [name for name in names if "embed_tokens" in name or "lm_head" in name], "peft saved no embedding"
    save_adapter_alone = {name: value for name, value in names.items() if "layers" in name}
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    save_file(save_adapter_alone, alone / "adapter_model.safetensors")
    world.adapters["resized"], world.models["resized"] = folder, loaded_by_peft(world.base, alone)
    equal_to_peft(world)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_whole_matrix_that_was_trained_is_refused_by_its_first_row(module: str, tmp_path: Path) -> None:
    model = tiny_model("Llama", tie_word_embeddings=False)
    world = peft_world(tmp_path, model, {"whole": {"r": 4, "target_modules": QV, "modules_to_save": [module]}})
    folder = world.adapters["whole"]
    engine = started(world.base, slots=1)
    try:
        assert engine.read_adapter(str(folder), max_rank=16).rank == 4, "nothing in it was trained yet"
        tensors = load_file(folder / "adapter_model.safetensors")
        name = next(name for name in tensors if module in name)
        tensors[name][7] += 0.01
        rewrite(folder, tensors)
        found = inspect_adapter_folder(folder, published(engine), AdapterLimits(max_rank=16)).compatibility
        assert found.ok, "only a runtime can compare the rows"
        assert f"{module}.weight: a runtime compares the rows" in found.message
        with pytest.raises(ArtifactError, match=rf"whole .*{module} was trained: row 7 is not the base's"):
            engine.read_adapter(str(folder), max_rank=16)
    finally:
        engine.stop(5)


def test_what_no_text_passes_is_listed_as_such(tmp_path: Path) -> None:
    tiny_gemma3().save_pretrained(tmp_path)
    engine = started(tmp_path, slots=1)
    try:
        kinds = {module.name: module.kind for module in engine.facts.modules}
        unused = {name for name, kind in kinds.items() if kind is ModuleKind.UNUSED}
        assert unused
        assert all("vision_tower" in name for name in unused)
    finally:
        engine.stop(5)
