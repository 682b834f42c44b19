"""The targets: what counts as fast enough, one line each, and the record that is compared with it.

A program that measures one of these gives its record the name listed here. A target without a record is "not run".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from common.records import Record

Result = Literal["met", "not met", "not run"]


@dataclass(frozen=True, slots=True)
class Target:
    record: str
    says: str
    of: Literal["ratio", "value"]
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"{self.record}: a target has one bound")

    @property
    def bound(self) -> str:
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"

    def figure(self, record: Record | None) -> float | None:
        """The number that is compared with the bound; None: not measured."""
        if record is None:
            return None
        return record.ratio if self.of == "ratio" else record.value

    def result(self, record: Record | None) -> Result:
        figure = self.figure(record)
        if figure is None:
            return "not run"
        met = figure >= self.at_least if self.at_least is not None else figure <= (self.at_most or 0.0)
        return "met" if met else "not met"


def _ratio(record: str, says: str, at_least: float) -> Target:
    return Target(record, says, "ratio", at_least=at_least)


TARGETS: Sequence[Target] = (
    _ratio("w1.fp32.distinct16_over_base", "16 distinct adapters / own base, fp32", 0.85),
    _ratio("w1.bf16.distinct16_over_base", "16 distinct adapters / own base, bf16", 0.85),
    _ratio("w1.fp32.mixed_ranks_over_base", "16 distinct of ranks 4 to 64 / own base", 0.80),
    _ratio("w1.fp32.shuffled_over_ordered", "16 distinct, rows shuffled / ordered", 0.97),
    _ratio("w1.fp32.base_loaded_over_unloaded", "base-only batch, 16 adapters loaded / none loaded", 0.99),
    _ratio("w1.fp32.base_over_vllm", "base / vLLM CPU", 1.0),
    _ratio("w1.fp32.distinct16_over_vllm", "16 distinct / vLLM CPU, fp32", 2.3),
    _ratio("w1.bf16.distinct16_over_vllm", "16 distinct / vLLM CPU, bf16", 3.3),
    _ratio("w1.fp32.distinct16_over_peft_one_by_one", "16 distinct / peft, set_adapter one by one", 12),
    _ratio("w1.fp32.distinct16_over_peft_mixed", "16 distinct / peft, one mixed batch, fp32", 3.6),
    _ratio("w1.bf16.distinct16_over_peft_mixed", "16 distinct / peft, one mixed batch, bf16", 7),
    _ratio("w1.fp32.base_over_transformers", "base / transformers' continuous batching as it comes", 1.7),
    _ratio("w1.fp32.distinct16_over_llamacpp", "16 distinct / llama.cpp's server, both over HTTP", 2),
    _ratio("w1.fp32.http_over_in_process", "16 distinct, over HTTP / in process", 0.95),
    _ratio("w2.n500_over_n5", "throughput under W2 with 500 adapters / with 5", 0.90),
    Target("loading.host_to_slot_ms", "host to slot / bytes ÷ memory bandwidth", "ratio", at_most=2),
    Target("loading.inter_token_p99_ms", "others' inter-token p99, during loads / without", "ratio", at_most=1.1),
    Target("w7.inter_token_p99_ms", "the same over HTTP, with as many unloads (W7)", "ratio", at_most=1.1),
    Target("loading.disk_to_slot_ms", "disk to slot / bytes ÷ memory bandwidth", "ratio", at_most=3),
    Target("loading.disk_to_slot_over_vllm", "disk to slot / vLLM CPU's add_lora", "ratio", at_most=1),
    Target("start.ready_over_from_pretrained", "runtime's start to ready / from_pretrained", "ratio", at_most=1.2),
    Target("gateway.added_p50_ms", "gateway: added latency at 32 connections, p50, ms", "value", at_most=1),
    Target("gateway.added_p99_ms", "gateway: added latency at 32 connections, p99, ms", "value", at_most=5),
    Target("gateway.requests_per_core_s", "gateway: requests per second and core", "value", at_least=2000),
    Target("gateway.streams_1000_errors", "gateway: errors in 1,000 open streams", "value", at_most=0),
    Target("gateway.large_requests_per_s", "gateway: requests of 200 KB per second", "value", at_least=500),
    _ratio("training.together_64", "4 jobs trained together / by peft in turn, 64 tokens", 1.15),
    _ratio("training.together_256", "the same with micro-batches of 256 tokens", 0.97),
    Target("training.peak_over_base", "peak of 4 jobs less states and activations / base", "value", at_most=1.25),
    Target("training.useful_rows", "tokens of examples / computed rows, five tasks", "value", at_least=0.98),
)
