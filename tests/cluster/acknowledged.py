"""What was acknowledged, looked for afterwards."""

from __future__ import annotations

from promptd_store import PromptCatalog, StoreError


async def broken(catalog: PromptCatalog, acknowledged: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of some versions, by name and digest, that are not there, or not whole."""
    lost = []
    for name, version in acknowledged:
        try:
            record = await catalog.resolve("default", f"{name}@{version}")
            assert (await catalog.load(record)).version == version
        except StoreError:
            lost.append((name, version))
    return lost
