"""The state of the engine thread: the base, the KV cache, the adapter slots and the requests.

Only the engine thread may use it, except for the methods that say otherwise. It knows no queue, no lock and no sink:
every method returns the outputs it produced.
"""

from __future__ import annotations

import logging
import secrets
import time

import torch

from lorapool_api.base_modules import ModuleKind
from lorapool_artifacts.checks.base_facts import BaseFacts
from lorapool_runtime.engines.errors import EngineStartError
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
    SlotInUseError,
    TokenConstraint,
    TokenOutput,
    ending,
)
from lorapool_runtime.engines.request_check import check_request
from lorapool_runtime.engines.torch.config import EngineConfig
from lorapool_runtime.engines.torch.decode_program.load import load_decode_program
from lorapool_runtime.engines.torch.device import choose_device
from lorapool_runtime.engines.torch.kernels.triton_driver import load_triton_driver
from lorapool_runtime.engines.torch.kv_budget import kv_bytes
from lorapool_runtime.engines.torch.lora.kernel_cpu import load_row_kernel
from lorapool_runtime.engines.torch.lora.slot_state import WrongWeightsError
from lorapool_runtime.engines.torch.lora.slots import AdapterSlots
from lorapool_runtime.engines.torch.min_tokens import MinTokens
from lorapool_runtime.engines.torch.model.kv_pool import KVPool
from lorapool_runtime.engines.torch.model.load import Base, load_base, refusing
from lorapool_runtime.engines.torch.prompt_logprobs import score_prompts
from lorapool_runtime.engines.torch.runner import Runner
from lorapool_runtime.engines.torch.sampling import LogitShaper, Sampled, SampleRow, launch
from lorapool_runtime.engines.torch.scheduling.blocks import BlockAllocator
from lorapool_runtime.engines.torch.scheduling.scheduler import Scheduler, StepPlan
from lorapool_runtime.engines.torch.scheduling.sequence import Sequence
from lorapool_runtime.engines.torch.transfers import fetch
from lorapool_runtime.weights.reader import AdapterReader, PackedAdapter

log = logging.getLogger(__name__)

_CPU_PREFILL_TOKENS = 128
"""See `EngineConfig.max_prefill_tokens`. A few times a full decode batch: enough rows to share one read of the weights,
few enough that a step with a prefill takes only a few times as long as a step without."""

_CPU_BATCHING_WINDOW_S = 0.004
"""See `EngineConfig.batching_window_s`. The server needs one to two milliseconds to hand a request to the engine."""


class Core:
    def __init__(self, config: EngineConfig) -> None:
        device = choose_device(config.device)
        if device.type == "cuda":
            load_triton_driver()
        self.base: Base = load_base(config.model_dir, dtype=config.dtype, device=device)
        if device.type == "cpu":
            self.base.lora.kernel = load_row_kernel(self.base.dtype, device)
        self.slots = self.base.lora.slots = AdapterSlots(
            self.base.groups,
            slots=config.slots,
            max_rank=config.max_rank,
            dtype=self.base.dtype,
            device=device,
            in_host_memory=device.type == "cpu",
        )
        max_model_len = min(config.max_model_len or self.base.max_positions, self.base.max_positions)
        if config.max_model_len and config.max_model_len > max_model_len:
            log.warning("max_model_len %d exceeds the model's limit: using %d", config.max_model_len, max_model_len)
        self.pool = _make_pool(config, self.base, max_model_len)
        self.runner = Runner(self.base, self.pool)
        decode_program: DecodeProgramState | None = None
        with torch.inference_mode():
            with refusing():
                self.runner.self_check()
            if device.type == "cuda":
                decode_program = self._prepare_gpu(config.max_batch, max_model_len)
            else:
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
            targets=tuple(
                shape for group in self.base.groups if group.kind is ModuleKind.LINEAR for shape in group.shapes()
            ),
            modules=self.base.modules,
            weight_bytes=self.base.weight_bytes,
            decode_program=decode_program,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            slot_bytes=self.slots.nbytes,
        )
        self.batching_window_s = _batching_window_s(config, device)
        self._weights = config.step_weights
        self._slot_ranks: dict[int, int] = {}
        self.reader = AdapterReader(
            self.base.groups, self.facts.dtype, BaseFacts.of(self.base.modules), self.base.originals
        )
        self.step_weights: tuple[list[str], list[int]] = ([], [])
        """The requests of the last step, and the weight of each in its time."""
        self._sequences: dict[str, Sequence] = {}
        self._shapers: dict[str, LogitShaper] = {}
        self._arrivals = self._preemptions = self._steps = self._prompt_tokens = self._generated_tokens = 0

    def _prepare_gpu(self, max_batch: int, max_model_len: int) -> DecodeProgramState:
        # imported here because only torch's builds for CUDA install Triton
        from lorapool_runtime.engines.torch.cuda_graphs import CudaCapture
        from lorapool_runtime.engines.torch.gpu_start import load_graphs, load_kernels

        load_kernels(self.runner, self.slots)
        self.runner.decode_path, state = load_graphs(
            self.runner, self.slots, max_batch=max_batch, max_model_len=max_model_len, capture=CudaCapture()
        )
        if not state.active:
            self.runner.self_check()  # whatever failed may have left the device unusable
        return state

    # --- requests ---

    def check(self, request: GenerationRequest) -> None:
        """Raises ValueError for a request that can never run. Any thread: it reads only what never changes."""
        check_request(request, self.facts, slots=self.slots.count)
        prompt, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
        if not self.scheduler.could_ever_fit(prompt, max_tokens):
            blocks = self.scheduler.allocator
            raise ValueError(
                f"{prompt} prompt tokens and max_tokens {max_tokens} exceed the KV cache "
                f"of {blocks.total * blocks.block_size} tokens"
            )

    def constraint_of(self, request: GenerationRequest) -> TokenConstraint | None:
        """A new constraint for its sequence; None if it may generate any token. Any thread."""
        params = request.sampling
        if request.grammar is not None:
            return request.grammar.constraint(params.stop_token_ids)
        ends = params.stop_token_ids | (frozenset() if params.ignore_eos else self.facts.eos_token_ids)
        return MinTokens(params.min_tokens, ends, self.facts.vocab_size) if params.min_tokens and ends else None

    def add(self, request: GenerationRequest, constraint: TokenConstraint | None = None) -> list[TokenOutput]:
        """Queues the request. Returns its end at once where its slot does not hold the weights it is meant for."""
        if request.slot != BASE_SLOT:
            try:
                self.slots.claim(request.slot, request.cache_salt)
            except WrongWeightsError as refusal:
                return [ending(request, 0, FinishReason.ERROR, str(refusal))]
        seed = request.sampling.seed
        sequence = Sequence(
            request,
            arrival=self._arrivals,
            seed=secrets.randbits(64) if seed is None else seed,
            constraint=constraint,
        )
        self._arrivals += 1
        self._sequences[request.request_id] = sequence
        if LogitShaper.needed(request.sampling):
            self._shapers[request.request_id] = LogitShaper(request.sampling)
        self.scheduler.add(sequence)
        return []

    def end(self, request_id: str, reason: FinishReason, message: str | None = None) -> list[TokenOutput]:
        sequence = self._forget(request_id)
        if sequence is None:
            return []
        self.scheduler.finish(sequence, reason)
        return [ending(sequence.request, sequence.generated, reason, message, cached=sequence.cached_tokens)]

    def _forget(self, request_id: str) -> Sequence | None:
        self._shapers.pop(request_id, None)
        return self._sequences.pop(request_id, None)

    def end_all(self, reason: FinishReason, message: str | None) -> list[TokenOutput]:
        return [output for request_id in list(self._sequences) for output in self.end(request_id, reason, message)]

    # --- one step ---

    def step(self) -> list[TokenOutput]:
        """Computes one step: schedules it, runs the model, samples, registers shareable blocks, returns the outputs."""
        plan = self.scheduler.schedule()
        self.step_weights = self._weigh(plan)
        began_s = time.perf_counter()
        logits = score_prompts(plan, self.runner.run(plan))
        sampling = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        launched = launch(logits, [self._sample_row(sequence) for sequence in sampling])
        filled = self.scheduler.completed(plan)
        *sampled, finite = fetch([*launched.tensors, self.pool.are_finite([block for block, _ in filled])])
        self.scheduler.took(plan, time.perf_counter() - began_s)
        self._count(plan)
        for chunk in plan.chunks:
            chunk.sequence.advance(chunk.num_tokens)
        self._register_prefixes(filled, finite)
        results = zip(sampling, launched.results(sampled), strict=True)
        return [output for sequence, one in results for output in self._settle(sequence, one)]

    def _weigh(self, plan: StepPlan) -> tuple[list[str], list[int]]:
        weights, ranks = self._weights, self._slot_ranks
        decodes = [weights.of_decode(c.start, ranks.get(c.sequence.slot, 0)) for c in plan.decodes]
        prefills = [weights.of_prefill(c.num_tokens, c.start, ranks.get(c.sequence.slot, 0)) for c in plan.prefills]
        return [chunk.sequence.request_id for chunk in plan.chunks], decodes + prefills

    def _sample_row(self, sequence: Sequence) -> SampleRow:
        return SampleRow(
            params=sequence.request.sampling,
            seed=sequence.seed,
            position=sequence.generated,
            tokens=sequence.tokens,
            prompt_tokens=sequence.prompt_tokens,
            shaper=self._shapers.get(sequence.request_id),
            constraint=sequence.constraint,
        )

    def _settle(self, sequence: Sequence, sampled: Sampled) -> list[TokenOutput]:
        """The output of one row: a token, or the end of its sequence, or both."""
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
            self._forget(sequence.request_id)
            self.scheduler.finish(sequence, reason)
        return [output]

    def _end_of(self, sequence: Sequence, token_id: int) -> tuple[bool, FinishReason | None]:
        """Whether the token just appended is an end-of-sequence token, and the reason to finish with it, if any."""
        params = sequence.request.sampling
        if token_id in params.stop_token_ids or (not params.ignore_eos and token_id in self.facts.eos_token_ids):
            return True, FinishReason.STOP
        if sequence.constraint is not None:
            sequence.constraint.accept(token_id)
            if sequence.constraint.complete:
                return False, FinishReason.STOP
        return False, FinishReason.LENGTH if sequence.generated >= params.max_tokens else None

    def _register_prefixes(self, filled: list[tuple[int, bytes]], finite: list[bool]) -> None:
        """Registers the blocks that this step filled in the prefix cache, if all their values are finite.

        A sequence that fails in this step takes its own out again before the next lookup: see `Scheduler.finish`.
        """
        for (block, key), is_finite in zip(filled, finite, strict=True):
            if is_finite:
                self.scheduler.allocator.register(block, key)

    def _count(self, plan: StepPlan) -> None:
        self._steps += 1
        self._preemptions += len(plan.preempted)
        fresh = (c.sequence for c in plan.chunks if c.samples and not c.sequence.generated)
        self._prompt_tokens += sum(sequence.prompt_tokens for sequence in fresh)

    # --- slots ---

    def load(self, slot: int, adapter: HostAdapter) -> LoadOutcome:
        """Withdraws, fills and publishes the slot, all in the engine thread."""
        self.withdraw(slot)
        return self.publish(self.fill(slot, adapter))

    def unload(self, slot: int) -> int:
        self.withdraw(slot)
        return self.slots.release(slot)

    def withdraw(self, slot: int) -> None:
        """Hides the slot from the next step on, so that any thread may call `fill` or `slots.release`."""
        self._require_unused(slot)
        self.slots.withdraw(slot)

    def fill(self, slot: int, adapter: HostAdapter) -> LoadOutcome:
        """Fills a slot that is not published. Any thread, one at a time."""
        began_s = time.monotonic()
        device_bytes = self.slots.fill(slot, _packed(adapter))
        self._slot_ranks[slot] = adapter.rank
        return LoadOutcome(slot, device_bytes, time.monotonic() - began_s)

    def publish(self, filled: LoadOutcome) -> LoadOutcome:
        """Makes the filled slot visible from the next step on."""
        self._require_unused(filled.slot)
        self.slots.publish(filled.slot)
        return filled

    def _require_unused(self, slot: int) -> None:
        if not 0 <= slot < self.slots.count:
            raise ValueError(f"there is no slot {slot}")
        if any(sequence.slot == slot for sequence in self._sequences.values()):
            raise SlotInUseError(f"slot {slot} still has requests")

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_blocks_total=self.scheduler.allocator.total,
            kv_blocks_used=self.scheduler.allocator.used,
            slots_total=self.slots.count,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            healthy=True,
            device_bytes=self.base.weight_bytes + self.pool.nbytes + self.slots.published_bytes,
            prefix_queried_tokens=self.scheduler.queried_tokens,
            prefix_hit_tokens=self.scheduler.hit_tokens,
            preemptions=self._preemptions,
        )


def _packed(adapter: HostAdapter) -> PackedAdapter:
    if not isinstance(adapter, PackedAdapter):
        raise TypeError("load takes only what read_adapter of this engine returned")
    return adapter


def _make_pool(config: EngineConfig, base: Base, max_model_len: int) -> KVPool:
    layer, size = base.layers[0], config.kv_block_tokens
    block_bytes = KVPool.block_bytes(
        layers=len(base.layers), kv_heads=layer.kv_heads, head_dim=layer.head_dim, block_size=size, dtype=base.dtype
    )
    budget = kv_bytes(config, base, max_model_len)
    most = config.max_batch * -(-max_model_len // size)  # more blocks could never be used
    blocks = min(budget // block_bytes - 1, most)
    if blocks < 1:
        raise EngineStartError(
            f"the KV cache of {budget} bytes does not hold two blocks of {block_bytes} bytes: give the pod more "
            "memory (or a larger GPU), or lower slots, max_rank, max_model_len or max_batch_tokens"
        )
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


def _batching_window_s(config: EngineConfig, device: torch.device) -> float:
    if config.batching_window_s is not None:
        return config.batching_window_s
    return 0.0 if device.type == "cuda" else _CPU_BATCHING_WINDOW_S
