"""The store's process on loopback: objects are written whole or not at all, bounded, private, and gone when deleted."""

from __future__ import annotations

import hashlib
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from authority_kit import authority, serve_with
from store_kit import EVERYTHING, MASTER, StoreProcess, running_store

from lorapool_api.store_protocol import STORE_SERVER_NAME, StoreGrant, mint

DATA = bytes(range(256)) * 40_000  # 10 MB: three parts


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    with running_store(tmp_path_factory.mktemp("store")) as made:
        yield made


def error_of(response: requests.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_an_object_is_read_back_whole_in_parts_and_by_its_head(store: StoreProcess) -> None:
    put = store.call("PUT", "team-a/files/one", DATA)
    assert (put.status_code, put.json()["size"]) == (201, len(DATA))
    assert put.json()["sha256"] == hashlib.sha256(DATA).hexdigest()
    got = store.call("GET", "team-a/files/one")
    assert got.content == DATA
    assert got.headers["ETag"] == put.json()["etag"]
    part = store.call("GET", "team-a/files/one", Range="bytes=255-1000")
    assert (part.status_code, part.content) == (206, DATA[255:1001])
    assert part.headers["Content-Range"] == f"bytes 255-1000/{len(DATA)}"
    assert store.call("GET", "team-a/files/one", Range="bytes=10239990-").content == DATA[10239990:]
    head = store.call("HEAD", "team-a/files/one")
    assert (head.headers["Content-Length"], head.content) == (str(len(DATA)), b"")
    assert error_of(store.call("GET", "team-a/files/one", Range="bytes=99999999-")) == (416, "range_not_satisfiable")


def test_an_object_of_no_bytes_is_an_object(store: StoreProcess) -> None:
    store.call("PUT", "team-a/empty", b"")
    got = store.call("GET", "team-a/empty")
    assert (got.status_code, got.content) == (200, b"")


def test_what_does_not_exist_is_not_found_and_may_be_deleted(store: StoreProcess) -> None:
    assert error_of(store.call("GET", "team-a/nothing")) == (404, "object_not_found")
    assert store.call("HEAD", "team-a/nothing").status_code == 404
    assert store.call("DELETE", "team-a/nothing").status_code == 204


def test_a_writer_may_ask_for_a_new_object_and_a_reader_for_the_same_one(store: StoreProcess) -> None:
    first = store.call("PUT", "team-a/once", b"1", If_None_Match="*").json()
    assert error_of(store.call("PUT", "team-a/once", b"2", If_None_Match="*")) == (412, "object_exists")
    assert store.call("GET", "team-a/once", If_Match=first["etag"]).content == b"1"
    store.call("PUT", "team-a/once", b"22")
    assert error_of(store.call("GET", "team-a/once", If_Match=first["etag"])) == (412, "object_exists")


def test_a_listing_has_pages_and_only_what_is_below_its_prefix(store: StoreProcess) -> None:
    for name in ("b", "a", "c"):
        store.call("PUT", f"lists/jobs/{name}/state", b"x")
    store.call("PUT", "lists/jobs2", b"x")
    assert store.keys("lists", "jobs/") == ["jobs/a/state", "jobs/b/state", "jobs/c/state"]
    assert store.keys("lists") == ["jobs/a/state", "jobs/b/state", "jobs/c/state", "jobs2"]
    url = f"{store.url}/v1/objects/lists/jobs/?limit=2&after=jobs/a/state"
    page = requests.get(url, headers={"Authorization": f"Bearer {mint(MASTER, EVERYTHING)}"}, timeout=20).json()
    assert ([item["key"] for item in page["objects"]], page["hasMore"]) == (["jobs/b/state", "jobs/c/state"], False)


def test_what_is_deleted_is_gone_from_the_listing_and_from_the_disk(store: StoreProcess) -> None:
    before = store.files()
    for name in ("gone/x/1", "gone/x/2/3", "gone/y"):
        store.call("PUT", name, b"private")
    assert store.call("DELETE", "gone/x/").status_code == 204
    assert store.keys("gone") == ["y"]
    assert store.call("DELETE", "gone/y").status_code == 204
    assert store.keys("gone") == []
    assert store.files() == before


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "team-a/../../etc/passwd",
        "team-a/.hidden",
        "team-a/a//b",
        "Team/a",
        "_expiry/1",
        "team-a/a%00b",
        "a" * 64 + "/x",
    ],
)
def test_a_name_that_is_none_is_refused(store: StoreProcess, path: str) -> None:
    connection = socket.create_connection((store.url.split(":")[1][2:], int(store.url.rsplit(":", 1)[1])))
    with connection:
        token = mint(MASTER, EVERYTHING)
        head = (
            f"PUT /v1/objects/{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 1\r\n\r\nx"
        )
        connection.sendall(head.encode())
        answer = connection.recv(65536).decode()
    assert answer.startswith("HTTP/1.1 400 ")
    assert not any("passwd" in name or name.startswith("_expiry/1") for name in store.files())


# --- who may do what


@pytest.mark.parametrize(
    ("grant", "method", "name", "status"),
    [
        (StoreGrant(read=("team-a/",)), "GET", "team-a/files/one", 200),
        (StoreGrant(read=("team-a/",)), "PUT", "team-a/files/two", 403),
        (StoreGrant(read=("team-a/",)), "DELETE", "team-a/files/one", 403),
        (StoreGrant(read=("team-a/",)), "GET", "team-b/files/one", 403),
        (StoreGrant(read=("team-a/",)), "GET", "team-ab/files/one", 403),
        (StoreGrant(read=("team-a/files/one",)), "GET", "team-a/files/one", 200),
        (StoreGrant(read=("team-a/files/one",)), "GET", "team-a/files/onerous", 403),
        (StoreGrant(read=("team-a/files/one",)), "GET", "team-a/files/", 403),
        (StoreGrant(write=("team-a/jobs/7/",)), "PUT", "team-a/jobs/7/state", 201),
        (StoreGrant(write=("team-a/jobs/7/",)), "GET", "team-a/jobs/7/", 200),
        (StoreGrant(write=("team-a/jobs/7/",)), "DELETE", "team-a/", 403),
        (StoreGrant(), "GET", "team-a/files/one", 403),
        (StoreGrant(write=("",), expires_unix_s=1), "GET", "team-a/files/one", 401),
        (mint("x" * 64, EVERYTHING), "GET", "team-a/files/one", 401),
        (mint(MASTER, EVERYTHING)[:-1], "GET", "team-a/files/one", 401),
        ("lps1..", "GET", "team-a/files/one", 401),
        ("", "GET", "team-a/files/one", 401),
    ],
)
def test_a_token_covers_what_its_grant_names(
    store: StoreProcess, grant: StoreGrant | str, method: str, name: str, status: int
) -> None:
    store.call("PUT", "team-a/files/one", b"1")
    assert store.call(method, name, b"" if method == "PUT" else None, grant=grant).status_code == status


def test_a_previous_master_token_stays_valid_during_a_rotation(tmp_path: Path) -> None:
    with running_store(tmp_path) as store:
        store.stop()
        store.start()
        (tmp_path / "token").write_text(f"{'n' * 64}\n{MASTER}\n")
        new = mint("n" * 64, EVERYTHING)
        end = time.monotonic() + 20
        while store.call("GET", "team-a/", grant=new).status_code != 200:
            assert time.monotonic() < end
        assert store.call("GET", "team-a/", grant=mint(MASTER, EVERYTHING)).status_code == 200


# --- uploads that go wrong


def cut_upload(store: StoreProcess, name: str, sent: bytes) -> socket.socket:
    """Begins an upload of 20 MB and returns its connection after `sent`."""
    connection = socket.create_connection(("127.0.0.1", int(store.url.rsplit(":", 1)[1])))
    token = mint(MASTER, EVERYTHING)
    lines = (
        f"PUT /v1/objects/{name} HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {token}",
        "Content-Length: 20000000",
    )
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + sent)
    return connection


def test_an_upload_that_is_cut_off_leaves_nothing(tmp_path: Path) -> None:
    with running_store(tmp_path) as store:
        connection = cut_upload(store, "team-a/files/cut", DATA)
        store.until_files(1)
        assert store.keys("team-a") == []
        connection.close()
        store.until_files(0)
        assert store.call("GET", "team-a/files/cut").status_code == 404
        usage = requests.get(
            f"{store.url}/v1/usage/team-a", headers={"Authorization": f"Bearer {mint(MASTER, EVERYTHING)}"}, timeout=20
        )
        assert usage.json()["bytes"] == 0


def test_a_killed_store_leaves_no_half_written_file(tmp_path: Path) -> None:
    with running_store(tmp_path) as store:
        store.call("PUT", "team-a/kept", b"1")
        connection = cut_upload(store, "team-a/files/cut", DATA)
        store.until_files(2)
        store.stop(signal.SIGKILL)
        connection.close()
        assert any("#" in name for name in store.files())
        store.start()
        assert store.files() == ["team-a/kept"]


def test_an_upload_that_stops_arriving_is_given_up(tmp_path: Path) -> None:
    with running_store(tmp_path, body_timeout_s="0.3") as store:
        connection = cut_upload(store, "team-a/slow", b"x")
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")
        connection.close()
        assert store.files() == []


def test_objects_and_namespaces_are_bounded(tmp_path: Path) -> None:
    with running_store(tmp_path, max_object_bytes="2000", quota_bytes="3000") as store:
        assert error_of(store.call("PUT", "team-a/big", b"x" * 2001)) == (413, "object_too_large")
        store.call("PUT", "team-a/1", b"x" * 2000)
        assert error_of(store.call("PUT", "team-a/2", b"x" * 1001)) == (507, "quota_exceeded")
        assert store.call("PUT", "team-b/2", b"x" * 1001).status_code == 201
        assert store.call("PUT", "team-a/1", b"x" * 500).status_code == 201  # the old object's bytes are given back
        assert store.call("PUT", "team-a/2", b"x" * 1900).status_code == 201
        store.call("DELETE", "team-a/2")
        assert store.call("PUT", "team-a/3", b"x" * 1900).status_code == 201
        store.stop()
        store.start()
        assert error_of(store.call("PUT", "team-a/4", b"x" * 1000)) == (507, "quota_exceeded")


def test_what_has_expired_is_deleted_also_after_a_restart(tmp_path: Path) -> None:
    with running_store(tmp_path, sweep_s="0.05") as store:
        now = int(time.time())
        store.call("PUT", "team-a/later", b"1", X_Lorapool_Expires=str(now + 3600))
        store.call("PUT", "team-a/soon", b"1", X_Lorapool_Expires=str(now))
        store.until_files(2)  # the later one and its expiry
        assert store.keys("team-a") == ["later"]
        store.call("PUT", "team-a/after", b"1", X_Lorapool_Expires=str(now + 1))
        store.stop(signal.SIGKILL)
        store.start()
        store.until_files(2)
        assert store.keys("team-a") == ["later"]


# --- the process


def test_the_store_serves_tls_with_the_releases_certificate(tmp_path: Path) -> None:
    folder = serve_with(tmp_path / "tls", authority(tmp_path / "ca"), "store")
    with running_store(tmp_path / "store", tls_dir=str(folder)) as store:
        context = ssl.create_default_context(cafile=str(tmp_path / "ca" / "ca.crt"))
        address = ("127.0.0.1", int(store.url.rsplit(":", 1)[1]))
        with (
            socket.create_connection(address) as plain,
            context.wrap_socket(plain, server_hostname=STORE_SERVER_NAME) as secure,
        ):
            assert secure.version() == "TLSv1.3"


def test_metrics_count_requests_and_show_the_bytes_of_namespaces(tmp_path: Path) -> None:
    with running_store(tmp_path) as store:
        store.call("PUT", "team-a/x", b"12345")
        store.call("GET", "team-a/none")
        text = requests.get(f"{store.metrics_url}/metrics", timeout=20).text
        assert 'lorapool_store_bytes{store_namespace="team-a"} 5.0' in text
        assert 'lorapool_store_requests_total{code="404",method="GET"} 1.0' in text
        assert requests.get(f"{store.metrics_url}/readyz", timeout=20).status_code == 200
        assert store.stop() == 0


def test_wrong_settings_end_the_process_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ended with 2"), running_store(tmp_path, location="ftp://x"):
        pass
