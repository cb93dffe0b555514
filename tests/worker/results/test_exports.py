import pytest
import torch
from toy import HIDDEN, Toy, graph

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.graph.links import Links, Need
from nnsight_vllm.graph.nodes import Block, Export, Import, Iterations, Node, Op, Read, Ref, Save, Slice, Write
from nnsight_vllm.wire.limits import Limits
from nnsight_vllm.wire.step_output import Released
from nnsight_vllm.worker.results.exports import Exports

ONES, TWOS = [1.0] * HIDDEN, [2.0] * HIDDEN


def producer(*more: Node, key: str = "k") -> bytes:
    return graph(Read(0, "0.out", 0), Op(1, "py.mul", [Ref(0), 7]), *more, Export(9, key, Ref(1)))


def consumer(key: str = "k", iteration: int = 0) -> bytes:
    return graph(
        Import(0, key, iteration),
        Write(1, "1.mlp", Ref(0), iteration),
        Read(2, "1.out", iteration),
        Save(3, "x", Ref(2)),
    )


def makes(uses: int = 1, key: str = "k", bundle: str = "b") -> Links:
    return Links(bundle, 2, makes={key: uses})


def needs(key: str = "k", iteration: int = 0, bundle: str = "b") -> Links:
    return Links(bundle, 2, needs=[Need(key, iteration, 0)])


@pytest.fixture(params=[True, False], ids=["groups", "alone"])
def toy(request: pytest.FixtureRequest) -> Toy:
    return Toy(batching=request.param)


def test_a_value_of_one_request_is_written_by_another(toy: Toy) -> None:
    toy.add("a", producer(), links=makes())
    toy.step(a=(2, 0))
    assert toy.made == [("b", "k")]
    assert toy.executor.exports.num_bytes == 2 * HIDDEN * 4
    toy.add("c", consumer(), links=needs())
    toy.step(a=(1, 2), c=(2, 0))
    assert toy.saved["c"]["x"] == [[8.0] * HIDDEN] * 2
    assert toy.executor.exports.num_bytes == 0  # that was its last use


def test_an_export_is_a_copy_of_its_moment(toy: Toy) -> None:
    after = Op(5, "py.setitem", [Ref(0), Slice(), 50], writes="0.out")
    data = graph(Read(0, "0.out", 0), Export(1, "k", Ref(0)), after)
    toy.add("a", data, links=makes())
    toy.step(a=(2, 0))
    toy.add("c", consumer(), links=needs())
    toy.step(c=(2, 0))
    assert toy.saved["c"]["x"] == [TWOS, TWOS]


def test_many_consumers_share_one_tensor_and_one_program() -> None:
    toy = Toy()
    toy.add("a", producer(), links=makes(50))
    toy.step(a=(2, 0))
    (kept,) = toy.executor.exports._kept.values()
    names = [f"c{i}" for i in range(50)]
    seen: list[int] = []
    draw = toy.executor.exports.draw

    def drawn(links: Links | None, key: str) -> torch.Tensor:
        value = draw(links, key)
        seen.append(value.data_ptr())
        return value  # type: ignore[no-any-return]

    toy.executor.exports.draw = drawn  # type: ignore[method-assign]
    for name in names:
        toy.add(name, consumer(), links=needs())
    toy.step(**{name: (2, 0) for name in names})
    assert set(seen) == {kept.value.data_ptr()} and len(seen) == 50
    assert toy.executor.exports.num_bytes == 0
    stats = toy.executor.stats()
    assert (stats.programs, stats.one_by_one) == (2, 0)
    assert all(toy.saved[name]["x"] == [[8.0] * HIDDEN] * 2 for name in names)


def test_keys_are_no_part_of_the_structure(toy: Toy) -> None:
    for key in "xyz":
        toy.add(f"a{key}", producer(key=key), links=makes(key=key))
    toy.step(ax=(2, 0), ay=(2, 0), az=(2, 0))
    for key in "xyz":
        toy.add(f"c{key}", consumer(key), links=needs(key))
    toy.step(cx=(2, 0), cy=(2, 0), cz=(2, 0))
    assert toy.executor.stats().programs == 2
    assert [toy.saved[f"c{key}"]["x"] for key in "xyz"] == [[[8.0] * HIDDEN] * 2] * 3


def test_a_value_is_drawn_when_its_iteration_begins(toy: Toy) -> None:
    toy.add("c", consumer(iteration=1), links=needs(iteration=1))
    toy.step(c=(2, 0))
    toy.add("a", graph(Read(0, "0.out", 0), Op(1, "py.getitem", [Ref(0), -1]), Export(2, "k", Ref(1))), links=makes())
    toy.step(a=(2, 0))
    toy.step(c=(1, 2))
    assert toy.saved["c"]["x"] == [TWOS]


def test_a_value_drawn_in_the_midst_of_a_site_leaves_the_site_open(toy: Toy) -> None:
    toy.add("a", producer(), links=makes())
    toy.step(a=(2, 0))
    data = graph(
        Read(0, "1.mlp", 0),
        Op(1, "tensor.add_", [Ref(0), 1], writes="1.mlp"),
        Import(2, "k", 0),
        Op(3, "tensor.add_", [Ref(0), Ref(2)], writes="1.mlp"),
        Save(4, "x", Ref(0)),
    )
    toy.add("c", data, links=needs())
    toy.step(c=(2, 0))
    assert toy.saved["c"]["x"] == [[9.0] * HIDDEN] * 2


def test_changing_another_requests_value_changes_a_copy(toy: Toy) -> None:
    toy.add("a", producer(), links=makes(2))
    toy.step(a=(2, 0))
    data = graph(Import(0, "k", 0), Op(1, "tensor.add_", [Ref(0), 1]), Save(2, "x", Ref(0)))
    for name in "cd":
        toy.add(name, data, links=needs())
    toy.step(c=(2, 0), d=(2, 0))
    assert toy.saved["c"]["x"] == toy.saved["d"]["x"] == [[8.0] * HIDDEN] * 2


def test_a_value_is_there_in_each_trip_of_a_block(toy: Toy) -> None:
    toy.add("a", producer(), prompt=1, links=makes())
    toy.step(a=(1, 0))
    body = graph(
        Import(0, "k", 1),
        Iterations(
            1, 1, 3, 1, 2, body=Block([Write(3, "1.mlp", Ref(0), None), Read(4, "1.out", None), Save(5, "x", Ref(4))])
        ),
    )
    toy.add("c", body, links=needs(iteration=1))
    toy.step(c=(2, 0))
    toy.step(c=(1, 2))
    assert toy.saved["c"]["x"] == [[8.0] * HIDDEN]
    toy.step(c=(1, 3))
    assert toy.executor.exports.num_bytes == 0


def test_a_request_that_ends_without_its_value_gives_up_its_use(toy: Toy) -> None:
    toy.add("c", consumer(iteration=4), links=needs(iteration=4))
    toy.add("a", producer(), links=makes())
    toy.step(c=(2, 0), a=(2, 0))
    assert toy.executor.exports.num_bytes > 0
    toy.executor.drop(["c"])
    assert toy.executor.exports.num_bytes == 0


def test_a_value_that_nobody_made_fails_who_asks_for_it(toy: Toy) -> None:
    toy.add("c", consumer("missing"), links=needs("missing"))
    toy.step(c=(2, 0))
    assert toy.failure("c") == "InterventionError: no request of the bundle has exported 'missing' by now"


@pytest.mark.parametrize(
    "links", [None, Links("other", 2, needs=[Need("k", 0, 0)])], ids=["no links", "another bundle"]
)
def test_nobody_outside_of_the_bundle_gets_a_value(toy: Toy, links: Links | None) -> None:
    toy.add("a", producer(), links=makes())
    toy.step(a=(2, 0))
    toy.add("c", consumer(), links=links)
    toy.step(c=(2, 0))
    assert "no request of the bundle" in toy.failure("c")
    assert toy.executor.exports.num_bytes > 0


def test_two_requests_cannot_export_the_same(toy: Toy) -> None:
    for name in "ad":
        toy.add(name, producer(), links=makes())
        toy.step(**{name: (2, 0)})
    assert "another request of the bundle exports 'k' already" in toy.failure("d")


def test_an_export_that_the_links_dont_name_fails(toy: Toy) -> None:
    toy.add("a", producer(), links=makes(key="other"))
    toy.step(a=(2, 0))
    assert "which its links don't name" in toy.failure("a")


def test_values_have_the_limits_of_results() -> None:
    toy = Toy(limits=Limits(request=8))
    toy.add("a", producer(), links=makes())
    toy.step(a=(2, 0))
    assert "keep for each other have 32 bytes; max_saved_bytes is 8" in toy.failure("a")


def test_a_bundle_that_is_over_leaves_nothing() -> None:
    exports = Exports(1000, 100)
    exports.make(makes(3), "k", torch.zeros(4))
    exports.release(Released([("b", "k")]))
    assert exports.num_bytes == 16
    exports.release(Released(bundles=["b"]))
    assert exports.num_bytes == 0 and not exports.leftovers()


def test_uses_that_are_over_early_count() -> None:
    exports = Exports(1000, 100)
    exports.release(Released([("b", "k"), ("b", "k")]))
    exports.make(makes(2), "k", torch.zeros(4))
    assert len(exports) == 0 and exports.take_made() == [("b", "k")]


def test_all_values_together_are_bounded() -> None:
    exports = Exports(1000, 20)
    exports.make(makes(bundle="b"), "k", torch.zeros(4))
    with pytest.raises(InterventionError, match="have 32 bytes; max_saved_bytes_in_all is 20"):
        exports.make(makes(bundle="c"), "k", torch.zeros(4))
