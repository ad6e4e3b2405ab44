"""Every error of the prompt store, as one tree. `status` is the HTTP status that the API answers with.

StoreError                        500 store_error
├── ArtifactError                 422 (each check has its own `code`; 409 base_mismatch, 413 artifact_too_large)
├── TemplateError                 400 template_invalid | template_field_missing | template_too_large |
│                                     rendered_text_too_large
├── PromptNameError               400 invalid_prompt_name | 409 prompt_name_reserved
├── PromptNotFoundError           404 prompt_not_found             absent and foreign look the same
├── PromptModelMismatchError      409 prompt_not_available_for_model
├── PromptChainBrokenError        409 prompt_chain_broken          what a prompt stands behind was deleted
├── SharingError                  400 sharing_invalid
├── PreconditionFailedError       412 precondition_failed          If-Match / If-None-Match
├── CheckFailedError              409 check_failed                 transact() found another etag
├── LimitReachedError             429 insufficient_quota           a tenant's quota: asking again does not help
├── TenantErasedError             409 tenant_erased                its name is never used again
├── UserErasedError               409 user_erased
├── LeaseLostError                409 lease_lost                   a newer owner has the lease
├── BlobNotFoundError             500 blob_not_found
├── BlobCorruptError              500 blob_corrupt                 digest mismatch; the file was set aside
├── StoreUnavailableError         503 store_unavailable            disk full, I/O error, locked too long, Redis away
├── StoreNotEmptyError            409 store_not_empty              a copy would mix two stores
├── RecordTooNewError             503 record_too_new               written by a newer release
├── StoreAddressError             (start-up) 400 store_address_invalid
└── VolatileStoreError            (start-up) the store would lose what it has acknowledged; one line per fault
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar


class StoreError(Exception):
    """Base class: `message` for people, `code` for programs, `param` names the field, `status` is for HTTP."""

    default_status: ClassVar[int] = 500
    default_code: ClassVar[str] = "store_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, status: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.status = status or self.default_status


class ArtifactError(StoreError):
    """Uploaded bytes failed a check. `code` says which, `param` and the message name the field and its value."""

    default_status = 422
    default_code = "invalid_artifact"

    def __init__(self, code: str, message: str, param: str | None = None, *, status: int | None = None) -> None:
        super().__init__(message, code=code, param=param, status=status)


class TemplateError(StoreError):
    """A template is malformed, or a field that it names was not given."""

    default_status = 400
    default_code = "template_invalid"


class PromptNameError(StoreError):
    """A prompt or tenant name breaks the name rules, or is reserved."""

    default_status = 400
    default_code = "invalid_prompt_name"


class PromptNotFoundError(StoreError):
    """No such prompt for this tenant: absent, deleted and foreign are indistinguishable."""

    default_status = 404
    default_code = "prompt_not_found"


class PromptModelMismatchError(StoreError):
    """The prompt exists, but no version of it was made for this base model."""

    default_status = 409
    default_code = "prompt_not_available_for_model"


class PromptChainBrokenError(StoreError):
    """The prompt is there, but not what it was learned behind."""

    default_status = 409
    default_code = "prompt_chain_broken"


class SharingError(StoreError):
    """With whom a prompt should be shared is nobody that it can be shared with."""

    default_status = 400
    default_code = "sharing_invalid"


class PreconditionFailedError(StoreError):
    """If-Match or If-None-Match did not hold."""

    default_status = 412
    default_code = "precondition_failed"


class CheckFailedError(StoreError):
    """A check of `transact` did not hold; nothing was written. `key` names the record."""

    default_status = 409
    default_code = "check_failed"

    def __init__(self, key: str, expected: str | None, actual: str | None) -> None:
        super().__init__(f"record {key!r} has etag {actual!r}, expected {expected!r}", param=key)
        self.key = key
        self.expected = expected
        self.actual = actual


class LimitReachedError(StoreError):
    """What is held already and what would come to it are more than the quota; nothing was written.

    `key` names the count. Answered as OpenAI's clients know it: they do not ask again.
    """

    default_status = 429
    default_code = "insufficient_quota"
    type = "insufficient_quota"
    headers: ClassVar[Mapping[str, str]] = {"x-should-retry": "false"}

    def __init__(self, key: str, held: int, amount: int, limit: int) -> None:
        what = key.split(":")[2]
        super().__init__(f"{held} {what.replace('_', ' ')} are held and {amount} more wanted; {limit} are allowed")
        self.param = what
        self.key = key
        self.held = held
        self.amount = amount
        self.limit = limit


class TenantErasedError(StoreError):
    """The tenant was erased, and nothing is ever written for it again."""

    default_status = 409
    default_code = "tenant_erased"

    def __init__(self, tenant: str) -> None:
        super().__init__(f"tenant {tenant!r} was erased", param="tenant")
        self.tenant = tenant


class UserErasedError(StoreError):
    """The end user whom this would belong to was erased while it was on its way."""

    default_status = 409
    default_code = "user_erased"


class LeaseLostError(StoreError):
    """The lease was released or taken over; whoever held this epoch must stop."""

    default_status = 409
    default_code = "lease_lost"

    @classmethod
    def of(cls, key: str, owner: str, epoch: int) -> LeaseLostError:
        """Say which lease."""
        return cls(f"lease {key!r} of {owner!r} (epoch {epoch}) is lost", param=key)


class BlobNotFoundError(StoreError):
    """No blob of this digest for this tenant."""

    default_code = "blob_not_found"


class BlobCorruptError(StoreError):
    """The stored bytes no longer have their digest. They were set aside and are never served."""

    default_code = "blob_corrupt"


class StoreUnavailableError(StoreError):
    """The backend could not do it now; nothing was acknowledged."""

    default_status = 503
    default_code = "store_unavailable"
    retryable = True


class StoreNotEmptyError(StoreError):
    """The target of a copy holds something else."""

    default_status = 409
    default_code = "store_not_empty"


class RecordTooNewError(StoreError):
    """A record of a schema that this release does not know: let a newer one answer."""

    default_status = 503
    default_code = "record_too_new"


class StoreAddressError(StoreError):
    """The address of a store cannot be read; the message never shows its password."""

    default_status = 400
    default_code = "store_address_invalid"


class VolatileStoreError(StoreError):
    """The store is set up so that it would lose or refuse data; `faults` has one line for each reason."""

    default_code = "store_volatile"

    def __init__(self, where: str, faults: Sequence[str]) -> None:
        super().__init__("\n".join(f"store {where}: {fault}" for fault in faults))
        self.faults = tuple(faults)
