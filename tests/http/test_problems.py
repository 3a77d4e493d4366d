import logging

import pytest

from adashard.wire.errors import AdashardError, catalogue
from adashard_server.http.problems import MEDIA_TYPE

KINDS = [kind for kind in catalogue().values() if kind is not AdashardError]


def problem(answer):
    assert answer.headers["content-type"] == MEDIA_TYPE
    body = answer.json()
    assert body["status"] == answer.status_code
    assert body["request_id"] == answer.headers["x-request-id"]
    return body


def raise_from_cluster(view, error):
    def cluster_statistics():
        raise error

    view.cluster_statistics = cluster_statistics


def test_an_unknown_job_says_which_and_what_to_do(get):
    body = problem(get("/api/v1/jobs/nope"))
    assert body["status"] == 404
    assert body["code"] == "UnknownJob"
    assert body["title"] == "There is no job of this name"
    assert body["detail"] == "There is no job 'nope' here."
    assert body["instance"] == "/api/v1/jobs/nope"
    assert "GET /api/v1/jobs" in body["hint"]
    assert body["facts"] == {"job": "nope"}


def test_the_type_of_a_problem_leads_to_its_description(get):
    body = problem(get("/api/v1/jobs/nope"))
    described = get(body["type"]).json()
    assert described["code"] == body["code"]
    assert described["status"] == body["status"]
    assert described["title"] == body["title"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_of_the_catalogue_has_its_status_and_its_description(kind, get, view):
    raise_from_cluster(view, kind("what happened", remedy="what to do", worker="w-1"))
    body = problem(get("/api/v1/cluster"))
    assert body["status"] == kind.http_status
    assert body["code"] == kind.__name__
    assert body["detail"] == "what happened"
    assert body["hint"] == "what to do"
    assert body["facts"] == {"worker": "w-1"}
    assert get(body["type"]).status_code == 200


def test_an_unknown_path_is_a_problem_too(get):
    body = problem(get("/api/v1/nothing"))
    assert (body["status"], body["code"], body["type"]) == (404, "NotFound", "about:blank")
    assert "/docs" in body["hint"]
    assert problem(get("/static/nothing.js"))["code"] == "NotFound"
    assert problem(get("/api/v1/errors/Nothing"))["detail"] == "There is no error 'Nothing'."


def test_only_reading_is_allowed(ask):
    answer = ask("DELETE", "/api/v1/jobs/demo")
    assert problem(answer)["code"] == "MethodNotAllowed"
    assert answer.headers["allow"] == "GET"


def test_a_parameter_that_cannot_be_right_is_named(get):
    body = problem(get("/api/v1/jobs/demo/steps?max_points=many&from=1"))
    assert (body["status"], body["code"]) == (400, "InvalidRequest")
    (error,) = body["errors"]
    assert error["location"] == "query.max_points"
    assert "integer" in error["message"]


def test_a_defect_is_logged_with_its_traceback_and_answered_without_it(get, view, caplog):
    raise_from_cluster(view, RuntimeError("secret detail"))
    with caplog.at_level(logging.ERROR, "adashard.errors"):
        answer = get("/api/v1/cluster", headers={"x-request-id": "call-7"})
    assert problem(answer)["code"] == "Internal"
    assert "secret" not in answer.text
    (record,) = caplog.records
    assert record.getMessage() == "request_failed"
    assert record.request_id == "call-7"
    assert "secret detail" in str(record.exc_info[1])


@pytest.mark.parametrize("given", ["call-7", "a" * 64, "0.B_c-9"])
def test_a_request_id_of_the_caller_is_kept(get, given):
    assert get("/healthz", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a" * 65, "a b", "<script>", "ä"])
def test_a_request_id_that_is_long_or_strange_is_replaced(get, given):
    answered = get("/healthz", headers={"x-request-id": given.encode()}).headers["x-request-id"]
    assert answered != given
    assert len(answered) == 32


def test_the_openapi_document_promises_problems_and_nothing_else(get):
    document = get("/openapi.json").json()
    operations = [one for path in document["paths"].values() for one in path.values()]
    assert len(operations) > 10
    for operation in operations:
        assert "422" not in operation["responses"]
        assert operation["responses"]["default"] == {"$ref": "#/components/responses/Problem"}
    content = document["components"]["responses"]["Problem"]["content"]
    assert content == {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_the_openapi_document_has_no_dangling_reference(get):
    document = get("/openapi.json").json()

    def references(node):
        if isinstance(node, dict):
            yield from [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            node = list(node.values())
        if isinstance(node, list):
            for child in node:
                yield from references(child)

    found = set(references(document))
    assert "#/components/schemas/InvalidParameter" in found
    for reference in found:
        target = document
        for key in reference.removeprefix("#/").split("/"):
            target = target[key]


def test_every_operation_is_described(get):
    document = get("/openapi.json").json()
    names = set()
    for path in document["paths"].values():
        for operation in path.values():
            assert operation["summary"]
            assert operation["description"]
            names.add(operation["operationId"])
    assert len(names) == sum(len(path) for path in document["paths"].values())
