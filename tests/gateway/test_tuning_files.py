"""`/v1/files` with the unmodified client and a store of its own process: uploads are whole, private and deletable."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator

import openai
import pytest
from gateway_world import KEY
from store_kit import StoreProcess, running_store
from tuning_world import CHAT_KEY, A, B, TuningWorld, tuning_world

from lorapool_api.openai import InvalidRequestError
from lorapool_gateway.routing.auth import ApiKey
from lorapool_gateway.tuning import upload
from lorapool_gateway.tuning.organization import caller_of
from lorapool_gateway.tuning.upload import shown_name

DATA = b'{"messages": []}\n' * 1000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    with running_store(tmp_path_factory.mktemp("store")) as made:
        yield made


@pytest.fixture(autouse=True)
def empty(store: StoreProcess) -> None:
    for namespace in (A, B):
        store.call("DELETE", f"{namespace}/")


async def test_a_file_is_uploaded_listed_read_and_deleted_with_its_bytes(store: StoreProcess) -> None:
    async with tuning_world(store) as here, here.client() as client:
        made = await client.files.create(file=("train.jsonl", DATA), purpose="fine-tune")
        assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(DATA), "train.jsonl", "fine-tune")
        assert (made.status, made.expires_at) == ("processed", None)
        assert abs(made.created_at - time.time()) < 60
        assert await client.files.retrieve(made.id) == made
        assert (await client.files.content(made.id)).content == DATA
        assert [item.id async for item in client.files.list(purpose="fine-tune")] == [made.id]
        assert [item.id async for item in client.files.list(purpose="batch")] == []
        assert store.call("GET", f"{A}/files/{made.id}").content == DATA
        deleted = await client.files.delete(made.id)
        assert (deleted.id, deleted.deleted) == (made.id, True)
        assert store.keys(A) == []
        assert not [name for name in store.files() if name.startswith(f"{A}/")]
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(made.id)


async def test_pages_of_files_end_and_their_order_is_stable(store: StoreProcess) -> None:
    async with tuning_world(store) as here, here.client() as client:
        ids = {await here.upload() for _ in range(5)}
        newest_first = [item.id async for item in client.files.list(limit=2)]
        assert (set(newest_first), len(newest_first)) == (ids, 5)
        assert [item.id async for item in client.files.list(limit=2, order="asc")] == newest_first[::-1]
        with pytest.raises(openai.BadRequestError) as caught:
            await client.files.list(limit=10_001)
        assert caught.value.param == "limit"


async def test_a_file_that_expires_says_when_and_the_store_deletes_it_by_itself(store: StoreProcess) -> None:
    async with tuning_world(store) as here, here.client() as client:
        after = {"anchor": "created_at", "seconds": 3600}
        made = await client.files.create(file=("a", b"1"), purpose="fine-tune", expires_after=after)  # type: ignore[arg-type]
        assert made.expires_at == made.created_at + 3600
        marks = [name for name in store.files() if name.startswith(f"_expiry/{made.expires_at:012d}/{A}/")]
        assert len(marks) == 2
        for seconds in (3599, 2_592_001):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.files.create(
                    file=("a", b"1"), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": seconds}
                )
            assert caught.value.param == "expires_after[seconds]"


async def test_a_key_without_the_right_uploads_reads_and_deletes_nothing(store: StoreProcess) -> None:
    async with tuning_world(store) as here:
        mine = await here.upload(DATA)
        for method, path in (
            ("GET", "/v1/files"),
            ("POST", "/v1/files"),
            ("DELETE", f"/v1/files/{mine}"),
            ("POST", "/v1/fine_tuning/jobs"),
            ("DELETE", "/v1/models/models/tiny"),
        ):
            answer = await here.call(method, path, CHAT_KEY)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "permission_denied")
        assert (await here.call("GET", "/v1/models", CHAT_KEY)).status_code == 200


async def test_a_key_of_several_namespaces_names_one_as_its_organization(store: StoreProcess) -> None:
    async with tuning_world(store) as here:
        for organization, status in ((A, 200), ("models", 200), (B, 400), ("nothing", 400), (f"{A}/../{B}", 400)):
            answer = await here.call("GET", "/v1/files", headers={"OpenAI-Organization": organization})
            assert answer.status_code == status, organization


@pytest.mark.parametrize(
    ("files", "data", "param"),
    [
        ({"file": ("a", b"1")}, {}, "purpose"),
        ({"file": ("a", b"1")}, {"purpose": "assistants"}, "purpose"),
        ({"other": ("a", b"1")}, {"purpose": "fine-tune"}, "file"),
        ({"file": ("a", b"1")}, {"purpose": "x" * 2000}, "purpose"),
    ],
)
async def test_an_upload_that_lacks_something_leaves_nothing(
    store: StoreProcess, files: dict[str, tuple[str, bytes]], data: dict[str, str], param: str
) -> None:
    async with tuning_world(store) as here:
        answer = await here.call("POST", "/v1/files", files=files, data=data)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert store.keys(A) == []


@pytest.mark.parametrize(
    "head",
    [
        b'Content-Disposition: form-data; name="a\x0bb"',
        b"Content-Disposition",
        b"X: " + b"x" * 10_000,
        b"X: x\r\n" * 200,
        b'Content-Disposition: form-data; name="_charset_"\r\n\r\n' + b"x" * 40,
        b'Content-Disposition: form-data; name="_charset_"\r\n\r\n\xff',
        b"Content-Type: multipart/mixed; boundary=" + b"b" * 100,
    ],
)
async def test_an_upload_whose_part_is_malformed_is_a_bad_request(store: StoreProcess, head: bytes) -> None:
    async with tuning_world(store) as here:
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        body = b"--b\r\n" + head + b"\r\n\r\nfine-tune\r\n--b--\r\n"
        answer = await here.call("POST", "/v1/files", content=body, headers=kind)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_body"), answer.json()
        assert store.keys(A) == []


async def test_a_path_in_a_file_name_is_only_shown_without_its_folders(store: StoreProcess) -> None:
    async with tuning_world(store) as here, here.client() as client:
        made = await client.files.create(file=("../../etc/passwd", DATA), purpose="fine-tune")
        assert made.filename == "passwd"
        assert store.keys(A) == [f"file-info/{made.id}.json", f"files/{made.id}"]


@pytest.mark.parametrize(
    ("name", "shown"), [("a/b\\c.jsonl", "c.jsonl"), ("..", "file"), ("a\r\nb\0", "ab"), ("x" * 300, "x" * 255)]
)
def test_a_shown_name_has_no_path_and_nothing_that_cannot_be_printed(name: str, shown: str) -> None:
    assert shown_name(name) == shown


# --- uploads that go wrong


def head_of(here: TuningWorld, length: int) -> bytes:
    """The head of an upload and its body up to the first byte of the file."""
    part = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    part += b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    lines = ("POST /v1/files HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", f"Content-Length: {length}")
    return "\r\n".join([*lines, "Content-Type: multipart/form-data; boundary=b", "", ""]).encode() + part


async def connect(here: TuningWorld) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", int(here.world.url.rsplit(":", 1)[1]))


async def until_files(store: StoreProcess, count: int) -> None:
    await asyncio.to_thread(store.until_files, count)


async def test_an_upload_that_is_cut_off_leaves_nothing(store: StoreProcess) -> None:
    async with tuning_world(store) as here:
        before = len(store.files())
        _, writer = await connect(here)
        writer.write(head_of(here, 20_000_000) + b"x" * 12_000_000)
        await writer.drain()
        await until_files(store, before + 1)
        writer.close()
        await writer.wait_closed()
        await until_files(store, before)
        assert store.keys(A) == []


async def test_an_upload_that_stops_arriving_is_ended_with_408(store: StoreProcess) -> None:
    async with tuning_world(store, body_timeout_s=0.3) as here:
        reader, writer = await connect(here)
        writer.write(head_of(here, 20_000_000) + b"x" * 1000)
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
        writer.close()
        assert store.keys(A) == []


async def test_an_upload_that_drips_is_ended_with_408_however_often_it_sends(store: StoreProcess) -> None:
    async with tuning_world(store, upload_timeout_s=0.5) as here:
        reader, writer = await connect(here)
        writer.write(head_of(here, 20_000_000))

        async def drip() -> None:
            while True:
                writer.write(b"x")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
        dripping.cancel()
        writer.close()
        assert store.keys(A) == []


async def test_a_file_that_is_too_large_is_refused_by_its_length_and_while_it_arrives(
    store: StoreProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tuning_world(store) as here:
        reader, writer = await connect(here)
        writer.write(head_of(here, 2**30))
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
        writer.close()
        monkeypatch.setattr(upload, "MAX_FILE_BYTES", 1000)
        monkeypatch.setattr(upload, "OVERHEAD_BYTES", 1_000_000)
        answer = await here.call("POST", "/v1/files", files={"file": ("a", b"x" * 1001)}, data={"purpose": "fine-tune"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")
        assert store.keys(A) == []


async def test_a_file_far_above_the_limit_of_bodies_passes_without_being_held(store: StoreProcess) -> None:
    data = bytes(range(256)) * 4096 * 12  # 12 MiB
    async with tuning_world(
        store, max_body_bytes=2**20, max_held_body_bytes=2**20, max_held_body_bytes_per_key=2**20
    ) as here:
        file_id = await here.upload(data)
        assert (
            hashlib.sha256(store.call("GET", f"{A}/files/{file_id}").content).digest() == hashlib.sha256(data).digest()
        )


async def test_without_a_store_that_answers_a_call_is_503_and_may_be_repeated(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with running_store(tmp_path_factory.mktemp("store")) as store:
        async with tuning_world(store) as here:
            store.stop()
            for method, path in (("GET", "/v1/files"), ("GET", "/v1/files/file-" + "x" * 24)):
                answer = await here.call(method, path)
                assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")


@pytest.mark.parametrize("organization", ["a/../b", "..", "A", "a?b", "a%2Fb", "x" * 64, "a\n"])
def test_a_key_of_all_namespaces_names_one_that_could_exist(organization: str) -> None:
    key = ApiKey("admin", "0" * 64, None, fine_tuning=True)
    assert caller_of(key, "team-a").namespace == "team-a"
    with pytest.raises(InvalidRequestError, match="does not exist"):
        caller_of(key, organization)
