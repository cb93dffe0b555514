"""Requests drawn from the OpenAPI document of a live server by schemathesis: each is answered as the document says, none with a 5xx.

For vLLM's routes only our field is drawn: all else of those is vLLM's.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import one_of
from live_server import LiveServer, key_of
from safetensors.torch import save
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

FIXED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "hello", "max_tokens": 2},
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2},
    "/v1/responses": {"model": "tiny", "input": "hello", "max_output_tokens": 2},
}
SITES = [
    "model.layers.0.output[0]",
    "model.layers.1.mlp.output",
    "model.layers.1.input",
    "logits",
    "samples",
    "nowhere",
]
SERVED = {
    "type": "object",
    "properties": {
        "save": {
            "type": "array",
            "minItems": 1,
            "maxItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"enum": ["h", "other"]},
                    "site": {"enum": SITES[:4]},
                    "positions": {"enum": ["all", "prompt", "last"]},
                    "stream": {"type": "boolean"},
                },
                "required": ["name", "site", "positions"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["save"],
    "additionalProperties": False,
}
NO_TEXT = {"detail": "There was an error parsing the body"}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
DRAWN = settings(
    max_examples=int(os.environ.get("NNSIGHT_VLLM_DRAWN", "40")),
    derandomize="NNSIGHT_VLLM_DRAWN" not in os.environ,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@schemathesis.serializer("application/msgpack")
def _as_it_is(_: Any, value: Any) -> Any:
    return value


@pytest.fixture(scope="module")
def document(live: LiveServer) -> dict[str, Any]:
    """The server's, with our routes, and vLLM's that take our field."""
    data = save({"tensor": torch.ones(128)})
    upload = f"interventions/tensors/{hashlib.sha256(data).hexdigest()}"
    live.ask("PUT", upload, params={"name": "drawn"}, content=data).raise_for_status()
    found: dict[str, Any] = httpx.get(f"{live.url}/openapi.json", timeout=60).json()
    paths = {path: methods for path, methods in found["paths"].items() if path.startswith("/v1/interventions")}
    assert len(paths) >= 10
    for path, fixed in FIXED.items():
        route = dict(found["paths"][path]["post"])
        kept = {name: {"const": value} for name, value in fixed.items()}
        body = {
            "type": "object",
            "properties": {**kept, "intervention": {"$ref": "#/components/schemas/Intervention"}},
            "required": [*kept, "intervention"],
            "additionalProperties": False,
        }
        route["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
        route["parameters"] = []
        paths[path] = {"post": route}
    schemas = found["components"]["schemas"]
    whole = schemas["Intervention"]
    short = {name: {**whole["properties"][name], "minItems": 1, "maxItems": 3} for name in ("edits", "save")}
    forms = [
        {"type": "object", "properties": {n: one}, "required": [n], "additionalProperties": False}
        for n, one in short.items()
    ]
    schemas["Intervention"] = {"anyOf": [whole, *forms, SERVED]}
    for schema in schemas.values():  # else nearly nothing that is drawn would be served
        for name, drawn in (("site", SITES), ("tensor", ["drawn", "nobodys"])):
            if name in schema.get("properties", {}):
                schema["properties"][name] = {"enum": drawn}
    return {**found, "paths": paths}


def test_drawn_requests_are_answered_as_the_document_says(document: dict[str, Any], live: LiveServer) -> None:
    operations: list[Any] = [
        found.ok()  # type: ignore[union-attr]
        for found in schemathesis.openapi.from_dict(document).get_all_operations()
    ]
    assert len(operations) == sum(len(methods) for methods in document["paths"].values())
    failures, served = [], Counter[int]()
    for operation in operations:
        try:
            answers = _answers(operation, live)
            print(operation.label, dict(answers))
            served += answers if operation.path in FIXED else Counter()
        except (Exception, FailureGroup) as error:
            found = error.exceptions if isinstance(error, FailureGroup) else [error]
            failures += [f"{operation.label}: {type(one).__name__}: {one}" for one in found]
    assert not failures, "\n\n".join(failures)
    assert served[200] > 0


def _answers(operation: Any, live: LiveServer) -> Counter[int]:
    """Statuses of what is drawn for an operation, fitting its schema or not. Raises where an answer doesn't fit the document."""
    modes = [GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if _can_be_wrong(operation) else [])]
    found: Counter[int] = Counter()

    @DRAWN
    @given(case=one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes)))
    def judge(case: Any) -> None:
        answer = case.call(base_url=live.url, headers=key_of("alice"), timeout=60)
        found[answer.status_code] += 1
        if answer.status_code == 400 and answer.json() == NO_TEXT:  # vLLM's word for a body that isn't UTF-8
            with pytest.raises(UnicodeDecodeError):
                answer.request.body.decode()
            return
        case.validate_response(answer, checks=CHECKS)

    judge()
    return found


def _can_be_wrong(operation: Any) -> bool:
    return bool(operation.body) or bool(list(operation.iter_parameters()))


def test_the_server_is_whole_after_them(live: LiveServer) -> None:
    assert live.leftovers() == []
    assert live.post(FIXED["/v1/completions"]).status_code == 200
