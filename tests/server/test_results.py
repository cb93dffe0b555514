"""Results behind links: fetched once, or by ranges, by their tenant, for a while."""

from __future__ import annotations

import pytest
import zstandard
from store_app import client_of, interventions

from nnsight_vllm.server.errors import Refused
from nnsight_vllm.server.results import ResultStore

PATH = "/v1/interventions/results"
DATA = bytes(range(100)) * 10
PLAIN = {"accept-encoding": "identity"}


def test_a_whole_answer_is_the_last() -> None:
    state = interventions()
    client, id = client_of(state), state.results.add("", DATA)
    answer = client.get(f"{PATH}/{id}", headers=PLAIN)
    assert answer.content == DATA
    assert answer.headers["content-type"] == "application/octet-stream"
    assert "content-encoding" not in answer.headers
    assert client.get(f"{PATH}/{id}").status_code == 404


@pytest.mark.parametrize(
    ("asked", "first", "stop"),
    [("0-9", 0, 10), ("990-", 990, 1000), ("-5", 995, 1000), ("5-9999", 5, 1000), ("-2000", 0, 1000)],
)
def test_a_range_leaves_it_there(asked: str, first: int, stop: int) -> None:
    state = interventions()
    client, id = client_of(state), state.results.add("", DATA)
    answer = client.get(f"{PATH}/{id}", headers={"range": f"bytes={asked}", "accept-encoding": "zstd"})
    assert (answer.status_code, answer.content) == (206, DATA[first:stop])
    assert answer.headers["content-range"] == f"bytes {first}-{stop - 1}/1000"
    assert client.get(f"{PATH}/{id}").content == DATA


@pytest.mark.parametrize("asked", ["1000-", "2000-3000", "-0"])
def test_a_range_without_a_byte_is_refused(asked: str) -> None:
    state = interventions()
    client, id = client_of(state), state.results.add("", DATA)
    answer = client.get(f"{PATH}/{id}", headers={"range": f"bytes={asked}"})
    assert (answer.status_code, answer.headers["content-range"]) == (416, "bytes */1000")
    assert client.get(f"{PATH}/{id}").content == DATA


@pytest.mark.parametrize("asked", ["bytes=0-1,3-4", "bytes=5-2", "bytes=-", "rows=1-2", "bytes=x-"])
def test_another_range_is_ignored(asked: str) -> None:
    state = interventions()
    answer = client_of(state).get(f"{PATH}/{state.results.add('', DATA)}", headers={"range": asked, **PLAIN})
    assert (answer.status_code, answer.content) == (200, DATA)


def test_a_head_leaves_it_there() -> None:
    state = interventions()
    client, id = client_of(state), state.results.add("", DATA)
    answer = client.head(f"{PATH}/{id}")
    assert (answer.content, answer.headers["content-length"], answer.headers["accept-ranges"]) == (b"", "1000", "bytes")
    assert client.get(f"{PATH}/{id}").content == DATA


@pytest.mark.parametrize(
    ("accepted", "is_packed"), [("zstd", True), ("gzip, ZSTD;q=0.5", True), ("zstd;q=0", False), ("gzip", False)]
)
def test_it_is_packed_for_those_who_can_unpack_it(accepted: str, is_packed: bool) -> None:
    state = interventions()
    client, id = client_of(state), state.results.add("", DATA)
    with client.stream("GET", f"{PATH}/{id}", headers={"accept-encoding": accepted}) as answer:
        raw = b"".join(answer.iter_raw())
    assert answer.headers.get("content-encoding") == ("zstd" if is_packed else None)
    assert (zstandard.decompress(raw) if is_packed else raw) == DATA


def test_another_tenants_is_as_unknown_as_none() -> None:
    state = interventions()
    client, id = client_of(state), state.results.add("a", DATA)
    others = client.get(f"{PATH}/{id}", headers={"who": "b"})
    unknown = client.get(f"{PATH}/none", headers={"who": "b"})
    assert (others.status_code, others.json()) == (unknown.status_code, unknown.json())
    assert others.status_code == 404
    assert client.get(f"{PATH}/{id}", headers={"who": "a"}).content == DATA


def test_the_tenants_oldest_gives_way() -> None:
    store = ResultStore(count=2, bytes=10, seconds=9)
    others = store.add("b", b"1234567890")
    first, second, third = (store.add("a", data) for data in (b"1", b"22", b"333"))
    assert _kept(store, first, second, third) == [False, True, True]
    large = store.add("a", b"55555555")  # 2 + 3 + 8 bytes would be too many, and 3 + 8
    assert _kept(store, second, third, large) == [False, False, True]
    assert store.get("b", others) == b"1234567890"


def test_a_result_above_all_room_is_refused() -> None:
    store = ResultStore(count=2, bytes=3, seconds=9)
    kept = store.add("a", b"1")
    with pytest.raises(Refused, match="a result of 4 bytes; the limit is 3"):
        store.add("a", b"4444")
    assert store.get("a", kept) == b"1"


def test_it_expires() -> None:
    now = 0.0
    store = ResultStore(count=2, bytes=3, seconds=9, clock=lambda: now)
    id = store.add("a", b"1")
    now = 8.9
    assert store.get("a", id) == b"1"
    now = 9.0
    assert _kept(store, id) == [False]


def _kept(store: ResultStore, *ids: str) -> list[bool]:
    found = []
    for id in ids:
        try:
            store.get("a", id)
        except Refused:
            found.append(False)
        else:
            found.append(True)
    return found
