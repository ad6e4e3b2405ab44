"""Many tasks, one model: three classifiers and three writers asked at once, by people who know nothing of each other.

$ python clients/examples/many_tasks.py
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from promptd_client import Client
from rich.console import Console
from rich.table import Table

QUESTIONS = [
    ("snips-intent", "play some jazz by Miles Davis"),
    ("snips-intent", "will it rain in Lisbon tomorrow"),
    ("banking-topic", "How long does a transfer to another account take?"),
    ("banking-topic", "the machine has kept my card"),
    ("clinc-domain", "how many calories does an apple have"),
    ("clinc-domain", "book me a flight to Rome"),
    ("e2e-restaurant", "name[Cotto], eatType[coffee shop], food[Italian], area[riverside]"),
    ("bible-basic-english", "And it came to pass that the waters returned."),
    ("bible-american-standard", "And it came about that the waters came back."),
    ("promptd-demo", "Once upon a time"),
]
CLASSIFIERS = {"snips-intent", "banking-topic", "clinc-domain"}


def ask(client: Client, prompt: str, text: str) -> tuple[str, str]:
    """Return an answer and what is to say of it: the label's probability, or how many tokens were written."""
    if prompt in CLASSIFIERS:
        (found,) = client.classify(text, model=prompt).data
        return found.label, f"{max(found.probs):.0%} sure"
    answer = client.complete(text, model=prompt, max_tokens=24, temperature=0.0)
    return " ".join(answer.text.split()), f"{answer.usage.completion_tokens} tokens"


def main() -> None:
    """Ask everything at once; print who was told what."""
    table = Table("prompt", "input", "answer", "")
    with Client() as client, ThreadPoolExecutor(len(QUESTIONS)) as people:
        started = time.perf_counter()
        answers = list(people.map(lambda question: ask(client, *question), QUESTIONS))
        seconds = time.perf_counter() - started
    for (prompt, text), answer in zip(QUESTIONS, answers, strict=True):
        table.add_row(prompt, text, *answer)
    num_prompts = len({prompt for prompt, _ in QUESTIONS})
    Console().print(table, f"{len(QUESTIONS)} people, {num_prompts} tasks, one model: {seconds:.2f} s together")


if __name__ == "__main__":
    main()
