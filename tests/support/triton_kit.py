"""Triton launches without a GPU: grids and arguments are recorded, and kernels are compiled for a given GPU.

    python tests/support/triton_kit.py 90 bfloat16      compiles every kernel for compute capability 9.0 and reports

Run as a program it must not see TRITON_INTERPRET: an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

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


def llama_8b_launches(dtype: torch.dtype) -> Launches:
    """One decode step's and one prefill's operators at the widths of an 8B Llama; the tensors hold no real data."""
    from lorapool_runtime.engines.torch.kernels import triton_attention, triton_lora

    def i32(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    rows, slots, memory = 4, 2, torch.zeros(16, dtype=dtype)
    outs = (4096, 1024, 1024)
    x, y = torch.zeros(rows, 4096, dtype=dtype), torch.zeros(rows, sum(outs), dtype=dtype)
    at = torch.zeros(3, slots, dtype=torch.int64)
    tiles = torch.tensor(triton_lora.output_tiles(outs))
    with recorded(triton_lora, triton_attention) as launches:
        triton_lora.lora_rows(x, i32(rows), memory, i32(3, slots), at, at, tiles, 64, 16, y)
        triton_lora.lora_segments(x, i32(rows), i32(4, 3), memory, i32(3, slots), at, at, tiles, 64, 16, y)
        keys, values = (torch.zeros(64, 8, 128, dtype=dtype) for _ in range(2))
        new = torch.zeros(rows, 8, 128, dtype=dtype)
        triton_attention.paged_write(keys, values, i32(rows), new, new)
        q = torch.zeros(rows, 32, 128, dtype=dtype)
        triton_attention.paged_attend(q, keys, values, i32(rows, 512), i32(rows), 16, 0.1, 0, 0.0)
        triton_attention.paged_attend(q, keys, values, i32(rows, 512), i32(rows), 16, 0.1, 4096, 50.0)
    return launches


def main() -> None:
    import importlib

    capability, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    for name, launch in {launch.kernel: launch for launch in llama_8b_launches(dtype).made}.items():
        module = next(m for m, names in KERNELS.items() if name in names)
        kernels = importlib.import_module(f"lorapool_runtime.engines.torch.kernels.{module}")
        binary = compiled(getattr(kernels, name), launch, capability)
        ptx = binary.asm["ptx"]
        wide = ptx.count("ld.global.v4") + ptx.count("cp.async.cg")
        dots = ptx.count("mma.sync") + ptx.count("wgmma.mma_async")
        print(f"{name} shared_bytes={binary.metadata.shared} vector_loads={wide} tensor_core_products={dots}")


if __name__ == "__main__":
    main()
