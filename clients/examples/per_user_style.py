"""Two users' styles from one model: the same verse under each user's prompt, written at the same time, out of one batch.

$ python clients/examples/per_user_style.py
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from promptd_client import AsyncClient
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

USERS = {"Alice": "bible-american-standard", "Bob": "bible-basic-english"}
DATA = Path(__file__).parents[2] / "server" / "promptd" / "demo" / "data"


async def write(client: AsyncClient, verse: str) -> None:
    """Stream every user's version of a verse side by side."""
    said = dict.fromkeys(USERS, "")

    def panels() -> Columns:
        return Columns([Panel(text, title=f"{user}: {USERS[user]}", width=52) for user, text in said.items()])

    async def follow(user: str) -> None:
        async with await client.stream(verse, model=USERS[user], max_tokens=40, temperature=0.0) as stream:
            async for event in stream:
                said[user] += event.text
                live.update(panels())

    with Live(panels(), refresh_per_second=20) as live:
        await asyncio.gather(*map(follow, USERS))


async def loss(client: AsyncClient, model: str | None, rows: list[dict[str, str]]) -> float:
    """Return the nats per token of the texts that rows end with: how surprising they are under a prompt."""
    total, count = 0.0, 0
    inputs = [row["text"] + "\n" + row["completion"] for row in rows]
    echoed = await client.complete(
        inputs,
        model=model,
        echo=True,
        logprobs=0,
        max_tokens=0,
        apply_template=False,  # these texts are whole already
    )
    for row, choice in zip(rows, echoed.choices, strict=True):
        scores, offsets = choice.logprobs.token_logprobs, choice.logprobs.text_offset
        target = [score for score, at in zip(scores, offsets, strict=True) if at > len(row["text"])]
        total, count = total - sum(target), count + len(target)
    return total / count


async def main(verse: str) -> None:
    """Show both styles, then by numbers that each prompt is its own user's."""
    table = Table("whose held-out verses", "no prompt", *(f"{user}'s prompt" for user in USERS), title="nats per token")
    async with AsyncClient() as client:
        await write(client, verse)
        for user, prompt in USERS.items():
            rows = [json.loads(line) for line in (DATA / f"{prompt}.jsonl").read_bytes().splitlines()[:20]]
            losses = await asyncio.gather(*(loss(client, model, rows) for model in (None, *USERS.values())))
            best = min(losses)
            table.add_row(f"{user}'s", *(f"[bold]{each:.3f}[/]" if each == best else f"{each:.3f}" for each in losses))
    Console().print(table)


if __name__ == "__main__":
    asyncio.run(main(" ".join(sys.argv[1:]) or "And the king said to his servants, Go and see what the people do."))
