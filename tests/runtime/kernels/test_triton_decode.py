"""The decode step of a GPU equals the eager one and does nothing that a CUDA graph cannot hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_kit
from engine_kit import VOCAB, greedy, peft_world, request, tiny_model
from gpu_kit import ADAPTERS, META, NoCapture, core_of, meta_graphs, read
from torch import Tensor
from triton_kit import CaptureGuard, NotCapturableError

from lorapool_runtime.engines.errors import UnsupportedBaseError
from lorapool_runtime.engines.interface import DecodeProgramState, TokenOutput
from lorapool_runtime.engines.torch import gpu_start
from lorapool_runtime.engines.torch.config import EngineConfig
from lorapool_runtime.engines.torch.core import Core
from lorapool_runtime.engines.torch.cuda_graphs import CudaCapture, DecodeGraphs, Step, batch_sizes
from lorapool_runtime.engines.torch.kernels import triton_attention, triton_lora
from lorapool_runtime.engines.torch.lora.kernel_gpu import TritonKernel
from lorapool_runtime.engines.torch.lora.slots import AdapterSlots
from lorapool_runtime.engines.torch.model.attention import TritonRows
from lorapool_runtime.engines.torch.scheduling.scheduler import Chunk, StepPlan


class Compared:
    """A decode path that computes every step twice and compares the graphs' result with the eager one."""

    def __init__(self, core: Core, graphs: DecodeGraphs) -> None:
        self.core, self.graphs, self.sizes = core, graphs, Counter[int]()

    def can_run(self, plan: StepPlan) -> bool:
        return self.graphs.can_run(plan)

    def run(self, plan: StepPlan) -> Tensor:
        got, lora = self.graphs.run(plan).clone(), self.core.base.lora
        kernel, lora.kernel, self.core.runner.decode_path = lora.kernel, None, None
        wanted = self.core.runner.run(plan)
        lora.kernel, self.core.runner.decode_path = kernel, self
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        self.sizes[len(plan.decodes)] += 1
        return got


@pytest.mark.parametrize(("architecture", "layers"), [("Llama", 1), ("Gemma2", 2)])
def test_every_decode_step_equals_the_eager_one(
    architecture: str, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base rows and two adapters, rows that come and go, contexts past Gemma's window of 6, padding to 4 and to 5."""
    world = peft_world(tmp_path, tiny_model(architecture, num_hidden_layers=layers), ADAPTERS)
    core = core_of(world.base)
    for slot, name in ((0, "everything"), (1, "output"), (2, "qv")):
        core.load(slot, read(core, world.adapters[name]))
    capture = NoCapture()
    monkeypatch.setattr(triton_attention, "_PARTS", 1)  # each part is a program, and the interpreter is slow
    core.base.lora.kernel = kernel = TritonKernel(core.slots)
    kernel.warm_up(core.slots)
    graphs = DecodeGraphs(core.base, core.pool, max_batch=5, max_model_len=32, capture=capture)
    with torch.inference_mode():
        before = core.pool.data.clone()
        graphs.capture_all()
        padding = graphs.step(2, True)  # as CudaCapture does before it captures
        assert torch.equal(core.pool.data, before)
        assert bool(padding.isfinite().all())
        compared = core.runner.decode_path = Compared(core, graphs)
        asked = {
            "a": (None, -1, [5, 6, 7], 5),
            "b": ("everything", 0, [9, 8], 4),
            "c": ("output", 1, list(range(3, 12)), 5),
            "d": ("everything", 0, [4], 2),
            "e": (None, -1, [30, 31], 2),
        }
        tokens: dict[str, list[int]] = {name: [] for name in asked}
        for name in ("a", "b", "c"):
            core.add(request(name, asked[name][2], greedy(asked[name][3]), slot=asked[name][1]))
        collect(core.step() + core.step(), tokens)
        for name in ("d", "e"):
            core.add(request(name, asked[name][2], greedy(asked[name][3]), slot=asked[name][1]))
        while core.scheduler.has_work:
            collect(core.step(), tokens)
    for name, (adapter, _, prompt, count) in asked.items():
        assert tokens[name] == world.answer(adapter, prompt, count), name
    assert capture.captured == 2 * len(graphs.sizes)
    assert compared.sizes == {3: 1, 5: 1, 2: 1}  # padded to 4, 5 and 2


def test_a_step_with_an_adapter_of_the_embedding_runs_the_models_own_code(tmp_path: Path) -> None:
    """As on a GPU: the other layers by Triton's kernels, the embedding by torch, in mixed batches equal to peft."""
    world = peft_world(tmp_path, tiny_model("Llama", num_hidden_layers=1), ADAPTERS)
    core = core_of(world.base)
    core.slots = core.base.lora.slots = AdapterSlots(
        core.base.groups, slots=3, max_rank=16, dtype=torch.float32, device=torch.device("cpu"), in_host_memory=False
    )
    kernel = core.base.lora.kernel = TritonKernel(core.slots)
    kernel.warm_up(core.slots)
    for slot, name in ((0, "qv"), (1, "embedding")):
        core.load(slot, read(core, world.adapters[name]))
    graphs = core.runner.decode_path = DecodeGraphs(
        core.base, core.pool, max_batch=5, max_model_len=32, capture=NoCapture()
    )
    asked = {"a": (None, -1, [5, 6, 7], 3), "b": ("qv", 0, [9, 8], 3), "c": ("embedding", 1, [4, 30], 3)}
    tokens: dict[str, list[int]] = {name: [] for name in asked}
    could: list[bool] = []
    can_run = graphs.can_run
    graphs.can_run = lambda plan: could.append(can_run(plan)) or could[-1]  # type: ignore[method-assign,func-returns-value]
    with torch.inference_mode():
        graphs.capture_all()
        for name, (_, slot, prompt, count) in asked.items():
            core.add(request(name, prompt, greedy(count), slot=slot))
        while core.scheduler.has_work:
            collect(core.step(), tokens)
    for name, (adapter, _, prompt, count) in asked.items():
        assert tokens[name] == world.answer(adapter, prompt, count), name
    assert not any(could)


def collect(outputs: list[TokenOutput], tokens: dict[str, list[int]]) -> None:
    for output in outputs:
        assert output.token_id is not None, output.error
        tokens[output.request_id].append(output.token_id)


# --- what a capture allows ---


ARCHITECTURES = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Phi3", "Olmo2", "Granite"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_decode_step_never_asks_the_device_nor_takes_a_shape_from_data(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = meta_graphs(tmp_path, architecture, monkeypatch)
    layers, groups = len(graphs._base.layers), sum(group.by_kernel for group in graphs._base.groups)
    for size in graphs.sizes:
        for with_lora in (True, False):
            with torch.inference_mode(), CaptureGuard(META) as guard:
                logits = graphs.step(size, with_lora)
            assert logits.shape == (size, VOCAB)
            ran = Counter(guard.ran)
            assert ran["lorapool::paged_attend"] == ran["lorapool::paged_write"] == layers
            assert ran["lorapool::lora_rows"] == (groups if with_lora else 0)


FORBIDDEN: dict[str, Callable[[Tensor], Any]] = {
    "an item": lambda x: x.sum().item(),
    "a truth value": lambda x: bool((x > 0).any()),
    "a list": lambda x: x.tolist(),
    "the places of what is not zero": lambda x: x.nonzero(),
    "a mask as index": lambda x: x[x > 0],
    "distinct values": lambda x: x.unique(),
    "a constant from the host": lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=x.device),
    "a tensor moved from the host": lambda x: x + torch.ones(3).to(x.device),
    "repeats by a tensor": lambda x: x.repeat_interleave(x.long()),
}


@pytest.mark.parametrize("step", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_the_guard_sees_what_a_capture_forbids(step: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3, device=META)
    with pytest.raises(NotCapturableError), CaptureGuard(META):
        step(x)


def test_the_operators_themselves_only_make_room_and_launch() -> None:
    """The operators run with their launches recorded instead of made."""
    i32, i64 = ({"dtype": t, "device": META} for t in (torch.int32, torch.int64))
    x, y, memory = (torch.empty(shape, device=META) for shape in ((4, 64), (4, 96), (1000,)))
    slots, ranks, at = torch.empty(4, **i32), torch.empty(2, 3, **i32), torch.empty(2, 3, **i64)
    keys, new, q = (torch.empty(shape, device=META) for shape in ((80, 2, 16), (4, 2, 16), (4, 6, 16)))
    tiles, tables, segments = torch.empty(2, 4, **i64), torch.empty(4, 9, **i32), torch.empty(5, 3, **i32)
    with triton_kit.recorded(triton_lora, triton_attention) as launches, CaptureGuard(META) as guard:
        inside(triton_lora.lora_rows)(x, slots, memory, ranks, at, at, tiles, 16, 16, y)
        inside(triton_lora.lora_segments)(x, slots, segments, memory, ranks, at, at, tiles, 16, 16, y)
        inside(triton_attention.paged_write)(keys, keys, slots, new, new)
        inside(triton_attention.paged_attend)(q, keys, keys, tables, slots, 4, 0.1, 0, 0.0)
    assert set(guard.ran) == {"aten::empty.memory_format"}
    assert len(launches.made) == 7


def inside(operator: Any) -> Callable[..., Any]:
    return operator._init_fn  # type: ignore[no-any-return]


def test_batch_sizes_are_few_and_reach_the_largest() -> None:
    assert batch_sizes(1) == (1,)
    assert batch_sizes(6) == (1, 2, 4, 6)
    assert batch_sizes(32) == (1, 2, 4, 8, 16, 32)
    assert len(batch_sizes(1000)) == 11


# --- the start on a GPU ---


def gpu_like(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Core:
    """A core on the CPU with the slots of a GPU; the kernels are interpreted, so contexts are short."""
    monkeypatch.setattr(triton_attention, "_PARTS", 1)
    monkeypatch.setattr(gpu_start, "_CONTEXTS", (1, 5, 4, 2))
    monkeypatch.setattr(gpu_start, "_TILED_ROWS", 12)
    tiny_model("Llama", num_hidden_layers=1).save_pretrained(folder)
    core = core_of(folder, max_batch=3)
    core.slots = core.base.lora.slots = AdapterSlots(
        core.base.groups, slots=3, max_rank=16, dtype=torch.float32, device=torch.device("cpu"), in_host_memory=False
    )
    core.runner.decode_path = None
    return core


def start(core: Core, capture: Any) -> tuple[DecodeGraphs | None, DecodeProgramState]:
    with torch.inference_mode():
        gpu_start.load_kernels(core.runner, core.slots)
        return gpu_start.load_graphs(core.runner, core.slots, max_batch=3, max_model_len=32, capture=capture)


def test_every_graph_is_compared_at_start_with_and_without_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, replayed = gpu_like(tmp_path, monkeypatch), []

    def replay(self: DecodeGraphs, decodes: tuple[Chunk, ...], size: int) -> Tensor:
        replayed.append((size, len(decodes), any(chunk.sequence.slot != -1 for chunk in decodes)))
        return original(self, decodes, size)

    original = DecodeGraphs.replay
    monkeypatch.setattr(DecodeGraphs, "replay", replay)
    graphs, state = start(core, NoCapture())
    assert graphs is not None
    assert state == DecodeProgramState(active=True)
    assert replayed == [(1, 1, True), (1, 1, False), (2, 2, True), (2, 1, False), (3, 3, True), (3, 2, False)]
    assert not core.pool.data.any()
    assert not any(core.slots.is_published(slot) for slot in range(3))


class FailsAt:
    """A capture that fails, or whose replay is wrong, for one size."""

    def __init__(self, size: int, *, with_lora: bool, wrong: bool) -> None:
        self.size, self.with_lora, self.wrong = size, with_lora, wrong

    def __call__(self, step: Any) -> Step:
        if step.args != (self.size, self.with_lora):
            return step  # type: ignore[no-any-return]
        if self.wrong:
            return lambda: step() + 1.0
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


@pytest.mark.parametrize("with_lora", [True, False])
@pytest.mark.parametrize(("wrong", "reason"), [(False, "not_captured"), (True, "unverified")])
def test_a_graph_that_cannot_be_captured_or_is_wrong_costs_speed_and_nothing_else(
    with_lora: bool, wrong: bool, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    core = gpu_like(tmp_path, monkeypatch)
    graphs, state = start(core, FailsAt(2, with_lora=with_lora, wrong=wrong))
    assert graphs is None
    assert state == DecodeProgramState(active=False, reason=reason)
    assert [(r.levelname, "the model's own code serves" in r.getMessage()) for r in caplog.records] == [
        ("WARNING", True)
    ]
    with torch.inference_mode():
        core.runner.self_check()
    assert not core.pool.data.any()


@pytest.mark.parametrize(
    ("kernel", "name"), [("_add_segments", "LoRA"), ("add", "LoRA"), ("attend", "attention")], ids=str
)
def test_kernels_that_compute_something_else_are_an_error(
    kernel: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = gpu_like(tmp_path, monkeypatch)
    if kernel == "attend":
        original = TritonRows.attend
        monkeypatch.setattr(TritonRows, "attend", lambda *arguments: original(*arguments) * 1.01)
    else:
        monkeypatch.setattr(TritonKernel, kernel, lambda *_: None)
    with pytest.raises(UnsupportedBaseError, match=f"the {name} kernels differ from torch's operators on this GPU"):
        start(core, NoCapture())


# --- on a GPU ---


@pytest.fixture
def on_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU: a graph is captured and replayed")


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("architecture", ["Llama", "Gemma2"])
def test_captured_graphs_give_peft_s_tokens_on_a_gpu(architecture: str, tmp_path: Path) -> None:
    world = peft_world(tmp_path, tiny_model(architecture), ADAPTERS)
    core = Core(
        EngineConfig(model_dir=str(world.base), device="cuda", dtype="float32", max_rank=16, slots=3, max_batch=5)
    )
    assert isinstance(core.runner.decode_path, DecodeGraphs)
    assert isinstance(core.runner.decode_path._capture, CudaCapture)
    tokens: dict[str, list[int]] = {}
    with torch.inference_mode():
        for slot, name in ((0, "everything"), (2, "qv")):
            core.load(slot, read(core, world.adapters[name]))
        for number, slot in enumerate((-1, 0, 2)):
            tokens[str(number)] = []
            core.add(request(str(number), [5, 6, 7 + number], greedy(12), slot=slot))
        while core.scheduler.has_work:
            collect(core.step(), tokens)
    for number, adapter in enumerate((None, "everything", "qv")):
        assert tokens[str(number)] == world.answer(adapter, [5, 6, 7 + number], 12)
