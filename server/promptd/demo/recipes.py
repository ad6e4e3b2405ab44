"""The demo's prompts: which data, which text around it, which method; only data of clear, commercial licences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from promptd.training import MethodConfig, PTuningV2Config, ResidualConfig, TaskFormat, TrainingConfig

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """One prompt: rows of a data set, how they read, how the prompt is trained."""

    name: str
    title: str
    dataset: str
    attribution: str
    row: Callable[[Row], dict[str, str] | None]
    """One row of the set -> a training row, or None to leave it out."""
    task: TaskFormat
    training: TrainingConfig
    weight: float = 1.0
    """Share of the time budget, relative to the other recipes."""
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    splits: tuple[str, str | None, str] = ("train", "validation", "test")
    """Files for training, validation (None: a hash split of the training rows) and the held-out scores."""
    rival: str | None = None
    """The other user of the same task: its prompt is scored on this one's held-out rows."""


def _labels(field: str, words: Mapping[str, str]) -> Callable[[Row], dict[str, str] | None]:
    def row(source: Row) -> dict[str, str] | None:
        return {"text": source["text"], "label": source[field]} if source[field] in words else None

    return row


def _pairs(user: str | None = None) -> Callable[[Row], dict[str, str] | None]:
    def row(source: Row) -> dict[str, str] | None:
        chosen = user is None or source["user"] == user
        return {"text": source["input"], "completion": source["target"] + "\n"} if chosen else None

    return row


def _banking_row(source: Row) -> dict[str, str] | None:
    for topic, parts in _BANKING_RULES:
        if any(part in source["label"] for part in parts):
            return {"text": source["text"].strip(), "label": topic}
    return None


def _config(method: MethodConfig, *, batch_size: int, num_steps: int) -> TrainingConfig:
    return TrainingConfig(method=method, batch_size=batch_size, num_steps=num_steps, num_evaluations=8)


_LABEL_PROMPT = ResidualConfig(num_virtual_tokens=20, init="class_labels", learning_rate=1.0)
_TEXT_PROMPT = ResidualConfig(num_virtual_tokens=20, learning_rate=1.0)
_PREFIX = PTuningV2Config(num_virtual_tokens=20, learning_rate=0.1)

_ABOUT = "{text} This is about the"
"""Asks for a word the way running text does: a small model knows this better than "Topic:"."""

_LINE = TaskFormat("{text}\n", append_eos=False)
"""One line in, one line out: the model has seen lines end, so that ending one need not be learned."""

_SNIPS = {
    "AddToPlaylist": " playlist",
    "BookRestaurant": " restaurant",
    "GetWeather": " weather",
    "PlayMusic": " music",
    "RateBook": " book",
    "SearchCreativeWork": " show",
    "SearchScreeningEvent": " movie",
}
_CLINC = {
    "banking": " account",
    "credit_cards": " card",
    "kitchen_and_dining": " food",
    "home": " list",
    "auto_and_commute": " car",
    "travel": " travel",
    "utility": " phone",
    "work": " work",
    "small_talk": " joke",
    "meta": " name",
}
_BANKING = {
    "top_up": " top",
    "cash": " cash",
    "transfer": " transfer",
    "exchange": " exchange",
    "identity": " identity",
    "card": " card",
}
_BANKING_RULES = (
    ("top_up", ("top_up", "topping_up")),
    ("cash", ("cash", "atm")),
    ("transfer", ("transfer", "beneficiary", "receiving_money")),
    ("exchange", ("exchange", "fiat", "currenc")),
    ("identity", ("identity", "passcode", "pin_", "_pin", "personal", "verify")),
    ("card", ("card", "contactless")),
)
"""Topic -> parts of the names of the 77 intents that belong to it; the first match counts."""

_BIBLE = "Carlson, Riddell & Rockmore 2018, StyleTransferBibleData; public-domain translations of the Bible"

RECIPES = (
    Recipe(
        name="snips-intent",
        title="Intent of a voice command (7 intents)",
        dataset="snips",
        attribution="Coucke et al. 2018, Snips Voice Platform; CC0 1.0",
        row=_labels("label", _SNIPS),
        task=TaskFormat(_ABOUT, _SNIPS),
        training=_config(_LABEL_PROMPT, batch_size=32, num_steps=700),
        max_tokens=1,
        splits=("train", None, "validation"),
    ),
    Recipe(
        name="banking-topic",
        title="Topic of a banking question (6 topics made of 67 of the 77 intents)",
        dataset="banking77",
        attribution="Casanueva et al. 2020, Banking77; CC BY 4.0",
        row=_banking_row,
        task=TaskFormat(_ABOUT, _BANKING),
        training=_config(_LABEL_PROMPT, batch_size=32, num_steps=700),
        weight=1.2,
        max_tokens=2,
        splits=("train", None, "test"),
    ),
    Recipe(
        name="clinc-domain",
        title="Domain of a question to an assistant (10 domains; out-of-scope rows left out)",
        dataset="clinc150",
        attribution="Larson et al. 2019, CLINC150 (oos-eval); CC BY 3.0",
        row=_labels("domain", _CLINC),
        task=TaskFormat(_ABOUT, _CLINC),
        training=_config(_PREFIX, batch_size=32, num_steps=700),
        weight=1.2,
        max_tokens=1,
    ),
    Recipe(
        name="e2e-restaurant",
        title="Restaurant description from attributes",
        dataset="e2e_nlg",
        attribution="Novikova, Dusek & Rieser 2017, The E2E Dataset; CC BY-SA 4.0",
        row=_pairs(),
        task=_LINE,
        training=_config(_PREFIX, batch_size=16, num_steps=1200),
        weight=2.0,
        stop=("\n",),
    ),
    Recipe(
        name="bible-american-standard",
        title="One user's style: a verse as the American Standard Version says it",
        dataset="bible_style",
        attribution=_BIBLE,
        row=_pairs("to_american_standard"),
        task=_LINE,
        training=_config(_TEXT_PROMPT, batch_size=16, num_steps=600),
        stop=("\n",),
        rival="bible-basic-english",
    ),
    Recipe(
        name="bible-basic-english",
        title="Another user's style: a verse in Basic English",
        dataset="bible_style",
        attribution=_BIBLE,
        row=_pairs("to_basic_english"),
        task=_LINE,
        training=_config(_TEXT_PROMPT, batch_size=16, num_steps=600),
        stop=("\n",),
        rival="bible-american-standard",
    ),
)
