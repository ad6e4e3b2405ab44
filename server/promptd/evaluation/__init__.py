"""Evaluation of prompts through the engine's own requests: tasks, metrics, and one runner over several backends."""

from promptd.evaluation.backend import Backend, Question, Subject, check_greedy
from promptd.evaluation.beams import beam_search
from promptd.evaluation.client_backend import ClientBackend
from promptd.evaluation.entry import BARE_MODEL, ENSEMBLE, MAJORITY_CLASS
from promptd.evaluation.llm_backend import LLMBackend
from promptd.evaluation.metrics import PERCENT_METRICS
from promptd.evaluation.result import AnswerBy, EvaluationResult, RowPrediction
from promptd.evaluation.rows import read_rows
from promptd.evaluation.runner import evaluate
from promptd.evaluation.task import Task, task_of
from promptd.evaluation.tasks import TASKS

__all__ = [
    "BARE_MODEL",
    "ENSEMBLE",
    "MAJORITY_CLASS",
    "PERCENT_METRICS",
    "TASKS",
    "AnswerBy",
    "Backend",
    "ClientBackend",
    "EvaluationResult",
    "LLMBackend",
    "Question",
    "RowPrediction",
    "Subject",
    "Task",
    "beam_search",
    "check_greedy",
    "evaluate",
    "read_rows",
    "task_of",
]
