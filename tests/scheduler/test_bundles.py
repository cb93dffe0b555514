"""What the scheduler knows of requests that wait for each other's values."""

from __future__ import annotations

import pytest

from nnsight_vllm.frontend.bundling import Bundling
from nnsight_vllm.graph.links import Links, Need
from nnsight_vllm.graph.results import Failure
from nnsight_vllm.scheduler import bundles as module
from nnsight_vllm.scheduler.bundles import Bundles
from nnsight_vllm.trace.backend import Prompt, Request
from nnsight_vllm.wire.step_output import Released


def links(*, makes: str = "", needs: dict[str, int] | None = None, size: int = 2, bundle: str = "b") -> Links:
    needed = [Need(key, iteration, 7) for key, iteration in (needs or {}).items()]
    return Links(bundle, size, dict.fromkeys(makes, 1), needed)


def pair() -> Bundles:
    bundles = Bundles()
    bundles.add("a", links(makes="k"))
    bundles.add("c", links(needs={"k": 2}))
    return bundles


def test_a_request_is_held_before_the_iteration_that_needs_the_value() -> None:
    bundles = pair()
    assert bundles.waiting() == ["c"]
    assert not bundles.holds("c", 1) and bundles.holds("c", 2)
    assert bundles.hopeless({"c": 2}) == {}
    bundles.report([("b", "k")], {}, [])
    assert bundles.waiting() == [] and not bundles.holds("c", 2)


def test_a_value_of_another_bundle_frees_nobody() -> None:
    bundles = pair()
    bundles.report([("other", "k")], {}, [])
    assert bundles.holds("c", 2)


@pytest.mark.parametrize(
    ("failed", "last", "why"),
    [
        ({"a": Failure("ValueError", "no", 3)}, ["a"], "ValueError: no"),
        ({}, ["a"], "it stopped before"),
        ({}, [], "it ended before"),
    ],
)
def test_a_request_fails_when_its_maker_ends_without_the_value(
    failed: dict[str, Failure], last: list[str], why: str
) -> None:
    bundles = pair()
    bundles.report([], failed, last)
    bundles.ended("a", "it ended before")
    (failure,) = bundles.hopeless({"c": 2}).values()
    assert failure.node == 7 and failure.message.endswith(f"before its iteration 2 will never be there: {why}")


def test_it_may_be_tried_again_if_its_maker_was_evicted() -> None:
    bundles = pair()
    bundles.report([], {"a": Failure("PreemptedError", "evicted", None, True)}, ["a"])
    bundles.ended("a", "")
    failure = bundles.hopeless({"c": 2})["c"]
    assert failure.retryable and failure.kind == "PreemptedError"


def test_a_maker_that_ended_after_it_made_the_value_is_no_loss() -> None:
    bundles = pair()
    bundles.report([("b", "k")], {"a": Failure("ValueError", "later")}, ["a"])
    bundles.ended("a", "")
    assert not bundles.holds("c", 2)


def test_a_failure_goes_on_to_those_who_need_what_the_failed_one_makes() -> None:
    bundles = Bundles()
    bundles.add("a", links(makes="k", size=3))
    bundles.add("c", links(makes="l", needs={"k": 0}, size=3))
    bundles.add("d", links(needs={"l": 0}, size=3))
    bundles.ended("a", "it was aborted before")
    held = {"c": 0, "d": 0}
    assert set(bundles.hopeless(held)) == {"c"}
    bundles.fail("c", bundles.hopeless(held)["c"])
    bundles.ended("c", "")
    assert "aborted" in bundles.hopeless({"d": 0})["d"].message


def test_those_who_wait_for_themselves_fail() -> None:
    bundles = Bundles()
    bundles.add("a", links(makes="k", needs={"l": 0}, size=3))
    bundles.add("c", links(makes="l", needs={"k": 0}, size=3))
    bundles.add("d", links(needs={"k": 0}, size=3))
    failed = bundles.hopeless({"a": 0, "c": 0, "d": 0})
    assert set(failed) == {"a", "c"} and "waits for this one" in failed["a"].message
    assert bundles.hopeless({"c": 0}) == {}  # the other runs


def test_a_value_that_nobody_makes_is_refused_once_all_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    bundles = Bundles()
    bundles.add("c", links(needs={"k": 0}))
    assert bundles.holds("c", 0) and bundles.hopeless({"c": 0}) == {}
    bundles.add("d", links(makes="other"))
    assert "no request of the bundle exports it" in bundles.hopeless({"c": 0})["c"].message
    alone = Bundles()
    alone.add("c", links(needs={"k": 0}))
    monkeypatch.setattr(module, "PATIENCE", -1.0)
    assert "no request of the bundle exports it" in alone.hopeless({"c": 0})["c"].message


def test_the_worker_hears_of_uses_that_it_cant_know_to_be_over() -> None:
    bundles = Bundles()
    bundles.add("a", links(makes="k", size=3))
    for name in "cd":
        bundles.add(name, links(needs={"k": 0}, size=3))
    bundles.sent(["d"])
    bundles.ended("c", "")
    bundles.ended("d", "")
    assert bundles.take_released() == Released([("b", "k")])
    bundles.ended("a", "")
    assert bundles.take_released() == Released(bundles=["b"])
    assert not bundles


def test_a_bundle_waits_for_requests_that_are_still_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    bundles = Bundles()
    bundles.add("a", links(makes="k"))
    bundles.report([("b", "k")], {}, [])
    bundles.ended("a", "")
    assert not bundles.take_released()
    bundles.add("c", links(needs={"k": 0}))
    assert not bundles.holds("c", 0)
    left = Bundles()
    left.add("a", links(makes="k"))
    left.ended("a", "")
    monkeypatch.setattr(module, "PATIENCE", -1.0)
    assert left.take_released().bundles == ["b"]


# -- what is sent together -----------------------------------------------------------------------------------------------


class Sampling:
    def __init__(self, n: int = 1) -> None:
        self.n = n


def request(makes: str = "", needs: str = "", n: int = 1) -> Request:
    own = Links(makes=dict.fromkeys(makes, 1), needs=[Need(key, 0, 0) for key in needs]) if makes or needs else None
    return Request(Prompt(1, None, None), Sampling(n), b"", links=own)


def test_makers_are_sent_before_those_who_wait_for_them() -> None:
    related = Bundling([request(needs="z"), request(), request(makes="y"), request(makes="z", needs="y")])
    assert related.in_order(range(4)) == [2, 3, 0, 1]
    assert related.in_order([0, 1]) == [0, 1]


def test_those_who_need_each_other_are_sent_all_the_same() -> None:
    assert Bundling([request("x", "y"), request("y", "x")]).in_order([0, 1]) == [1, 0]


def test_a_bundle_is_all_that_are_tied_to_each_other() -> None:
    related = Bundling(
        [request("x"), request("y"), request(), request(needs="x", n=3), request(needs="xy"), request("z")]
    )
    sent = related.links(range(6))
    assert set(sent) == {0, 1, 3, 4, 5}
    assert {sent[i].bundle for i in (0, 1, 3, 4)} == {sent[0].bundle} != {sent[5].bundle}
    assert [sent[i].size for i in (0, 1, 3, 4, 5)] == [6, 6, 6, 6, 1]
    assert sent[0].makes == {"x": 4} and sent[5].makes == {"z": 0}
    again = related.links([0, 4, 1])
    assert again[0].bundle != sent[0].bundle and again[0].makes == {"x": 1} and again[0].size == 3


def test_who_starts_again_does_so_with_those_who_make_its_values() -> None:
    related = Bundling([request("x"), request("y", "x"), request(needs="y"), request(needs="y"), request("z")])
    assert related.with_makers([2]) == [0, 1, 2]
    assert related.with_makers([0]) == [0]
    assert related.with_makers([1, 4]) == [0, 1, 4]


def test_a_thousand_of_one_maker_are_one_bundle() -> None:
    related = Bundling([request("x"), *[request(needs="x") for _ in range(1000)]])
    assert {links.size for links in related.links(range(1001)).values()} == {1001}
