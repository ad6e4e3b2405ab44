"""Targets of sequence-to-sequence models: single tokens by the kernel, and what torch's attention makes of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from promptd.modeling import attention_rows
from promptd.modeling.attention import Site
from promptd.modeling.attention_rows import RowAttention
from promptd.modeling.decode_kernel import decode_kernel
from promptd.modeling.kv_pool import KVPool
from promptd.modeling.packed_batch import PackedBatch, PackedRow

HEADS, DIM, REACH = 4, 16, 12
SOURCE = [(200, 40)]


class DistanceBias:
    """A table by distance, asked for as T5's is."""

    def __init__(self) -> None:
        self.behind = torch.randn(HEADS, REACH + 1, generator=torch.Generator().manual_seed(2))

    def between(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Keys in front of their queries."""
        distance = (queries.unsqueeze(1) - keys).clamp(0, REACH)
        return self.behind.flip(1)[:, distance].unsqueeze(0)


BIAS = DistanceBias()


def batch_of() -> PackedBatch:
    """Three single tokens, behind a prefix or not, two of them over one source; and a row of three tokens."""
    pool = KVPool(
        num_layers=1, num_slots=320, num_kv_heads=HEADS, head_dim=DIM, dtype=torch.float32, device=torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(0)
    for stored in (pool.keys, pool.values):
        stored.copy_(torch.randn(stored.shape, generator=generator))
    return PackedBatch(
        [
            PackedRow([1], 25, [105], [(0, 20), (100, 5)], cross=SOURCE),
            PackedRow([1], 0, [110], [], cross=SOURCE),
            PackedRow([1, 2, 3], 20, [120, 121, 122], [(0, 20)], cross=[(30, 10), (240, 7)]),
            PackedRow([1], 3, [133], [(130, 3)], cross=[(30, 10), (250, 70)]),
        ],
        pool,
    )


def attend(site: Site) -> torch.Tensor:
    """The same numbers each time."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, HEADS, 6, DIM, generator=generator) for _ in range(3))
    return RowAttention(batch_of()).attend(site, query, key, value)


@pytest.mark.parametrize(
    "site", [Site(0, 0.25), Site(0, 1.0, bias=BIAS), Site(0, 0.25, is_cross=True)], ids=["plain", "bias", "cross"]
)
@pytest.mark.usefixtures("compiler")
def test_the_kernel_equals_torch(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both give the same; with the kernel only the row of several tokens goes to torch's attention."""
    assert decode_kernel(torch.float32) is not None
    asked: list[int] = []
    flash: Callable[..., tuple[torch.Tensor, torch.Tensor]] = attention_rows.flash_attention

    def counted(query: torch.Tensor, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(query.shape[2])
        return flash(query, *args)

    monkeypatch.setattr(attention_rows, "flash_attention", counted)
    with_kernel = attend(site)
    assert set(asked) == {3}
    asked.clear()
    monkeypatch.setattr(attention_rows, "kernel_over", lambda keys: None)
    torch.testing.assert_close(with_kernel, attend(site), atol=2e-6, rtol=1e-5)
    assert asked.count(1) >= 3
