"""Every error of the client, as one tree. Those that the server sends carry its names.

PromptdError
├── ConnectionFailedError          no reply: refused, timed out or cut off
│   └── StreamBrokenError          a stream ended before its last event
├── InvalidReplyError              the reply is not what this API promises
├── LocalFileError                 a file or PEFT folder on this machine is not usable; nothing was sent
└── APIError                       the server's typed error: status, code, type, param, request_id
    ├── InvalidRequestError        400
    │   ├── ContextLengthError         context_length_exceeded
    │   └── NoChatTemplateError        no_chat_template
    ├── AuthenticationError        401
    ├── PermissionDeniedError      403
    ├── NotFoundError              404
    │   ├── ModelNotFoundError         model_not_found, prompt_not_found
    │   └── RouteNotFoundError         route_not_found
    ├── MethodNotAllowedError      405
    ├── SlowClientError            408, the body did not come
    │   └── SlowReaderError            reader_too_slow: the answer was not read
    ├── ConflictError              409
    │   ├── PromptModelMismatchError   prompt_not_available_for_model
    │   ├── QuarantinedError           prompt_quarantined
    │   └── TrainingOffError           training_off
    ├── PreconditionFailedError    412
    ├── PayloadTooLargeError       413
    ├── InvalidArtifactError       422, `code` says which check
    ├── RateLimitError             429
    └── ServerError                5xx
        ├── NumericalError         500 numerical_error
        ├── UnavailableError       503
        │   ├── EngineDeadError        engine_dead
        │   ├── OverloadedError        overloaded
        │   └── ShuttingDownError      shutting_down
        └── DeadlineExceededError  504
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar


class PromptdError(Exception):
    """Base class of everything that this package raises on purpose."""


class ConnectionFailedError(PromptdError):
    """No reply came: the server could not be reached, was too slow, or cut the connection."""


class StreamBrokenError(ConnectionFailedError):
    """A stream ended before its last event; what came until then is valid."""


class InvalidReplyError(PromptdError):
    """The reply is not what this API promises: another server, or another version of it."""


class LocalFileError(PromptdError):
    """A file or PEFT folder on this machine is not usable. Nothing was sent."""


class APIError(PromptdError):
    """The server answered with an error. `code` is for programs, `param` names the field."""

    status_code: ClassVar[int | None] = None
    codes: ClassVar[frozenset[str]] = frozenset()
    """What the server's `code` may be; empty: any code of this status."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        type: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.type = type
        self.param = param
        self.request_id = request_id
        self.retry_after_seconds = retry_after_seconds


class InvalidRequestError(APIError):
    """A field of the request is wrong."""

    status_code = 400


class ContextLengthError(InvalidRequestError):
    """Virtual tokens + text + max_tokens exceed the model's length."""

    codes = frozenset({"context_length_exceeded"})


class NoChatTemplateError(InvalidRequestError):
    """The base model's tokenizer has no chat template."""

    codes = frozenset({"no_chat_template"})


class AuthenticationError(APIError):
    """No key, or one that is not known."""

    status_code = 401


class PermissionDeniedError(APIError):
    """The key is good but may not do this."""

    status_code = 403


class NotFoundError(APIError):
    """The thing does not exist, or is not the caller's."""

    status_code = 404


class ModelNotFoundError(NotFoundError):
    """No base model and no prompt of this name for this caller."""

    codes = frozenset({"model_not_found", "prompt_not_found"})


class RouteNotFoundError(NotFoundError):
    """No such route: the address is probably not that of a promptd server."""

    codes = frozenset({"route_not_found"})


class MethodNotAllowedError(APIError):
    """The route exists, the method does not."""

    status_code = 405


class SlowClientError(APIError):
    """Nothing of the announced body came for too long."""

    status_code = 408


class SlowReaderError(SlowClientError):
    """The answer was not read while it was made; the server ended it."""

    codes = frozenset({"reader_too_slow"})


class ConflictError(APIError):
    """The request contradicts the present state."""

    status_code = 409


class PromptModelMismatchError(ConflictError):
    """The prompt exists, but for another base model."""

    codes = frozenset({"prompt_not_available_for_model"})


class QuarantinedError(ConflictError):
    """The model's numbers were not finite with this version of the prompt; it is not served until an admin says so."""

    codes = frozenset({"prompt_quarantined"})


class TrainingOffError(ConflictError):
    """This server takes no training jobs."""

    codes = frozenset({"training_off"})


class PreconditionFailedError(APIError):
    """If-Match or If-None-Match did not hold."""

    status_code = 412


class PayloadTooLargeError(APIError):
    """The body exceeds the server's limit."""

    status_code = 413


class InvalidArtifactError(APIError):
    """An uploaded prompt failed a check; nothing was stored."""

    status_code = 422


class RateLimitError(APIError):
    """Too many requests for this key."""

    status_code = 429


class QuotaError(RateLimitError):
    """What this tenant may have is used up: asking again does not help."""

    codes = frozenset({"insufficient_quota", "too_many_requests_at_once", "too_many_tokens_at_once"})


class ServerError(APIError):
    """The server failed; the request may be right."""

    status_code = 500


class NumericalError(ServerError):
    """This request's logits were not finite."""

    codes = frozenset({"numerical_error"})


class UnavailableError(ServerError):
    """The server cannot do it now."""

    status_code = 503


class EngineDeadError(UnavailableError):
    """The engine thread ended; the server must be restarted."""

    codes = frozenset({"engine_dead"})


class OverloadedError(UnavailableError):
    """The server's queue is full."""

    codes = frozenset({"overloaded"})


class ShuttingDownError(UnavailableError):
    """The server is draining."""

    codes = frozenset({"shutting_down"})


class DeadlineExceededError(ServerError):
    """The request's deadline passed before it was done."""

    status_code = 504


def _tree(root: type[APIError]) -> Iterator[type[APIError]]:
    for child in root.__subclasses__():
        yield child
        yield from _tree(child)


_BY_STATUS: Mapping[int, type[APIError]] = {
    one.status_code: one for one in _tree(APIError) if one.status_code is not None and "status_code" in vars(one)
}
_BY_CODE: Mapping[str, type[APIError]] = {code: one for one in _tree(APIError) for code in one.codes}


_STATUS_BY_TYPE: Mapping[str, int] = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "rate_limit_error": 429,
}


def error_class(status: int, code: str | None) -> type[APIError]:
    """Return the class of a status and code; a code counts only under its own status."""
    named = _BY_CODE.get(code or "")
    if named is not None and named.status_code == status:
        return named
    return _BY_STATUS.get(status, ServerError if status >= 500 else APIError)


def error_from_body(
    body: Any, status: int | None, *, request_id: str | None = None, retry_after_seconds: float | None = None
) -> APIError:
    """Turn `{"error": {"message", "type", "param", "code"}}`, or whatever else came, into the typed error.

    Inside a stream there is no status any more: the code, or else the type, stands for it.
    """
    plain = body.get("error") if isinstance(body, Mapping) else None
    fields = plain if isinstance(plain, Mapping) else {}
    texts = {name: fields[name] if isinstance(fields.get(name), str) else None for name in ("type", "param", "code")}
    if status is None:
        named = _BY_CODE.get(texts["code"] or "")
        status = (named.status_code if named else None) or _STATUS_BY_TYPE.get(texts["type"] or "", 500)
    return error_class(status, texts["code"])(
        str(fields.get("message") or f"the server answered {status} without a reason"),
        status=status,
        request_id=request_id,
        retry_after_seconds=retry_after_seconds,
        **texts,
    )
