"""Sequence-to-sequence models are served, not trained yet: a job says so instead of failing inside the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from promptd.errors import InvalidRequestError
from promptd.training.plan import JobData, make_job
from tests.engine.harness import frozen
from tests.training.site import CONTENT, spec_of


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_job_is_refused_with_a_reason(tiny_seq2seq: dict[str, Path], name: str) -> None:
    """The error names what cannot be done, and has a code of its own."""
    with pytest.raises(InvalidRequestError, match="only uploaded") as caught:
        make_job(frozen(tiny_seq2seq[name]), spec_of(None, 0), JobData(CONTENT, None))
    assert (caught.value.code, caught.value.param) == ("training_not_supported", "model")
