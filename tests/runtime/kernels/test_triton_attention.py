"""The GPU's decode attention equals the CPU's: interpreted on a CPU, compiled where there is a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import triton_kit
from engine_kit import greedy, request
from torch import Tensor

from lorapool_runtime.engines.torch.kernels import triton_attention
from lorapool_runtime.engines.torch.kernels.triton_attention import paged_attend, paged_write
from lorapool_runtime.engines.torch.model.attention import LayerAttention, PagedAttention, TritonRows
from lorapool_runtime.engines.torch.model.kv_pool import KVPool
from lorapool_runtime.engines.torch.scheduling.scheduler import Chunk, StepPlan
from lorapool_runtime.engines.torch.scheduling.sequence import Sequence

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, where NaN is multiplied on purpose

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS, DIM, BLOCK, WIDTH = 6, 2, 20, 4, 10
CONTEXTS = [1, 13, 36, 4, 23]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "_PARTS", 2)  # each part is a program, and the interpreter is slow


@dataclass
class World:
    """Rows that decode at several contexts in one pool whose other blocks hold NaN."""

    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        blocks = 4 + sum(-(-c // BLOCK) for c in CONTEXTS)
        self.pool = KVPool(
            layers=2, kv_heads=KV_HEADS, head_dim=DIM, blocks=blocks, block_size=BLOCK, dtype=self.dtype, device=DEVICE
        )
        self.pool.data.copy_(torch.randn(self.pool.data.shape))
        self.pool.data[:, :, 0] = 0
        free = (torch.randperm(blocks) + 1).tolist()
        self.chunks = []
        for number, context in enumerate(CONTEXTS):
            sequence = Sequence(request(str(number), [1] * context, greedy(1)), arrival=number, seed=0)
            sequence.admit([free.pop() for _ in range(-(-context // BLOCK))])
            self.chunks.append(Chunk(sequence, context - 1, 1))
        self.pool.data[:, :, free] = float("nan")
        self.q, self.k, self.v = (
            torch.randn(1, heads, len(CONTEXTS), DIM).to(DEVICE, self.dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )

    def reference(self, wants: LayerAttention, layer: int = 1) -> Tensor:
        """[rows, heads, head_dim]; writes the new keys and values too."""
        paged = PagedAttention(self.pool, StepPlan(tuple(self.chunks), (), (), ()))
        return paged.attend(layer, self.q, self.k, self.v, 0.3, wants)[0]

    def places(self) -> list[int]:
        return [c.sequence.block_table[c.start // BLOCK] * BLOCK + c.start % BLOCK for c in self.chunks]

    def write(self, layer: int = 1, rows: int = len(CONTEXTS)) -> None:
        keys, values = self.pool.rows(layer)
        places = torch.tensor([at if i < rows else -1 for i, at in enumerate(self.places())], dtype=torch.int32)
        paged_write(keys, values, places.to(DEVICE), self.k[0].transpose(0, 1), self.v[0].transpose(0, 1))

    def attend(
        self, *, window: int = 0, softcap: float = 0.0, contexts: list[int] = CONTEXTS, layer: int = 1
    ) -> Tensor:
        keys, values = self.pool.rows(layer)
        tables = torch.zeros(len(contexts), WIDTH, dtype=torch.int32)
        for row, chunk in enumerate(self.chunks):
            table = chunk.sequence.block_table
            tables[row, : len(table)] = torch.tensor(table)
        lengths = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
        q = self.q[0].transpose(0, 1)
        return paged_attend(q, keys, values, tables.to(DEVICE), lengths, BLOCK, 0.3, window, softcap)


@pytest.mark.parametrize(
    ("dtype", "window", "softcap"),
    [
        (torch.float32, 0, 0.0),
        (torch.float32, 7, 0.0),
        (torch.float32, 0, 2.0),
        (torch.float32, 7, 2.0),
        (torch.float16, 7, 2.0),
        (torch.bfloat16, 0, 0.0),
    ],
    ids=str,
)
def test_decode_equals_the_reference(dtype: torch.dtype, window: int, softcap: float) -> None:
    world = World(dtype)
    want = world.reference(LayerAttention(KV_HEADS, DIM, window or None, softcap or None))
    got = world.attend(window=window, softcap=softcap)
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_contexts_cut_into_parts_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "_PARTS", 8)  # most of them empty
    monkeypatch.setattr(triton_attention, "_BLOCK_TOKENS", 16)
    world = World()
    want = world.reference(LayerAttention(KV_HEADS, DIM, None, None))
    torch.testing.assert_close(world.attend(), want, rtol=2e-6, atol=2e-6)


def test_writing_fills_what_the_reference_fills_and_nothing_for_a_padding_row() -> None:
    world, other = World(), World()
    before = other.pool.data.clone()
    world.write()
    other.reference(LayerAttention(KV_HEADS, DIM, None, None))
    assert torch.equal(world.pool.data.nan_to_num(7), other.pool.data.nan_to_num(7))
    third = World()
    third.write(rows=0)
    assert torch.equal(third.pool.data.nan_to_num(7), before.nan_to_num(7))


def test_the_decoding_rows_of_a_mixed_step_equal_the_reference() -> None:
    """What `PagedAttention` takes on a GPU; the step's other rows are a prompt's."""
    world, wants = World(), LayerAttention(KV_HEADS, DIM, 7, 2.0)
    tables = [[*c.sequence.block_table, *[0] * (WIDTH - len(c.sequence.block_table))] for c in world.chunks]
    places = torch.tensor(world.places(), device=DEVICE)
    decode = TritonRows(world.pool, places, tables, [c.start for c in world.chunks])
    longer = [torch.cat([t[0], torch.full_like(t[0], float("nan"))], dim=1) for t in (world.q, world.k, world.v)]
    got = decode.attend(1, *longer, 0.3, wants)
    torch.testing.assert_close(got, world.reference(wants), rtol=2e-6, atol=2e-6)


def test_a_padding_row_reads_nothing_and_gives_zeros() -> None:
    world = World()
    world.write()
    whole = world.attend()
    world.pool.data[:, :, world.chunks[0].sequence.block_table] = float("nan")
    got = world.attend(contexts=[0, *CONTEXTS[1:]])
    assert float(got[0].abs().max()) == 0
    assert torch.equal(got[1:], whole[1:])


def test_what_is_not_finite_in_one_context_reaches_no_other_row() -> None:
    world = World()
    world.write()
    clean = world.attend()
    for side in (0, 1):
        keys_or_values = world.pool.data[side, 1]
        sick = world.chunks[2].sequence.block_table[3]
        kept = keys_or_values[sick].clone()
        keys_or_values[sick] = float("nan")
        got = world.attend()
        assert bool(got[2].isnan().all())
        assert torch.equal(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
        keys_or_values[sick] = kept


def test_the_launch_is_the_same_whatever_the_contexts_are() -> None:
    world, launched = World(), []
    for contexts in (CONTEXTS, [0] * 5, [40] * 5):
        with triton_kit.recorded(triton_attention) as launches:
            world.write()
            world.attend(contexts=contexts, window=7)
        launched.append(launches.shapes())
    assert launched[0] == launched[1] == launched[2]
    assert [launch[0] for launch in launched[0]] == ["_write", "_attend", "_join"]


@pytest.mark.parametrize("heads", [(8, 8), (8, 1), (3, 1)], ids=str)
def test_any_number_of_query_heads_may_share_a_key_head(heads: tuple[int, int]) -> None:
    query_heads, key_heads = heads
    keys, values = torch.randn(16, key_heads, 16, device=DEVICE), torch.randn(16, key_heads, 16, device=DEVICE)
    q = torch.randn(1, query_heads, 16, device=DEVICE)
    tables = torch.tensor([[2, 1, 0]], dtype=torch.int32, device=DEVICE)
    got = paged_attend(q, keys, values, tables, torch.tensor([6], dtype=torch.int32, device=DEVICE), 4, 0.25, 0, 0.0)
    places = [8, 9, 10, 11, 4, 5]
    k, v = (t[places].repeat_interleave(query_heads // key_heads, 1).transpose(0, 1) for t in (keys, values))
    want = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, scale=0.25).transpose(0, 1)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
