"""Prometheus' text format, read where its library is not installed: samples, rates, percentiles."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')

Samples = Mapping[str, Sequence[tuple[Mapping[str, str], float]]]
"""Name -> (labels, value) of each of its samples."""
Buckets = Sequence[tuple[float, float]]
"""(upper bound, number of observations up to it), the bounds growing."""


def parse(text: str) -> Samples:
    """Read a scrape; lines that are none are passed over."""
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for line in text.splitlines():
        match = None if line.startswith("#") else _SAMPLE.match(line)
        if match is not None:
            labels = dict(_LABEL.findall(match[2] or ""))
            found.setdefault(match[1], []).append((labels, float(match[3])))
    return found


def total(samples: Samples, name: str) -> float | None:
    """Return the sum of a metric's samples; None where the server has no such metric."""
    return sum(value for _, value in samples[name]) if name in samples else None


def buckets(samples: Samples, name: str) -> Buckets:
    """Return a histogram's buckets, added up over its labels."""
    sums: dict[float, float] = {}
    for labels, value in samples.get(f"{name}_bucket", ()):
        bound = float(labels["le"])
        sums[bound] = sums.get(bound, 0.0) + value
    return sorted(sums.items())


def since(before: Buckets, after: Buckets) -> Buckets:
    """Return what was observed between two scrapes."""
    old = dict(before)
    return [(bound, value - old.get(bound, 0.0)) for bound, value in after]


def quantile(share: float, cumulative: Buckets) -> float | None:
    """Return a percentile as Prometheus' `histogram_quantile` does: linear within a bucket; None without data."""
    observed = cumulative[-1][1] if cumulative else 0.0
    if observed <= 0:
        return None
    rank, low, below = share * observed, 0.0, 0.0
    for bound, value in cumulative:
        if value >= rank and value > below:
            return low if bound == float("inf") else low + (bound - low) * (rank - below) / (value - below)
        low, below = (low if bound == float("inf") else bound), value
    return low
