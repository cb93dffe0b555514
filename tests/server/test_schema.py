"""The field of a request's body is closed, and what doesn't fit is told with a path into the body."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel

from nnsight_vllm.server.bodies import InterventionRoute
from nnsight_vllm.server.errors import Refused, answer_refused
from nnsight_vllm.server.limits import ServerLimits
from nnsight_vllm.server.schema import OPERATIONS, Intervention, PositionRange


class Body(BaseModel):
    temperature: float = 1.0
    intervention: Intervention | None = None


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.router.route_class = InterventionRoute
    app.exception_handler(Refused)(answer_refused)
    app.state.interventions = SimpleNamespace(limits=ServerLimits())

    @app.post("/")
    def post(body: Body) -> dict[str, object]:
        return body.model_dump()

    return TestClient(app)


SITE = "model.layers.1.output[0]"
ADD = {"site": SITE, "op": "add", "tensor": "happy"}
CLAMP = {"site": SITE, "op": "clamp", "tensor": "happy"}
SAVE = {"name": "h", "site": SITE}
INLINE = {"dtype": "float32", "shape": [1], "data": ""}


def test_the_example_of_the_documentation_fits(client: TestClient) -> None:
    edit = {**ADD, "scale": 4.0, "positions": "all"}
    body = {"intervention": {"edits": [edit], "save": [{**SAVE, "positions": "last"}]}}
    assert client.post("/", json=body).json()["intervention"]["edits"] == [edit]
    assert client.post("/", json={}).json()["intervention"] is None


def test_positions_of_each_kind_are_read() -> None:
    read = Intervention.model_validate({"save": [{**SAVE, "positions": p} for p in ("last", [3, 1], {"start": 2})]})
    assert [save.positions for save in read.save] == ["last", [3, 1], PositionRange(start=2)]


def wrong(**more: Any) -> dict[str, Any]:
    return {"edits": [{**ADD, **more}]}


@pytest.mark.parametrize(
    ("intervention", "param", "message"),
    [
        ({}, "", "it is empty: expected `edits`, `save` or `graph`"),
        (7, "", "got 7"),
        ({"edit": []}, ".edit", "there is no such field"),
        ({"graph": {}, "save": [SAVE]}, "", "`graph` is the full form"),
        ({"save": [SAVE], "stream": ["h"]}, "", "`stream` is for the names of a `graph`"),
        ({"graph": 3}, ".graph", "valid dictionary"),
        ({"graph": {}, "tensors": {"ab": 3}}, ".tensors['ab']", "valid string; got 3"),
        ({"graph": {}, "tensors": {"a" * 65: ""}}, f".tensors['{'a' * 65}']", "at most 64 characters"),
        ({"edits": {}}, ".edits", "valid list; got an object"),
        ({"edits": [3]}, ".edits[0]", "got 3"),
        ({"edits": [{"site": SITE}]}, ".edits[0].op", "expected one of add, scale"),
        (wrong(op="ad"), ".edits[0].op", "got 'ad' (nearest: add)"),
        (wrong(op="x" * 5000), ".edits[0].op", "expected one of add, scale"),
        (wrong(op=["add"]), ".edits[0].op", "expected one of add, scale"),
        (wrong(site=3), ".edits[0].site", "valid string; got 3"),
        (wrong(site="x" * 600), ".edits[0].site", "at most 512 characters"),
        (wrong(scale="big"), ".edits[0].scale", "valid number"),
        (wrong(scale=None), ".edits[0].scale", "got None"),
        (wrong(low=1.0), ".edits[0].low", "there is no such field"),
        (wrong(tensor=""), ".edits[0].tensor", "at least 1 character"),
        (wrong(tensor=[1.0, 2.0]), ".edits[0].tensor", "valid string; got a list"),
        (
            wrong(tensor={**INLINE, "dtype": "float8"}),
            ".edits[0].tensor.dtype",
            "expected 'float32', 'float16' or 'bfloat16'; got 'float8' (nearest: float",
        ),
        (wrong(tensor={**INLINE, "shape": [1, 2, 3]}), ".edits[0].tensor.shape", "at most 2 items"),
        (wrong(tensor={**INLINE, "shape": [-1]}), ".edits[0].tensor.shape[0]", "greater than or equal to 0; got -1"),
        (wrong(tensor={**INLINE, "evil": 1}), ".edits[0].tensor.evil", "there is no such field"),
        ({"edits": [{"site": SITE, "op": "add"}]}, ".edits[0].tensor", "missing"),
        ({"edits": [{"site": SITE, "op": "scale"}]}, ".edits[0].scale", "missing"),
        ({"edits": [CLAMP]}, ".edits[0]", "a clamp has `low`, `high` or both"),
        ({"edits": [{**CLAMP, "low": 2, "high": 1}]}, ".edits[0]", "expected low <= high; got 2.0 and 1.0"),
        (wrong(positions="lst"), ".edits[0].positions", "got 'lst' (nearest: last)"),
        (wrong(positions=3), ".edits[0].positions", "got 3"),
        (wrong(positions=[]), ".edits[0].positions", "at least 1 item"),
        (wrong(positions=[0, -1]), ".edits[0].positions[1]", "greater than or equal to 0; got -1"),
        (wrong(positions=[1.5]), ".edits[0].positions[0]", "valid integer"),
        (wrong(positions=[True]), ".edits[0].positions[0]", "valid integer"),
        (wrong(positions={"start": 3, "stop": 3}), ".edits[0].positions", "holds no position"),
        (wrong(positions={"step": 0}), ".edits[0].positions.step", "greater than or equal to 1; got 0"),
        (wrong(positions={"begin": 0}), ".edits[0].positions.begin", "there is no such field"),
        ({"save": [{"site": SITE}]}, ".save[0].name", "missing"),
        ({"save": [{**SAVE, "name": ""}]}, ".save[0].name", "at least 1 character"),
        ({"save": [{**SAVE, "name": "a\n"}]}, ".save[0].name", "without control characters; got 'a\\n'"),
        ({"save": [{**SAVE, "name": "a\x9b"}]}, ".save[0].name", "without control characters; got"),
        ({"save": [SAVE] * 1025}, ".save", "at most 1024 items"),
    ],
)
def test_what_does_not_fit_is_told_with_its_place(
    client: TestClient, intervention: Any, param: str, message: str
) -> None:
    response = client.post("/", json={"intervention": intervention})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (400, 400, "BadRequestError")
    assert error["param"] == f"intervention{param}"
    assert message in error["message"]
    assert len(error["message"]) < 500


def test_numbers_are_finite(client: TestClient) -> None:
    body = '{"intervention": {"edits": [{"site": "a.output", "op": "scale", "scale": Infinity}]}}'
    error = client.post("/", content=body, headers={"content-type": "application/json"}).json()["error"]
    assert error["param"] == "intervention.edits[0].scale" and "finite" in error["message"]


def test_the_openapi_document_has_every_operation_with_descriptions_and_examples_that_fit(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert all(client.post("/", json={"intervention": one}).is_success for one in schemas["Intervention"]["examples"])
    edits = schemas["Intervention"]["properties"]["edits"]["items"]
    assert sorted(edits["discriminator"]["mapping"]) == sorted(OPERATIONS)
    ours = ["Intervention", "SaveSpec", "InlineTensor", "PositionRange"]
    ours += [ref.rpartition("/")[2] for ref in edits["discriminator"]["mapping"].values()]
    for name in ours:
        for field, told in schemas[name]["properties"].items():
            assert field == "op" or told.get("description"), (name, field)
