"""The engine's limits, frozen and checked once."""

from __future__ import annotations

from dataclasses import dataclass

from promptd.errors import InvalidRequestError

DEFAULT_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class EngineConfig:
    """Sizes in tokens, bytes and rows. `kv_cache_bytes` holds texts, `prompt_cache_bytes` holds learned prompts."""

    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    max_num_mixed_tokens: int | None = None
    """Tokens that a step reads beside rows that write, as far as that can be cut: whoever reads a long text delays
    everybody's next token by little (Sarathi-Serve, Agrawal et al. 2024, section 4). None: an eighth of
    what is there to be read, 32 at least and 256 at most; on a GPU, which computes some hundreds in the time of one,
    512; in any case three for two rows that write."""
    max_model_len: int | None = None
    kv_cache_bytes: int = DEFAULT_CACHE_BYTES
    prompt_cache_bytes: int = DEFAULT_CACHE_BYTES
    block_size: int = 16
    max_queue: int = 256
    max_queue_seconds: float | None = None
    """A request that was not started by then ends with an error: better soon than after its caller has gone."""
    max_first_token_seconds: float | None = None
    """A generation without a token by then ends with an error."""
    batch_wait_seconds: float = 0.0
    """How long an idle engine lets the first request wait for others that fill its batch."""
    enable_prefix_caching: bool = True
    strict: bool = False
    """A row's bits do not depend on its neighbours: fixed prefill chunks, no text-prefix reuse, no preemption."""

    def num_mixed_tokens(self, num_writing: int, num_unread: int, *, on_gpu: bool) -> int:
        """Return how many of `num_unread` tokens are read beside so many rows that write."""
        if self.max_num_mixed_tokens is not None:
            return self.max_num_mixed_tokens
        return max(3 * num_writing // 2, 512 if on_gpu else min(max(32, num_unread // 8), 256))

    def __post_init__(self) -> None:
        sizes = ("max_num_seqs", "max_num_batched_tokens", "kv_cache_bytes", "prompt_cache_bytes", "block_size")
        for name in (*sizes, "max_num_mixed_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequestError(f"{name} must be at least 1, got {value}", param=name)
        for name in ("max_queue_seconds", "max_first_token_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidRequestError(f"{name} must be above 0, got {value}", param=name)
        if not 0 <= self.batch_wait_seconds < 60:
            raise InvalidRequestError(
                f"batch_wait_seconds must be at least 0 and below 60, got {self.batch_wait_seconds}",
                param="batch_wait_seconds",
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidRequestError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), or running rows could not all decode in one step",
                param="max_num_batched_tokens",
            )
