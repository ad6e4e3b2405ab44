"""Everything that can be set, read once: command line first, then `PROMPTD_…` in the environment, then defaults."""

from __future__ import annotations

import ipaddress
from typing import Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

DEFAULT_TENANT = "default"
MIN_KEY_CHARS = 8
"""Of a static key."""
PLACEHOLDER = "change-me"
"""What keys of examples begin with."""


class Settings(BaseSettings):
    """The only reader of the environment."""

    model_config = SettingsConfigDict(env_prefix="PROMPTD_", extra="ignore", frozen=True)

    model: str | None = Field(
        None, description="Folder or hub id of the base model; the embedded demo where none is given"
    )
    served_model_name: str | None = Field(
        None, description="Name of the base model in the API; else the folder's last part"
    )
    host: str = Field("127.0.0.1", description="Address to listen on; anything but loopback needs keys")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on")
    store: str = Field("./promptd-data", description="Folder of the embedded store, or the URL of a Redis")
    blobs: str | None = Field(
        None, description="Folder or bucket for what is too large for Redis; Redis keeps all where none is given"
    )
    outage_seconds: float = Field(
        300.0, ge=0, description="While the store is away, prompts in memory are served for so long"
    )
    allow_volatile_store: bool = Field(False, description="Take a Redis that may lose what was acknowledged")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Serving dtype")
    quantization: Literal["none", "int8"] = Field("none", description="Multiply in 8 bits: CPU only, faster, not exact")
    threads: int | None = Field(None, ge=1, description="Threads that compute on the CPU; else one for each processor")
    tensor_parallel: int = Field(1, ge=1, description="Devices of this machine that a decoder is divided over")
    max_num_seqs: int = Field(16, ge=1, description="Rows that run at once")
    max_num_batched_tokens: int = Field(2048, ge=1, description="Tokens of one step")
    max_num_mixed_tokens: int | None = Field(
        None, ge=1, description="Tokens that a step reads beside rows that write; else 32 to 256, on a GPU 512"
    )
    max_model_len: int | None = Field(None, ge=1, description="Longest row; the model's own limit where none is given")
    kv_cache_bytes: int = Field(1 << 30, ge=1, description="K/V of texts")
    prompt_cache_bytes: int = Field(1 << 30, ge=1, description="K/V of learned prompts")
    max_queue: int = Field(256, ge=1, description="Requests that may wait")
    max_open_requests: int | None = Field(
        None, ge=1, description="Inference requests open at a time; else as many as run and wait, and a quarter more"
    )
    max_open_tokens: int | None = Field(
        None, ge=1, description="Tokens, in and out, that open requests may take; else each request's longest row"
    )
    max_open_upload_bytes: int = Field(1 << 30, ge=1, description="Bytes of files on their way, in or out, at a time")
    stall_seconds: float = Field(
        30.0, gt=0, description="A client that neither sends its body nor reads its answer for so long is let go"
    )
    stream_interval_seconds: float = Field(
        0.0, ge=0, le=1, description="Tokens of a stream that come within so long leave together"
    )
    max_queue_seconds: float | None = Field(None, gt=0, description="A request that waits longer ends with 503")
    max_first_token_seconds: float | None = Field(
        None, gt=0, description="A generation without a token by then ends with 504"
    )
    batch_wait_seconds: float = Field(
        0.0, ge=0, lt=60, description="How long a request may wait, when the engine is idle, for others to run with"
    )
    enable_prefix_caching: bool = Field(True, description="Reuse K/V of equal text prefixes")
    strict: bool = Field(False, description="A row's bits do not depend on its neighbours; slower")
    training: Literal["inline", "worker", "off"] = Field(
        "inline", description="Jobs run here beside requests, in `promptd worker` processes, or not at all"
    )
    training_seconds_per_step: float = Field(
        0.005, ge=0, description="What training may add, on average, to a step while requests run"
    )
    max_training_jobs: int = Field(16, ge=1, description="Jobs that train at once; they share passes")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="Where a worker answers /metrics and /livez; nowhere where not given"
    )
    checkpoint_seconds: float = Field(
        10.0, ge=0, description="Training that a killed worker may lose; 0 keeps every step"
    )
    request_timeout_seconds: float = Field(600.0, gt=0, description="A request that takes longer ends with an error")
    leave_seconds: float = Field(
        2.0, ge=0, description="At SIGTERM, time to serve on while /readyz says no: two checks of a load balancer"
    )
    drain_seconds: float = Field(30.0, ge=0, description="Time for open requests when the server stops")
    artifact_cache_bytes: int = Field(256 << 20, ge=0, description="Prompts kept in host memory")
    housekeeping_seconds: float = Field(600.0, gt=0, description="Time between two clean-ups of the store")
    garbage_age_seconds: float = Field(
        86400.0, ge=60, description="Files that no prompt names any more are deleted when they are this old"
    )
    keep_versions: int | None = Field(
        None, ge=1, description="Newest versions of each prompt that are kept, beside those in use; all where not given"
    )
    unused_days: int | None = Field(
        None, ge=1, description="Prompts that nobody has used for so long are deleted; none where not given"
    )
    max_queued_jobs: int = Field(10_000, ge=1, description="Training jobs of one tenant that may wait")
    max_running_jobs: int = Field(64, ge=1, description="Training jobs of one tenant that run at once, on all servers")
    job_history_days: float = Field(30.0, gt=0, description="Training jobs are listed for so long after their end")
    traces: str | None = Field(
        None, description="OpenTelemetry collector (OTLP over HTTP) that gets traces, such as http://127.0.0.1:4318"
    )
    max_body_bytes: int = Field(1 << 20, ge=1, description="Largest JSON body")
    max_upload_bytes: int = Field(64 << 20, ge=1, description="Largest uploaded file of training data")
    max_prefix_tokens: int = Field(
        2048, ge=1, description="Virtual tokens of an uploaded prompt; with the model's shapes, what its file may have"
    )
    uploads: Literal["none", "trained-here", "any"] = Field(
        "any", description="Learned prompts that tenants may upload: none, those trained here, or any"
    )
    probe_suite: str | None = Field(
        None, description="JSON lines that every prompt must pass before it is published, trained ones too"
    )
    admin_key: SecretStr | None = Field(None, description="The first admin key")
    key_secret: SecretStr | None = Field(
        None, min_length=16, description="What issued keys are hashed under; else the store keeps a random one"
    )
    api_keys: SecretStr | None = Field(None, description="tenant:key, comma separated")

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            parse_keys(value)
        return value

    @field_validator("port", mode="before")
    @classmethod
    def _check_port(cls, value: object) -> object:
        if isinstance(value, str) and value.startswith("tcp://"):
            raise ValueError(
                "Kubernetes has set PROMPTD_PORT, for a Service called promptd: the pod needs enableServiceLinks: false"
            )
        return value

    @model_validator(mode="after")
    def _check_tensor_parallel(self) -> Settings:
        if self.tensor_parallel > 1 and self.training == "inline":
            raise ValueError("--tensor-parallel: a divided model does not train; add --training worker or off")
        if self.tensor_parallel > 1 and (self.strict or self.quantization != "none"):
            raise ValueError("--tensor-parallel: --strict and --quantization need the whole model on one device")
        return self

    @model_validator(mode="after")
    def _check_secrets(self) -> Settings:
        if self.admin_key is not None and len(self.admin_key.get_secret_value()) < MIN_KEY_CHARS:
            raise ValueError(f"PROMPTD_ADMIN_KEY has fewer than {MIN_KEY_CHARS} characters")
        if len(set(self.secrets)) < len(self.secrets):
            raise ValueError("one secret for two purposes: admin key, key secret and the keys of tenants must differ")
        if not self.is_loopback and any(one.startswith(PLACEHOLDER) for one in self.secrets):
            raise ValueError(
                f"host {self.host!r} is reachable from outside, and a key still begins with {PLACEHOLDER!r}, as in an "
                "example: `openssl rand -hex 16` makes one"
            )
        return self

    @property
    def secrets(self) -> list[str]:
        """Every secret that is set."""
        found = [one.get_secret_value() for one in (self.admin_key, self.key_secret) if one is not None]
        return found + list(parse_keys(self.api_keys) if self.api_keys is not None else ())

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def parse_keys(value: SecretStr) -> dict[str, str]:
    """Read `tenant:key,tenant:key` into key -> tenant; raises `ValueError` naming the entry's place, never the key."""
    keys: dict[str, str] = {}
    for number, entry in enumerate(filter(None, (part.strip() for part in value.get_secret_value().split(","))), 1):
        tenant, separator, key = entry.partition(":")
        if not separator or len(key) < MIN_KEY_CHARS:
            raise ValueError(f"entry {number} is not tenant:key with a key of at least {MIN_KEY_CHARS} characters")
        if not _is_tenant(tenant):
            raise ValueError(f"entry {number} names no tenant: 1 to 64 letters, digits, '.', '_' or '-', not 'public'")
        if key in keys:
            raise ValueError(f"entry {number} repeats a key")
        keys[key] = tenant
    return keys


def _is_tenant(name: str) -> bool:
    from promptd_store import PromptNameError
    from promptd_store.names import PUBLIC_TENANT, check_tenant

    try:
        return check_tenant(name) != PUBLIC_TENANT
    except PromptNameError:
        return False
