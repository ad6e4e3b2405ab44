"""Scores of generated texts, computed in a process of their own.

BLEU and ROUGE are plain Python for seconds. In a thread they would hold the interpreter's lock, for which the engine's
thread would then wait at every operation.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence

from promptd.errors import PromptdError
from promptd.evaluation import metrics


async def score_texts(
    names: Sequence[str], answers: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> list[dict[str, float]]:
    """Return the named metrics of every subject's texts, `[num_subjects][num_inputs]`, over the same references."""
    asked = json.dumps({"names": names, "answers": answers, "references": references})
    # -P: what lies beside the file is not for import. A cancelled caller leaves the process to end by itself.
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-P", metrics.__file__], input=asked, capture_output=True, text=True
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise PromptdError(f"the metrics {list(names)!r} could not be computed: {reason}")
    scores: list[dict[str, float]] = json.loads(done.stdout)
    return scores
