"""The base's native kernels on CPU: packed linear layers, decode attention over paged keys and values, norms and gates.

`base_kernel()` is None, with the reason in the log, where the library was not built or does not support the processor;
oneDNN and torch compute then. A weight whose values are all exact in bfloat16 is kept as bfloat16 and widened as it is
read: half the bytes for the same float32 result. The order of a row's sums does not depend on the batch, so no bit
does. bfloat16 is summed in float32 and rounded where torch's operators round it (decision 9).

A panel is the packed weight of neighbouring outputs, twice as many as a vector has lanes: [in][outputs]. See BaseLinear
in base_step.h.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from lorapool_runtime.engines.torch.kernels.memory import huge_page_region
from lorapool_runtime.native_library import NativeUnavailableError, open_library

log = logging.getLogger(__name__)

VERSION = 5  # must equal base_step_version of the library
_CACHE_LINE = 64  # panels start on one
_REGION_BYTES = 32 << 20
_HEAD_UNIT = 16  # a head must be whole vectors of any variant
_TYPES = (torch.float32, torch.bfloat16)


Observer = Callable[[object, Tensor, Tensor], None]
"""Receives the operator, its input and its output, after each call of one of the operators below."""


class _Observed(threading.local):
    observer: Observer | None = None


_observed = _Observed()


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Passes every linear layer, norm and gate that this thread calls meanwhile to `observer`."""
    _observed.observer = observer
    try:
        yield
    finally:
        _observed.observer = None


class _Linear(ctypes.Structure):
    """`BaseLinear` of base_step.h."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("bfloat16_panels", ctypes.c_int32),
        ("bfloat16_rows", ctypes.c_int32),
    )


class Decode(ctypes.Structure):
    """`BaseDecode` of base_step.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "keys", "values", "tables", "lengths")),
        *((name, ctypes.c_int64) for name in ("q_row", "q_head", "k_row", "k_head", "v_row", "v_head")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "head_dim", "width", "block_size")),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("bfloat16", ctypes.c_int32),
    )


class _Norm(ctypes.Structure):
    """`BaseNorm` of base_step.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("bfloat16", ctypes.c_int32),
        ("round_first", ctypes.c_int32),
    )


class _Gate(ctypes.Structure):
    """`BaseGate` of base_step.h."""

    _fields_ = (("width", ctypes.c_int64), ("bfloat16", ctypes.c_int32), ("activation", ctypes.c_int32))


class BaseKernel:
    """The opened library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.base_step_isa.restype = ctypes.c_char_p
        isa = library.base_step_isa()
        if isa is None:
            raise NativeUnavailableError("this processor has neither AVX2 nor AVX-512, or LORAPOOL_NATIVE=baseline")
        self.isa: str = isa.decode()
        library.base_step_panel_bytes.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
        library.base_step_panel_bytes.restype = ctypes.c_int64
        library.base_step_pack.argtypes = [ctypes.c_void_p] * 3
        library.base_step_pack.restype = None
        library.base_step_fits_bfloat16.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        library.base_step_linear.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64]
        library.base_step_decode.argtypes = [ctypes.c_void_p]
        for function in (library.base_step_norm, library.base_step_gate):
            function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64]
            function.restype = None
        self.library = library


@cache
def base_kernel() -> BaseKernel | None:
    """None where torch must compute instead; the log gives the reason."""
    try:
        kernel = BaseKernel(open_library("base_step", VERSION))
    except NativeUnavailableError as error:
        log.info("no native kernels for the base, torch computes instead: %s", error)
        return None
    log.info("native kernels for the base", extra={"isa": kernel.isa})
    return kernel


class PanelLinear:
    """y = x W^T + b by the native kernel."""

    @staticmethod
    def serves(weight: Tensor) -> bool:
        return weight.device.type == "cpu" and weight.dtype in _TYPES and base_kernel() is not None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: [out, in]; bias: [out]. Both are copied."""
        kernel = base_kernel()
        assert kernel is not None
        self.dtype, (self.out_features, self.in_features) = weight.dtype, weight.shape
        float_weight = weight.detach().float().contiguous()
        as_bfloat16 = weight.dtype == torch.bfloat16 or bool(
            kernel.library.base_step_fits_bfloat16(float_weight.data_ptr(), float_weight.numel())
        )
        size = kernel.library.base_step_panel_bytes(self.in_features, self.out_features, as_bfloat16)
        self._panels = _panel_memory.take(size)
        assert self._panels.data_ptr() % _CACHE_LINE == 0
        self._bias = None if bias is None else bias.float().contiguous()
        self._job = _Linear(
            self._panels.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            self.in_features,
            self.out_features,
            as_bfloat16,
            weight.dtype == torch.bfloat16,
        )
        self.address = ctypes.addressof(self._job)
        kernel.library.base_step_pack(self.address, float_weight.data_ptr(), self._panels.data_ptr())
        self._run = kernel.library.base_step_linear
        self.nbytes = self._panels.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]"""
        if x.dtype != self.dtype or x.shape[1] != self.in_features or x.device.type != "cpu":
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)}, the layer takes {self.dtype} [rows, {self.in_features}]"
            )
        x = x.contiguous()
        y = torch.empty((x.shape[0], self.out_features), dtype=self.dtype)
        if self._run(self.address, x.data_ptr(), y.data_ptr(), x.shape[0]):
            raise MemoryError("a linear layer's scratch memory")
        if _observed.observer is not None:
            _observed.observer(self, x, y)
        return y


class _PanelMemory:
    """Panels next to each other in huge pages: a step reads all of them, and each small page would cost a TLB miss."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, size_bytes: int) -> Tensor:
        """uint8 [size_bytes], aligned to a cache line; the region is freed with the last panel in it."""
        rounded = -(-size_bytes // _CACHE_LINE) * _CACHE_LINE
        with self._lock:
            if rounded > len(self._left):
                self._left = huge_page_region(max(rounded, _REGION_BYTES))
            taken, self._left = self._left[:size_bytes], self._left[rounded:]
        return taken


_panel_memory = _PanelMemory()


class PagedDecode:
    """Decode attention of one step: its rows' block tables and lengths, used by every layer."""

    @staticmethod
    def serves(pool: Tensor, head_dim: int) -> bool:
        if pool.device.type != "cpu" or pool.dtype not in _TYPES or head_dim % _HEAD_UNIT:
            return False
        return base_kernel() is not None

    def __init__(self, tables: Tensor, lengths: Tensor, *, kv_heads: int, head_dim: int, block_size: int) -> None:
        """tables: int32 [rows, width], block numbers; lengths: int32 [rows], with the row's own token."""
        kernel = base_kernel()
        assert kernel is not None
        assert tables.dtype == lengths.dtype == torch.int32
        self._kept = (tables.contiguous(), lengths.contiguous())
        job = self._job = Decode()
        job.tables, job.lengths = (tensor.data_ptr() for tensor in self._kept)
        job.rows, job.width = tables.shape
        job.kv_heads, job.head_dim, job.block_size = kv_heads, head_dim, block_size
        self._run, self._address = kernel.library.base_step_decode, ctypes.addressof(job)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """q: [heads, tokens, head_dim], k, v: [kv_heads, tokens, head_dim], the decoding rows before all other tokens;
        keys, values: [blocks * block_size, kv_heads, head_dim] of one layer, where k and v are
        written -> [rows, heads, head_dim]."""
        if (
            not (q.dtype == k.dtype == v.dtype == keys.dtype)
            or q.stride(2) != 1
            or k.stride(2) != 1
            or v.stride(2) != 1
        ):
            raise ValueError("queries, keys and values must be of the cache's type, heads contiguous")
        job = self._job
        heads = q.shape[0]
        out = torch.empty((job.rows, heads, job.head_dim), dtype=q.dtype)
        job.q, job.k, job.v, job.out = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        job.keys, job.values = keys.data_ptr(), values.data_ptr()
        job.q_head, job.q_row = q.stride(0), q.stride(1)
        job.k_head, job.k_row = k.stride(0), k.stride(1)
        job.v_head, job.v_row = v.stride(0), v.stride(1)
        job.heads, job.window, job.scale, job.softcap = heads, window or 0, scale, softcap or 0.0
        job.bfloat16 = q.dtype == torch.bfloat16
        if self._run(self._address):
            raise MemoryError("the attention's scratch memory")
        return out


class RowNorm:
    """y = x / rms(x) * weight by the native kernel, over the last dimension."""

    @staticmethod
    def serves(weight: Tensor) -> bool:
        return weight.device.type == "cpu" and weight.dtype in _TYPES and base_kernel() is not None

    def __init__(self, weight: Tensor, epsilon: float, *, plus_one: bool, round_first: bool) -> None:
        """weight: [width]. plus_one: the factor is 1 + weight; round_first: bfloat16 is rounded before it too."""
        kernel = base_kernel()
        assert kernel is not None
        self.dtype, self.width = weight.dtype, weight.shape[0]
        self._weight = weight.detach().float().contiguous() + float(plus_one)  # [width]
        bfloat16 = weight.dtype == torch.bfloat16
        self._job = _Norm(self._weight.data_ptr(), self.width, epsilon, bfloat16, bfloat16 and round_first)
        self.address, self._run = ctypes.addressof(self._job), kernel.library.base_step_norm

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """Multiplies the weight meanwhile, for every caller that reads it by `address` too."""
        weight = self._weight.clone()
        self._weight.mul_(factor)
        try:
            yield
        finally:
            self._weight.copy_(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., width] -> the same, contiguous"""
        if x.dtype != self.dtype or x.shape[-1] != self.width:
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, the norm takes {self.dtype} [..., {self.width}]")
        x = x.contiguous()
        y = torch.empty_like(x)
        self._run(self.address, x.data_ptr(), y.data_ptr(), x.numel() // self.width)
        if _observed.observer is not None:
            _observed.observer(self, x, y)
        return y


class RowGate:
    """y = act(gate) * up by the native kernel; each input row is gate followed by up."""

    ACTIVATIONS = ("silu", "gelu_tanh")

    @staticmethod
    def serves(dtype: torch.dtype, device: torch.device) -> bool:
        return device.type == "cpu" and dtype in _TYPES and base_kernel() is not None

    def __init__(self, width: int, dtype: torch.dtype, activation: str) -> None:
        """width: of gate, and of up; activation: one of ACTIVATIONS."""
        kernel = base_kernel()
        assert kernel is not None
        self.dtype, self.width = dtype, width
        self._job = _Gate(width, dtype == torch.bfloat16, self.ACTIVATIONS.index(activation))
        self.address, self._run = ctypes.addressof(self._job), kernel.library.base_step_gate

    def __call__(self, both: Tensor) -> Tensor:
        """both: [rows, 2 * width] -> [rows, width]"""
        if both.dtype != self.dtype or both.shape[-1] != 2 * self.width:
            raise ValueError(f"rows are {both.dtype} {tuple(both.shape)}, not {self.dtype} [rows, {2 * self.width}]")
        both = both.contiguous()
        y = torch.empty((both.shape[0], self.width), dtype=self.dtype)
        self._run(self.address, both.data_ptr(), y.data_ptr(), both.shape[0])
        if _observed.observer is not None:
            _observed.observer(self, both, y)
        return y
