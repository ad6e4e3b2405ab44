"""`promptd bench`: how fast is this server, or this model in this process, with many prompts in the mix.

workload  what is asked: prompts of mixed kinds and sizes, texts, lengths; the same for the same seed
target    who is asked, in this process; `server` is the same over HTTP
driver    asks: a fixed number of requests open at once, warm-up, repeats
report    what came of it: medians over the repeats, as a table and as JSON
command   the options of `promptd bench`
"""

from promptd.bench.command import run
from promptd.bench.driver import run_bench
from promptd.bench.report import BenchReport, RunSummary
from promptd.bench.target import EngineTarget, Target
from promptd.bench.workload import BenchPrompt, BenchRequest, Lengths, ModelSizes, Workload

__all__ = [
    "BenchPrompt",
    "BenchReport",
    "BenchRequest",
    "EngineTarget",
    "Lengths",
    "ModelSizes",
    "RunSummary",
    "Target",
    "Workload",
    "run",
    "run_bench",
]
