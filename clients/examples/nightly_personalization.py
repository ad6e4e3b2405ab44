"""Every night a prompt for each of 100 users, learned from the few rows that they made that day.

Each user sorts voice commands into folders of their own, so the same words belong elsewhere for everyone, and no prompt
for all can be right. The first night begins with the prompt of the task, which knows what commands mean; run it again
(the next night): every user's training goes on from the prompt that they have.

$ python clients/examples/nightly_personalization.py            # writes nightly/report.html
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import time
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
from promptd_client import Client, Job, NotFoundError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, track

ROWS = Path(__file__).parents[2] / "server" / "promptd" / "demo" / "data" / "snips-intent.jsonl"
FOLDERS = {"home": " home", "work": " work", "fun": " fun"}  # folder -> the word that stands for it
TASK = "snips-intent"
METHOD = "prompt_tuning"
Rows = list[dict[str, str]]


def day_of(user: int, num_rows: int) -> tuple[Rows, Rows]:
    """Return what a user sorted today, and what they will sort tomorrow, which nobody has seen yet."""
    rows = [json.loads(line) for line in ROWS.read_bytes().splitlines()]
    own = random.Random(user)
    intents = sorted({row["label"] for row in rows})
    own.shuffle(intents)
    folder = {intent: list(FOLDERS)[number % len(FOLDERS)] for number, intent in enumerate(intents)}
    sample = own.sample(rows, 2 * num_rows)
    sorted_rows = [{"text": row["text"], "label": folder[row["label"]]} for row in sample]
    return sorted_rows[:num_rows], sorted_rows[num_rows:]


def start(client: Client, days: dict[str, tuple[Rows, Rows]], num_steps: int) -> list[Job]:
    """Start a job for each user in one call; whoever has a prompt already goes on from it, others from the task's."""
    jobs: list[Any] = [
        {"name": name, "rows": today, "base_prompt": _latest(client, name)} for name, (today, _) in days.items()
    ]
    settings = {"num_virtual_tokens": 20, "num_steps": num_steps, "batch_size": 8, "num_evaluations": 3}
    outcomes = client.jobs.create_many(
        jobs,
        template="{text} I keep this at",
        label_words=FOLDERS,
        method={"type": METHOD, METHOD: {"hyperparameters": settings}},
        publish_worse=True,
    )
    for outcome in outcomes:
        if not isinstance(outcome, Job):
            raise outcome
    return [job for job in outcomes if isinstance(job, Job)]


def _latest(client: Client, name: str) -> str:
    try:
        return client.prompts.get(name).name
    except NotFoundError:
        return TASK


def watch(client: Client, jobs: list[Job]) -> list[Job]:
    """Show one bar for all jobs until the last has ended; return them as they are then."""
    wanted = {job.id for job in jobs}
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bars = {name: progress.add_task(name, total=len(jobs)) for name in ("started", "done")}
        while True:
            now = [job for job in client.jobs.list() if job.id in wanted]
            progress.update(bars["started"], completed=sum(job.status != "queued" for job in now))
            progress.update(bars["done"], completed=sum(job.has_ended for job in now))
            if all(job.has_ended for job in now):
                return now
            time.sleep(2)


def report(scores: list[tuple[str, float, float, float]], seconds: float, folder: Path) -> Path:
    """Write one page with everybody's score before and after."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    left.scatter([s[1] for s in scores], [s[2] for s in scores], alpha=0.6, edgecolors="none")
    left.plot([0, 1], [0, 1], color="gray", linewidth=1)
    left.set(xlabel="accuracy without a prompt", ylabel="with the user's own", xlim=(0, 1), ylim=(0, 1))
    right.hist([s[2] - s[3] for s in scores], bins=20)
    right.axvline(0, color="gray", linewidth=1)
    right.set(xlabel="won over the user's most frequent folder", ylabel="users")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    lines = "".join(
        f"<tr><td>{name}<td>{bare:.0%}<td>{own:.0%}<td>{majority:.0%}" for name, bare, own, majority in sorted(scores)
    )
    folder.mkdir(exist_ok=True)
    page = folder / "report.html"
    page.write_text(
        "<!doctype html><meta charset=utf-8><title>Last night</title><style>body{font:16px system-ui;max-width:60em;"
        "margin:2em auto}td,th{text-align:right;padding:.1em 1em}img{max-width:100%}</style>"
        f"<h1>{len(scores)} prompts, {seconds:.0f} s</h1>"
        f"<p>On what users sorted the next day: {mean(s[2] for s in scores):.1%} right, without prompts"
        f" {mean(s[1] for s in scores):.1%}, by the most frequent folder {mean(s[3] for s in scores):.1%}.</p>"
        f"<img src='data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}' alt='scores of all users'>"
        f"<table><tr><th>user<th>no prompt<th>own prompt<th>most frequent{lines}</table>"
    )
    return page


def main() -> None:
    """Train, publish, measure, report."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--users", type=int, default=100)
    options.add_argument("--rows", type=int, default=40, help="rows of a user's day")
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--out", type=Path, default=Path("nightly"))
    given = options.parse_args()
    days = {f"user-{number:03}": day_of(number, given.rows) for number in range(given.users)}
    with Client() as client:
        started = time.monotonic()
        jobs = watch(client, start(client, days, given.steps))
        seconds = time.monotonic() - started
        scores = []
        for job in track(jobs, "measured"):
            if job.status != "succeeded":
                print(f"{job.prompt}: {job.status}, {job.error.message if job.error else ''}")
                continue
            found = client.prompts.evaluate(job.prompt, days[job.prompt][1])
            subjects = (found.bare_model, found.prompt, found.majority_class)
            scores.append((job.prompt, *(each.metrics["accuracy"] for each in subjects)))
    page = report(scores, seconds, given.out)
    print(f"{len(scores)} prompts in {seconds:.0f} s; {mean(s[2] for s in scores):.1%} right, see {page}")


if __name__ == "__main__":
    main()
