"""The prompt store: what a learned prompt is, how it is checked, kept and found. Knows nothing of HTTP or engines."""

from promptd_store.artifact import (
    DTYPES,
    PREFIX_TENSOR,
    SOFT_TENSOR,
    TARGET_TENSOR,
    BaseModelSpec,
    PromptArtifact,
)
from promptd_store.base import Add, Append, BlobInfo, Check, Event, HasBlob, Lease, Put, Record, Store, Subscription
from promptd_store.bounds import Bounds, largest_file
from promptd_store.cache import ArtifactCache, CacheStats
from promptd_store.catalog import PromptCatalog
from promptd_store.chains import MAX_CHAIN_PROMPTS, exact_name, extend
from promptd_store.codec import decode, encode, to_native
from promptd_store.embedded import EmbeddedStore
from promptd_store.errors import (
    ArtifactError,
    BlobCorruptError,
    BlobNotFoundError,
    CheckFailedError,
    LeaseLostError,
    LimitReachedError,
    PreconditionFailedError,
    PromptChainBrokenError,
    PromptModelMismatchError,
    PromptNameError,
    PromptNotFoundError,
    RecordTooNewError,
    SharingError,
    StoreAddressError,
    StoreError,
    StoreNotEmptyError,
    StoreUnavailableError,
    TemplateError,
    TenantErasedError,
    UserErasedError,
    VolatileStoreError,
)
from promptd_store.garbage import collect_garbage, drop_unnamed, trim_changes, trim_events
from promptd_store.holdings import (
    PROMPTS,
    STORED_BYTES,
    Recount,
    check_room,
    count_prompts,
    day_of,
    held_key,
    hold,
    number_held,
    quota_key,
)
from promptd_store.integrity import find_faults
from promptd_store.log_tail import LogTail
from promptd_store.manifest import Manifest, PromptKind, TensorInfo
from promptd_store.names import PromptRef, check_name, check_tenant, events_log, parse_name, parse_ref
from promptd_store.naming_blobs import naming_blobs
from promptd_store.opening import is_shared, open_store, shown_address
from promptd_store.peft import read_peft, to_peft, write_peft
from promptd_store.reading import read_prompt
from promptd_store.record import PromptRecord
from promptd_store.retention import prune_unused, prune_versions
from promptd_store.scanning import scan_records, scan_tenants
from promptd_store.template import render_template, template_fields
from promptd_store.transfer import copy_store

__all__ = [
    "DTYPES",
    "MAX_CHAIN_PROMPTS",
    "PREFIX_TENSOR",
    "PROMPTS",
    "SOFT_TENSOR",
    "STORED_BYTES",
    "TARGET_TENSOR",
    "Add",
    "Append",
    "ArtifactCache",
    "ArtifactError",
    "BaseModelSpec",
    "BlobCorruptError",
    "BlobInfo",
    "BlobNotFoundError",
    "Bounds",
    "CacheStats",
    "Check",
    "CheckFailedError",
    "EmbeddedStore",
    "Event",
    "HasBlob",
    "Lease",
    "LeaseLostError",
    "LimitReachedError",
    "LogTail",
    "Manifest",
    "PreconditionFailedError",
    "PromptArtifact",
    "PromptCatalog",
    "PromptChainBrokenError",
    "PromptKind",
    "PromptModelMismatchError",
    "PromptNameError",
    "PromptNotFoundError",
    "PromptRecord",
    "PromptRef",
    "Put",
    "Record",
    "RecordTooNewError",
    "Recount",
    "SharingError",
    "Store",
    "StoreAddressError",
    "StoreError",
    "StoreNotEmptyError",
    "StoreUnavailableError",
    "Subscription",
    "TemplateError",
    "TenantErasedError",
    "TensorInfo",
    "UserErasedError",
    "VolatileStoreError",
    "check_name",
    "check_room",
    "check_tenant",
    "collect_garbage",
    "copy_store",
    "count_prompts",
    "day_of",
    "decode",
    "drop_unnamed",
    "encode",
    "events_log",
    "exact_name",
    "extend",
    "find_faults",
    "held_key",
    "hold",
    "is_shared",
    "largest_file",
    "naming_blobs",
    "number_held",
    "open_store",
    "parse_name",
    "parse_ref",
    "prune_unused",
    "prune_versions",
    "quota_key",
    "read_peft",
    "read_prompt",
    "render_template",
    "scan_records",
    "scan_tenants",
    "shown_address",
    "template_fields",
    "to_native",
    "to_peft",
    "trim_changes",
    "trim_events",
    "write_peft",
]
