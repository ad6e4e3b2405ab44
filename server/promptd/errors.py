"""Every error a caller can meet, as one tree.

PromptdError                     500 internal_error
├── InvalidRequestError          400 invalid_value           a field is wrong; names field and value
│   ├── ContextLengthError       400 context_length_exceeded
│   └── NoChatTemplateError      400 no_chat_template
├── AuthenticationError          401 invalid_api_key
├── PermissionDeniedError        403 insufficient_scope
├── NotFoundError                404 not_found
│   ├── ModelNotFoundError       404 model_not_found         also: prompt absent or foreign
│   └── RouteNotFoundError       404 route_not_found
├── MethodNotAllowedError        405 method_not_allowed
├── ConflictError                409 conflict
│   ├── PromptModelMismatchError 409 prompt_not_available_for_model
│   ├── QuarantinedError         409 prompt_quarantined      the prompt made non-finite numbers; an admin may lift it
│   └── TrainingOffError         409 training_off            this server takes no training jobs
├── PreconditionFailedError      412 precondition_failed
├── SlowClientError              408 client_too_slow         nothing of its body came for too long
│   └── SlowReaderError          408 reader_too_slow         its answer waited for too long
├── PayloadTooLargeError         413 payload_too_large
├── InvalidArtifactError         422 invalid_artifact        an upload failed a check; `code` says which
├── RateLimitError               429 rate_limit_exceeded     the caller's own limit is reached; `code` says which
│   └── QuotaError               429 insufficient_quota      used up; asking again does not help
├── NumericalError               500 numerical_error         non-finite logits; this row only
├── EngineDeadError              503 engine_dead
├── OverloadedError              503 overloaded              queue full; carries Retry-After
├── ShuttingDownError            503 shutting_down
├── DeadlineExceededError        504 deadline_exceeded
└── ModelRefusedError            (start-up) the base model cannot be served exactly
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class PromptdError(Exception):
    """Base class. `status` is the HTTP status, `code` the machine-readable reason, `type` OpenAI's error type."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.retry_after_seconds = retry_after_seconds
        self.headers = dict(headers or {})
        """Headers that go with the answer."""


class InvalidRequestError(PromptdError):
    """A field of the request is wrong; `param` names it and the message shows its value."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"


class ContextLengthError(InvalidRequestError):
    """Virtual tokens + text + max_tokens exceed the model's length."""

    default_code = "context_length_exceeded"


class NoChatTemplateError(InvalidRequestError):
    """The base model's tokenizer has no chat template."""

    default_code = "no_chat_template"


class AuthenticationError(PromptdError):
    """No key, or one that is not known."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class PermissionDeniedError(PromptdError):
    """The key is good but may not do this."""

    status = 403
    type = "permission_error"
    default_code = "insufficient_scope"


class NotFoundError(PromptdError):
    """The thing does not exist, or is not the caller's: the two look identical."""

    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class ModelNotFoundError(NotFoundError):
    """No base model and no prompt of this name for this caller."""

    default_code = "model_not_found"


class RouteNotFoundError(NotFoundError):
    """No such route."""

    default_code = "route_not_found"


class MethodNotAllowedError(PromptdError):
    """The route exists, the method does not."""

    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class ConflictError(PromptdError):
    """The request contradicts the present state."""

    status = 409
    type = "invalid_request_error"
    default_code = "conflict"


class PromptModelMismatchError(ConflictError):
    """The prompt exists, but for another base model."""

    default_code = "prompt_not_available_for_model"


class QuarantinedError(ConflictError):
    """The model's numbers were not finite with this version of the prompt; it is not served until an admin says so."""

    default_code = "prompt_quarantined"


class TrainingOffError(ConflictError):
    """This server was started without training."""

    default_code = "training_off"


class PreconditionFailedError(PromptdError):
    """If-Match or If-None-Match did not hold."""

    status = 412
    type = "invalid_request_error"
    default_code = "precondition_failed"


class SlowClientError(PromptdError):
    """The client sends nothing of what it announced."""

    status = 408
    type = "invalid_request_error"
    default_code = "client_too_slow"


class SlowReaderError(SlowClientError):
    """The client does not read its answer; the row that made it was ended."""

    default_code = "reader_too_slow"


class PayloadTooLargeError(PromptdError):
    """The body exceeds its limit."""

    status = 413
    type = "invalid_request_error"
    default_code = "payload_too_large"


class InvalidArtifactError(PromptdError):
    """An uploaded prompt failed a check; nothing was stored."""

    status = 422
    type = "invalid_request_error"
    default_code = "invalid_artifact"


class RateLimitError(PromptdError):
    """A limit of this caller is reached; others are not affected."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"
    retryable = True


class QuotaError(RateLimitError):
    """What the caller may have is used up: asking again does not help, deleting something or a larger quota does."""

    type = "insufficient_quota"
    default_code = "insufficient_quota"
    retryable = False


class NumericalError(PromptdError):
    """This row's logits were not finite; other rows did not notice."""

    default_code = "numerical_error"


class EngineDeadError(PromptdError):
    """The engine thread ended; the process must be restarted."""

    status = 503
    default_code = "engine_dead"
    retryable = True


class OverloadedError(PromptdError):
    """The server's own limit is reached."""

    status = 503
    default_code = "overloaded"
    retryable = True


class ShuttingDownError(PromptdError):
    """The server is draining."""

    status = 503
    default_code = "shutting_down"
    retryable = True


class DeadlineExceededError(PromptdError):
    """The request's deadline passed before it was done."""

    status = 504
    default_code = "deadline_exceeded"
    retryable = True


class ModelRefusedError(PromptdError):
    """The base model has a feature that would not be served exactly; the message names the layer."""

    default_code = "model_refused"
