"""The client's error tree beside the server's."""

from __future__ import annotations

from collections.abc import Iterator

import promptd_client
import promptd_store.errors
import pytest
from promptd_client import APIError
from promptd_client.errors import error_class, error_from_body

from promptd.errors import ModelRefusedError, PromptdError


def _tree(root: type) -> Iterator[type]:
    for child in root.__subclasses__():
        yield child
        yield from _tree(child)


# A model is refused before there is a server to answer.
SERVER_ERRORS = [
    one for one in _tree(PromptdError) if one is not ModelRefusedError and one.__module__ == "promptd.errors"
]
STORE_ERRORS = list(_tree(promptd_store.errors.StoreError))


@pytest.mark.parametrize("error", SERVER_ERRORS, ids=lambda error: error.__name__)
def test_every_server_error_has_its_client_class(error: type[PromptdError]) -> None:
    """Each error of promptd.errors arrives as the client's class of the same name, with its own status."""
    body = {"error": {"message": "m", "type": error.type, "param": "p", "code": error.default_code}}
    arrived = error_from_body(body, error.status, request_id="r", retry_after_seconds=2.0)
    assert type(arrived).__name__ == error.__name__
    assert type(arrived) is getattr(promptd_client, error.__name__)
    assert (arrived.message, arrived.param, arrived.code, arrived.type) == ("m", "p", error.default_code, error.type)
    assert (arrived.status, arrived.request_id, arrived.retry_after_seconds) == (error.status, "r", 2.0)


@pytest.mark.parametrize("error", SERVER_ERRORS, ids=lambda error: error.__name__)
def test_the_trees_have_one_shape(error: type[PromptdError]) -> None:
    """A class that catches an error on the server catches it in the client too."""
    parents = [base.__name__ for base in error.__mro__ if issubclass(base, PromptdError) and base is not PromptdError]
    names = [base.__name__ for base in getattr(promptd_client, error.__name__).__mro__]
    assert set(parents) <= set(names)


@pytest.mark.parametrize("error", STORE_ERRORS, ids=lambda error: error.__name__)
def test_store_errors_arrive_typed(error: type[promptd_store.errors.StoreError]) -> None:
    """Whatever the store refuses arrives as a class of that status, never as the bare APIError."""
    arrived = error_class(error.default_status, error.default_code)
    assert arrived is not APIError
    assert arrived.status_code == error.default_status


def test_an_artifact_error_keeps_its_own_code() -> None:
    """Checks of an upload have many codes and one class."""
    arrived = error_from_body({"error": {"message": "m", "code": "shape_mismatch"}}, 422)
    assert isinstance(arrived, promptd_client.InvalidArtifactError) and arrived.code == "shape_mismatch"


def test_a_code_counts_only_under_its_status() -> None:
    """A code that another status happens to use does not change the class."""
    assert error_class(409, "overloaded") is promptd_client.ConflictError


@pytest.mark.parametrize("status", [418, 451])
def test_unknown_client_statuses_are_api_errors(status: int) -> None:
    """A status that this client does not know is still an APIError."""
    assert error_class(status, None) is APIError


def test_unknown_server_statuses_are_server_errors() -> None:
    """Gateways answer 502 and the like."""
    assert error_class(502, None) is promptd_client.ServerError


@pytest.mark.parametrize("body", [None, [], "text", {"error": "text"}, {"error": {"message": 7, "code": {}}}])
def test_any_body_becomes_an_error(body: object) -> None:
    """A proxy's page in place of our envelope does not break the client."""
    assert error_from_body(body, 500).status == 500


@pytest.mark.parametrize(
    ("code", "kind", "name"),
    [
        ("overloaded", "server_error", "OverloadedError"),
        ("numerical_error", "server_error", "NumericalError"),
        ("whatever", "invalid_request_error", "InvalidRequestError"),
        (None, None, "ServerError"),
    ],
)
def test_errors_inside_a_stream_need_no_status(code: str | None, kind: str | None, name: str) -> None:
    """Inside a stream the code, or the type, decides the class."""
    assert type(error_from_body({"error": {"message": "m", "code": code, "type": kind}}, None)).__name__ == name


def test_public_names_are_sorted_and_exist() -> None:
    """`__all__` is the promise: sorted, complete, and with every error in it."""
    assert promptd_client.__all__ == sorted(promptd_client.__all__)
    assert all(hasattr(promptd_client, name) for name in promptd_client.__all__)
    errors = {one.__name__ for one in _tree(promptd_client.PromptdError)} | {"PromptdError"}
    assert errors <= set(promptd_client.__all__)
