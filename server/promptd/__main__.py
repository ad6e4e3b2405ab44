"""`python -m promptd`."""

from promptd.cli import app

app()
