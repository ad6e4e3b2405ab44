"""Text to tokens: reads the pre-training corpus, trains the tokenizer, writes a flat token file.

A corpus folder holds `*.txt.xz` files: UTF-8, one document is a run of lines, documents are parted by an
empty line. A data folder holds task sets (`<set>/train.jsonl[.gz]`); only the *texts* of the train splits of
sets with a clear, commercial licence are read, never their labels.
"""

from __future__ import annotations

import gzip
import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

EOS_TOKEN = "<|endoftext|>"  # noqa: S105 - a token of the vocabulary

#: Share of each corpus file that is used (the model is too small to see all of it once).
CORPUS_SHARES = {
    "tinystories_sample": 1.0,
    "bible_basic_english_train": 1.0,
    "us_presidential_speeches": 1.0,
    "wikinews_en": 0.5,
    "short_stories": 0.35,
    "wikipedia_en_2021_new": 0.35,
    "wikipedia_en_2015_00": 0.1,
}
#: Task sets whose licence is clear and commercial -> the text fields that are read.
TASK_FIELDS = {
    "snips": ("text",),
    "clinc150": ("text",),
    "banking77": ("text",),
    "e2e_nlg": ("input", "target"),
    "author_style": ("text",),
    "shakespeare_characters": ("input", "target"),
    "bible_style": ("input", "target"),
    "politeness": ("text",),
    "goemotions": ("text",),
    "wikinews_headlines": ("input", "target"),
}


def corpus_documents(folder: Path, shares: dict[str, float], rng: random.Random) -> Iterator[str]:
    """Yield the chosen share of the documents of every corpus file."""
    for name, share in shares.items():
        with lzma.open(folder / f"{name}.txt.xz", "rt", encoding="utf-8") as file:
            for document in file.read().split("\n\n"):
                if document.strip() and rng.random() < share:
                    yield document.strip()


def task_documents(folder: Path) -> Iterator[str]:
    """Yield documents made of the texts of task rows: eight texts of one field a document, without labels.

    Inputs and targets are shuffled apart, so that the model never sees a row's answer behind its question: what a
    learned prompt scores on such a task is the prompt's doing.
    """
    for name, fields in TASK_FIELDS.items():
        path = next(p for p in sorted((folder / name).iterdir()) if p.name.startswith("train.jsonl"))
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        for field in fields:
            texts = sorted({row[field] for row in rows})
            random.Random(f"{name} {field}").shuffle(texts)
            for start in range(0, len(texts), 8):
                yield "\n".join(texts[start : start + 8])


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; id 0 is the end-of-text token, used as BOS, EOS and pad."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def prepare(corpus: Path, data: Path, out: Path, vocab_size: int, seed: int) -> None:
    """Write `tokenizer.json`, `train.bin` and `held_out.bin` (uint16 tokens, one EOS after each document)."""
    rng = random.Random(seed)
    documents = list(corpus_documents(corpus, CORPUS_SHARES, rng)) + list(task_documents(data))
    rng.shuffle(documents)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(documents[: len(documents) // 3], vocab_size)
    tokenizer.save(str(out / "tokenizer.json"))
    eos = tokenizer.token_to_id(EOS_TOKEN)
    streams: dict[str, list[np.ndarray]] = {"train": [], "held_out": []}
    for start in range(0, len(documents), 256):
        for offset, encoding in enumerate(tokenizer.encode_batch(documents[start : start + 256])):
            split = "held_out" if (start + offset) % 250 == 0 else "train"
            streams[split].append(np.array([*encoding.ids, eos], dtype=np.uint16))
    for split, chunks in streams.items():
        np.concatenate(chunks).tofile(out / f"{split}.bin")
