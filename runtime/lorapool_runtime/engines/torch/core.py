"""What lives in the engine thread: the base, the memory and the requests; `step()` is one turn of it.

`engine` alone calls it, and only from its thread (`check` excepted: it reads what never changes). It knows no queue,
no lock and no sink: everything it has to tell is a returned list of outputs.
"""

from __future__ import annotations

import logging
import secrets
import time
from pathlib import Path

import torch

from lorapool_runtime.cgroup import usable_memory_bytes
from lorapool_runtime.engines.interface import (
    BASE_SLOT,
    ConstraintError,
    DecodeProgramState,
    EngineStats,
    FinishReason,
    GenerationRequest,
    HostAdapter,
    LoadOutcome,
    ModelFacts,
    TokenOutput,
)
from lorapool_runtime.engines.torch.config import EngineConfig
from lorapool_runtime.engines.torch.decode_program.load import load_decode_program
from lorapool_runtime.engines.torch.lora.kernel_cpu import load_row_kernel
from lorapool_runtime.engines.torch.lora.slots import Slabs
from lorapool_runtime.engines.torch.lora.way_probe import known_costs
from lorapool_runtime.engines.torch.model.kv_pool import KVPool
from lorapool_runtime.engines.torch.model.load import Base, load_base
from lorapool_runtime.engines.torch.prompt_logprobs import score_prompts
from lorapool_runtime.engines.torch.runner import Runner
from lorapool_runtime.engines.torch.sampling import Sampled, SampleRow, check_params, sample
from lorapool_runtime.engines.torch.scheduling.blocks import BlockAllocator
from lorapool_runtime.engines.torch.scheduling.scheduler import Scheduler, StepPlan
from lorapool_runtime.engines.torch.scheduling.sequence import Sequence
from lorapool_runtime.weights.pack import ALONE, Pace
from lorapool_runtime.weights.reader import AdapterReader, PackedAdapter

log = logging.getLogger(__name__)

_KV_SHARE = 0.4
"""Of the memory left after loading the base, unless `kv_bytes` says otherwise; the rest is for adapters and work."""

_CPU_PREFILL_TOKENS = 128
"""See `EngineConfig.max_prefill_tokens`. A few times a full decode batch: enough rows to read the weights once for all
of them, few enough that a step with them takes a few times a step without."""


_CPU_GATHER_S = 0.004
"""See `EngineConfig.gather_s`. A request takes the server one to two milliseconds before it is here."""


class SlotInUseError(RuntimeError):
    """The slot still has requests; whoever assigns slots must wait for them."""


class Core:
    def __init__(self, config: EngineConfig) -> None:
        device = torch.device(config.device if config.device != "auto" else _best_device())
        self.base: Base = load_base(config.model_dir, dtype=config.dtype, device=device)
        if device.type == "cpu":
            self.base.lora.kernel = load_row_kernel(self.base.dtype, device)
        self.slabs = Slabs(
            self.base.groups,
            slots=config.slots,
            max_rank=config.max_rank,
            dtype=self.base.dtype,
            device=device,
            sharing=self.base.lora.kernel is not None,
        )
        self.base.lora.slabs = self.slabs
        max_model_len = min(config.max_model_len or self.base.max_positions, self.base.max_positions)
        if config.max_model_len and config.max_model_len > max_model_len:
            log.warning("max_model_len %d is cut to the model's own %d", config.max_model_len, max_model_len)
        self.pool = _make_pool(config, self.base, max_model_len)
        self.runner = Runner(self.base, self.pool)
        decode_program: DecodeProgramState | None = None
        with torch.inference_mode():
            if device.type == "cuda":
                self._fit_to_gpu(config.max_batch, max_model_len)
            else:
                self._fit_to_cpu(config)
            self.runner.self_check()
            if device.type == "cpu":
                self.runner.decode_path, decode_program = load_decode_program(
                    self.base, self.pool, max_batch=config.max_batch, max_model_len=max_model_len
                )
        blocks = self.pool.data.shape[2] - 1
        self.scheduler = Scheduler(
            BlockAllocator(blocks, config.kv_block_tokens),
            max_batch=config.max_batch,
            max_batch_tokens=config.max_batch_tokens,
            max_prefill_tokens=config.max_prefill_tokens or _max_prefill_tokens(device, config.max_batch_tokens),
            prefix_cache=config.prefix_cache,
        )
        self.facts = ModelFacts(
            max_model_len=max_model_len,
            vocab_size=self.base.vocab_size,
            dtype=str(self.base.dtype).removeprefix("torch."),
            eos_token_ids=self.base.eos_token_ids,
            targets=tuple(shape for group in self.base.groups for shape in group.shapes()),
            weight_bytes=self.base.weight_bytes,
            decode_program=decode_program,
        )
        self.gather_s = _gather_s(config, device)
        self.reader = AdapterReader(self.base.groups, self.facts.dtype)
        self._sequences: dict[str, Sequence] = {}
        self._salts: list[str | None] = [None] * config.slots
        self._slot_bytes = [0] * config.slots
        self._arrivals = self._preemptions = self._steps = self._prompt_tokens = self._generated_tokens = 0

    def _fit_to_cpu(self, config: EngineConfig) -> None:
        lora = self.base.lora
        lora.costs = known_costs(
            self.base.groups,
            dtype=self.base.dtype,
            device=self.base.device,
            max_rank=config.max_rank,
            kernel=lora.kernel,
            folder=None if config.cache_dir is None else Path(config.cache_dir),
        )

    def _fit_to_gpu(self, max_batch: int, max_model_len: int) -> None:
        from lorapool_runtime.engines.torch.cuda_graphs import (
            CudaCapture,
            DecodeGraphs,
        )  # Triton comes with builds for CUDA only
        from lorapool_runtime.engines.torch.lora.kernel_gpu import TritonKernel

        self.base.lora.kernel = kernel = TritonKernel(self.slabs)
        kernel.warm_up(self.slabs)
        graphs = DecodeGraphs(
            self.base, self.pool, max_batch=max_batch, max_model_len=max_model_len, capture=CudaCapture()
        )
        graphs.capture_all()
        self.runner.decode_path = graphs

    # --- requests ---

    def check(self, request: GenerationRequest) -> None:
        """Called in the caller's thread: reads only what never changes."""
        prompt, params, facts = request.prompt_ids, request.sampling, self.facts
        check_params(params, facts.vocab_size)
        if request.prompt_logprobs is not None and not 0 <= request.prompt_logprobs <= facts.vocab_size:
            raise ValueError(f"prompt_logprobs must be within [0, {facts.vocab_size}], not {request.prompt_logprobs}")
        if not prompt:
            raise ValueError("the prompt has no tokens")
        if len(prompt) + params.max_tokens > facts.max_model_len:
            raise ValueError(
                f"{len(prompt)} prompt tokens and max_tokens {params.max_tokens} exceed "
                f"the model's {facts.max_model_len} tokens"
            )
        if not self.scheduler.could_ever_fit(len(prompt), params.max_tokens):
            raise ValueError(
                f"{len(prompt)} prompt tokens and max_tokens {params.max_tokens} exceed the KV cache "
                f"of {self.scheduler.allocator.total * self.scheduler.allocator.block_size} tokens"
            )
        if min(prompt) < 0 or max(prompt) >= facts.vocab_size:
            raise ValueError(f"the prompt has a token outside [0, {facts.vocab_size - 1}]")
        if not BASE_SLOT <= request.slot < self.slabs.slots:
            raise ValueError(f"there is no slot {request.slot}")

    def add(self, request: GenerationRequest) -> list[TokenOutput]:
        """Queues it; an immediate end if its slot does not hold the weights it is meant for."""
        if request.slot != BASE_SLOT:
            if not self.slabs.occupied(request.slot):
                return [ending(request, 0, FinishReason.ERROR, f"slot {request.slot} holds no adapter")]
            salt = self._salts[request.slot] = self._salts[request.slot] or request.cache_salt
            if salt != request.cache_salt:
                return [ending(request, 0, FinishReason.ERROR, f"slot {request.slot} holds other weights")]
        seed = request.sampling.seed
        sequence = Sequence(request, arrival=self._arrivals, seed=secrets.randbits(64) if seed is None else seed)
        self._arrivals += 1
        self._sequences[request.request_id] = sequence
        self.scheduler.add(sequence)
        return []

    def end(self, request_id: str, reason: FinishReason, message: str | None = None) -> list[TokenOutput]:
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return []
        self.scheduler.finish(sequence, reason)
        return [ending(sequence.request, sequence.generated, reason, message, cached=sequence.cached_tokens)]

    def end_all(self, reason: FinishReason, message: str | None) -> list[TokenOutput]:
        return [output for request_id in list(self._sequences) for output in self.end(request_id, reason, message)]

    # --- one step ---

    def step(self) -> list[TokenOutput]:
        """One turn: decide who computes what, compute it, sample, keep what others may share, and tell."""
        plan = self.scheduler.schedule()
        logits = score_prompts(plan, self.runner.run(plan))
        sampling = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        sampled = sample(logits, [_sample_row(sequence) for sequence in sampling])
        self._count(plan)
        for chunk in plan.chunks:
            chunk.sequence.advance(chunk.num_tokens)
        self._keep_prefixes(plan)
        return [out for sequence, one in zip(sampling, sampled, strict=True) for out in self._settle(sequence, one)]

    def _settle(self, sequence: Sequence, sampled: Sampled) -> list[TokenOutput]:
        """One row's result: a token, and perhaps the end."""
        error = sampled.error if sampled.token_id is None else sequence.fault
        if error is not None:
            return self.end(sequence.request_id, FinishReason.ERROR, error)
        scores = tuple(sequence.prompt_logprobs) if sequence.scores_prompt else None
        stops, reason = False, FinishReason.LENGTH if sequence.request.sampling.max_tokens == 0 else None
        if reason is None and sampled.token_id is not None:
            sequence.append(sampled.token_id)
            self._generated_tokens += 1
            try:
                stops, reason = self._end_of(sequence, sampled.token_id)
            except ConstraintError as refusal:
                return self.end(sequence.request_id, FinishReason.ERROR, str(refusal))
        output = TokenOutput(
            request_id=sequence.request_id,
            token_id=sampled.token_id if sequence.generated else None,
            text_token=bool(sequence.generated) and not stops,
            prompt_tokens=sequence.prompt_tokens,
            completion_tokens=sequence.generated,
            cached_tokens=sequence.cached_tokens,
            finish_reason=reason,
            logprob=sampled.logprob if sequence.generated else None,
            prompt_logprobs=scores,
        )
        if reason is not None:
            del self._sequences[sequence.request_id]
            self.scheduler.finish(sequence, reason)
        return [output]

    def _end_of(self, sequence: Sequence, token_id: int) -> tuple[bool, FinishReason | None]:
        """Whether the token just taken is an end-of-sequence token, and why the sequence ends with it, if it does."""
        request, params = sequence.request, sequence.request.sampling
        if token_id in params.stop_token_ids or (not params.ignore_eos and token_id in self.facts.eos_token_ids):
            return True, FinishReason.STOP
        if request.constraint is not None:
            request.constraint.accept(token_id)
            if request.constraint.complete:
                return False, FinishReason.STOP
        return False, FinishReason.LENGTH if sequence.generated >= params.max_tokens else None

    def _keep_prefixes(self, plan: StepPlan) -> None:
        """Lets others find the blocks this step filled, once their numbers are seen to be finite.

        A row that fails in this very step takes its own out again before anyone looks: see `Scheduler.finish`.
        """
        filled = self.scheduler.completed(plan)
        finite = self.pool.are_finite([block for block, _ in filled])
        for (block, key), good in zip(filled, finite, strict=True):
            if good:
                self.scheduler.allocator.register(block, key)

    def _count(self, plan: StepPlan) -> None:
        self._steps += 1
        self._preemptions += len(plan.preempted)
        fresh = (c.sequence for c in plan.chunks if c.samples and not c.sequence.generated)
        self._prompt_tokens += sum(sequence.prompt_tokens for sequence in fresh)

    # --- slots ---

    def load(self, slot: int, adapter: HostAdapter) -> LoadOutcome:
        """All of it in this thread; `engine` has the filling done elsewhere where it can."""
        self.withdraw(slot)
        return self.publish(slot, adapter, self.fill(slot, adapter))

    def unload(self, slot: int) -> int:
        self.withdraw(slot)
        return self.slabs.release(slot)

    def withdraw(self, slot: int) -> None:
        """From the next step on the slot is empty; then `fill` and `slabs.release` may run in any thread."""
        self._check_free(slot)
        self.slabs.withdraw(slot)
        self._salts[slot] = None
        self._slot_bytes[slot] = 0

    def fill(self, slot: int, adapter: HostAdapter, pace: Pace = ALONE) -> LoadOutcome:
        """Fills a slot that is empty to every request. Any thread where `fills_anywhere`, one at a time."""
        begin = time.monotonic()
        self.slabs.fill(slot, _packed(adapter), pace)
        seconds = time.monotonic() - begin
        return LoadOutcome(slot, self.slabs.resident_bytes(slot), seconds)

    def publish(self, slot: int, adapter: HostAdapter, filled: LoadOutcome) -> LoadOutcome:
        """From the next step on the slot is what was filled in."""
        self._check_free(slot)
        self.slabs.publish(slot, _packed(adapter).layout)
        self._salts[slot] = None
        self._slot_bytes[slot] = filled.device_bytes
        return filled

    @property
    def fills_anywhere(self) -> bool:
        """Whether a slot may be filled outside of the engine thread: on a GPU its stream gives the order."""
        return self.base.device.type == "cpu"

    def _check_free(self, slot: int) -> None:
        if not 0 <= slot < self.slabs.slots:
            raise ValueError(f"there is no slot {slot}")
        if any(sequence.slot == slot for sequence in self._sequences.values()):
            raise SlotInUseError(f"slot {slot} still has requests")

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_blocks_total=self.scheduler.allocator.total,
            kv_blocks_used=self.scheduler.allocator.used,
            slots_total=self.slabs.slots,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            healthy=True,
            device_bytes=self.base.weight_bytes + self.pool.nbytes + sum(self._slot_bytes),
            prefix_queried_tokens=self.scheduler.queried_tokens,
            prefix_hit_tokens=self.scheduler.hit_tokens,
            preemptions=self._preemptions,
        )


def _packed(adapter: HostAdapter) -> PackedAdapter:
    if not isinstance(adapter, PackedAdapter):
        raise TypeError("this engine loads what its own read_adapter returned")
    return adapter


def _make_pool(config: EngineConfig, base: Base, max_model_len: int) -> KVPool:
    layer, size = base.layers[0], config.kv_block_tokens
    block_bytes = KVPool.block_bytes(
        layers=len(base.layers), kv_heads=layer.kv_heads, head_dim=layer.head_dim, block_size=size, dtype=base.dtype
    )
    budget = config.kv_bytes
    if budget is None:
        budget = int(_KV_SHARE * _free_bytes(base.device))
    most = config.max_batch * -(-max_model_len // size)  # more could never be used
    blocks = min(budget // block_bytes - 1, most)
    if blocks < 1:
        raise ValueError(f"kv_bytes {budget} holds no two blocks of {block_bytes} bytes")
    return KVPool(
        layers=len(base.layers),
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        blocks=blocks,
        block_size=size,
        dtype=base.dtype,
        device=base.device,
    )


def _max_prefill_tokens(device: torch.device, max_batch_tokens: int) -> int:
    return max_batch_tokens if device.type == "cuda" else min(_CPU_PREFILL_TOKENS, max_batch_tokens)


def _gather_s(config: EngineConfig, device: torch.device) -> float:
    if config.gather_s is not None:
        return config.gather_s
    return 0.0 if device.type == "cuda" else _CPU_GATHER_S


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else usable_memory_bytes()


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _sample_row(sequence: Sequence) -> SampleRow:
    return SampleRow(
        params=sequence.request.sampling,
        seed=sequence.seed,
        position=sequence.generated,
        prompt_ids=sequence.request.prompt_ids,
        generated_counts=sequence.generated_counts,
        constraint=sequence.request.constraint,
    )


def ending(
    request: GenerationRequest, generated: int, reason: FinishReason, message: str | None, *, cached: int = 0
) -> TokenOutput:
    return TokenOutput(
        request_id=request.request_id,
        token_id=None,
        text_token=False,
        prompt_tokens=len(request.prompt_ids),
        completion_tokens=generated,
        cached_tokens=cached,
        finish_reason=reason,
        error=message,
    )
