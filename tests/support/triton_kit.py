"""Triton launches without a GPU: grids and arguments are recorded, and kernels are compiled for a given GPU.

    python tests/support/triton_kit.py [--some]      compiles every kernel for three kinds of GPU, and prints a line for
    each python tests/support/triton_kit.py --write       writes these lines to TABLE

Run as a program it must not see TRITON_INTERPRET: an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KERNELS = {
    "triton_lora": ("_shrink_rows", "_expand_rows", "_shrink_segments", "_expand_segments"),
    "triton_attention": ("_write", "_attend", "_join"),
}
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


_SYNCS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose")
_DATA_DEPENDENT = (
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "argwhere",
    "unique",
    "_unique",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "bincount",
)
_INDEXES = ("index", "index_put", "index_put_", "_index_put_impl_")
_CONSTANTS = ("lift_fresh", "lift_fresh_copy")
_COPIES = ("_to_copy", "to", "copy_")


class NotCapturableError(AssertionError):
    """The step does something that a capture forbids or that a replay would not repeat."""


class CaptureGuard(TorchDispatchMode):
    """Checks every operator inside the `with` block; `ran` lists their names in order."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.ran: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        inputs = list(_tensors((args, kwargs)))
        if name in _SYNCS:
            raise NotCapturableError(f"{func}: a value goes to the host, which waits for it")
        if name in _DATA_DEPENDENT or (name == "repeat_interleave" and "Tensor" in func.name()):
            raise NotCapturableError(f"{func}: the shape of its result depends on data")
        if name in _INDEXES and any(t.dtype in (torch.bool, torch.uint8) for t in inputs[1:]):
            raise NotCapturableError(f"{func}: a mask selects as many as it finds")
        if name in _CONSTANTS:
            raise NotCapturableError(f"{func}: a constant is copied from the host's pageable memory")
        named = (kwargs or {}).get("device")
        strangers = {t.device for t in inputs} | ({torch.device(named)} if named is not None else set())
        strangers = strangers - {self.device}
        if strangers and name in _COPIES:
            raise NotCapturableError(f"{func}: a copy between {strangers} and {self.device}, in pageable memory")
        if strangers:
            raise NotCapturableError(f"{func}: a tensor on {strangers} in a step on {self.device}")
        result = func(*args, **(kwargs or {}))
        self.ran.append(func.name())
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def shape(self) -> tuple[Any, ...]:
        """Everything about the launch except the data that its pointers refer to."""
        arguments = [(tuple(a.shape), a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in self.arguments]
        return (self.kernel, self.grid, *arguments, *sorted(self.keywords.items()))


@dataclass
class Launches:
    """Replaces the kernels: records each launch and launches nothing."""

    made: list[Launch] = field(default_factory=list)

    def shapes(self) -> list[tuple[Any, ...]]:
        return [launch.shape() for launch in self.made]

    def kernel(self, name: str) -> Any:
        made = self.made

        class Recorder:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *arguments, **keywords: made.append(Launch(name, grid, arguments, keywords))

        return Recorder()


@contextmanager
def recorded(*modules: ModuleType) -> Iterator[Launches]:
    launches = Launches()
    kept = [(m, name, getattr(m, name)) for m in modules for name in KERNELS[m.__name__.rpartition(".")[2]]]
    for module, name, _ in kept:
        setattr(module, name, launches.kernel(name))
    try:
        yield launches
    finally:
        for module, name, kernel in kept:
            setattr(module, name, kernel)


def compiled(kernel: Any, launch: Launch, capability: int) -> Any:
    """The launch's kernel as a binary for a GPU of this compute capability, specialized as Triton does at a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {key: launch.keywords[key] for key in _OPTIONS if key in launch.keywords}
    constants = {key: value for key, value in launch.keywords.items() if key not in _OPTIONS}
    if "WIDEN" in constants:
        constants["WIDEN"] = False  # only the interpreter widens
    names = kernel.arg_names
    signature: dict[str, str] = dict.fromkeys(constants, "constexpr")
    divisible = {}
    for place, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
        elif value == 1 and isinstance(value, int):
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            divisible[(place,)] = [["tt.divisibility", 16]]
    ordered = {name: signature[name] for name in names}
    source = ASTSource(fn=kernel, signature=ordered, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@dataclass(frozen=True)
class Heads:
    """The attention of one kind of base."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    softcap: float = 0.0


LLAMA_8B, MOST = "Llama 8B", ("Llama 8B", "Gemma 2 9B", "Falcon 7B", "Phi 3")
HEADS = {
    "Llama 8B": Heads(32, 8, 128),
    "Gemma 2 9B": Heads(16, 8, 256, window=4096, softcap=50.0),
    "Falcon 7B": Heads(71, 1, 64),
    "Phi 3": Heads(32, 32, 96, window=2047),
}
WIDTHS = {
    "Llama 8B": (4096, (4096, 1024, 1024), 64),
    "Gemma 2 9B": (3584, (14336, 14336), 16),
    "Falcon 7B": (4544, (4672,), 256),
    "Phi 3": (3072, (9216,), 8),
}
"""Input features, output features of the group's members, the largest rank."""
CAPABILITIES = (80, 90, 100)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What one program may use (CUDA C++ Programming Guide, technical specifications per compute capability)."""
TABLE = Path(__file__).resolve().parents[1] / "runtime" / "kernels" / "triton_kernels.txt"
_TENSOR_CORES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")


def launches_of(base: str, dtype: torch.dtype) -> Launches:
    """One decode step's and one prefill's operators at the widths of a base; the tensors hold no real data."""
    from lorapool_runtime.engines.torch.kernels import triton_attention, triton_lora

    def i32(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    (width, outs, rank), of, rows, slots = WIDTHS[base], HEADS[base], 4, 2
    memory = torch.zeros(16, dtype=dtype)
    x, y = torch.zeros(rows, width, dtype=dtype), torch.zeros(rows, sum(outs), dtype=dtype)
    at = torch.zeros(len(outs), slots, dtype=torch.int64)
    tiles = torch.tensor(triton_lora.output_tiles(outs))
    with recorded(triton_lora, triton_attention) as launches:
        triton_lora.lora_rows(x, i32(rows), memory, i32(len(outs), slots), at, at, tiles, rank, 16, y)
        triton_lora.lora_segments(x, i32(rows), i32(4, 3), memory, i32(len(outs), slots), at, at, tiles, rank, 16, y)
        keys, values = (torch.zeros(64, of.kv_heads, of.head_dim, dtype=dtype) for _ in range(2))
        new = torch.zeros(rows, of.kv_heads, of.head_dim, dtype=dtype)
        triton_attention.paged_write(keys, values, i32(rows), new, new)
        q = torch.zeros(rows, of.heads, of.head_dim, dtype=dtype)
        triton_attention.paged_attend(q, keys, values, i32(rows, 512), i32(rows), 16, 0.1, of.window, of.softcap)
    return launches


def resources(binary: Any) -> dict[str, int]:
    """Registers and bytes of spilled registers per thread, as the assembler assigned them, and what the code uses."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listed)}
    ptx = binary.asm["ptx"]
    return {
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": binary.metadata.shared,
        "vector_loads": ptx.count("ld.global.v4") + ptx.count("cp.async.cg"),
        "tensor_core_products": sum(ptx.count(product) for product in _TENSOR_CORES),
    }


def measure(bases: Sequence[str], capabilities: Sequence[int]) -> Iterator[str]:
    """A line for each kernel, base and capability, in bfloat16."""
    for base in bases:
        for name, launch in {launch.kernel: launch for launch in launches_of(base, torch.bfloat16).made}.items():
            module = next(m for m, names in KERNELS.items() if name in names)
            kernel = getattr(importlib.import_module(f"lorapool_runtime.engines.torch.kernels.{module}"), name)
            for capability in capabilities:
                found = resources(compiled(kernel, launch, capability))
                facts = " ".join(f"{key}={value}" for key, value in found.items())
                yield f"{base.replace(' ', '-')} {name} sm_{capability} {facts}"


def main() -> None:
    some = "--some" in sys.argv
    lines = measure((LLAMA_8B,) if some else MOST, (90,) if some else CAPABILITIES)
    if "--write" not in sys.argv:
        for line in lines:
            print(line, flush=True)
        return
    head = "# Written by `python tests/support/triton_kit.py --write`. Registers and spills are per thread.\n"
    TABLE.write_text(head + "".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
