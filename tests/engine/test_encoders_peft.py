"""PEFT at batch size 1 as the oracle for encoders: prompts and heads that it wrote, scores that it gave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from promptd_store import encode, read_peft, write_peft
from transformers import AutoModelForSequenceClassification

from promptd.llm import LLM
from tests.engine.encoder_oracle import FIRST, LAST, library
from tests.peft_adapters import WARNS, adapter_configs

pytestmark = WARNS
TEXTS = [(FIRST, *range(5, 5 + length), LAST) for length in (3, 11, 24, 17)]


def base(folder: Path) -> AutoModelForSequenceClassification:
    """A fresh base model: PEFT changes the one that it is given."""
    return AutoModelForSequenceClassification.from_pretrained(folder)


@torch.no_grad()
def scores(model: torch.nn.Module, token_ids: tuple[int, ...]) -> torch.Tensor:
    """PEFT's logits of one text, `[num_classes]`."""
    ids = torch.tensor([token_ids])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_scores_equal_pefts(tiny_encoders: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Four adapters of every kind with a head each, saved by PEFT, loaded by us, mixed in one batch: PEFT's own
    scores, one text at a time; and back to PEFT bit for bit."""
    folders, expected = [], []
    for number, (name, config) in enumerate(adapter_configs("SEQ_CLS").items()):
        torch.manual_seed(number)
        tuned = get_peft_model(base(tiny_encoders[family]), config).eval()  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in (p for p in tuned.parameters() if p.requires_grad):
                parameter.add_(0.5 * torch.randn_like(parameter))
        expected.append(scores(tuned, TEXTS[number]))
        folders.append(tmp_path / name)
        tuned.save_pretrained(folders[-1])
    llm = LLM(tiny_encoders[family])
    found = torch.tensor(llm.pool(TEXTS, "classes", folders))
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=2e-4)
    swapped = torch.tensor(llm.pool(TEXTS, "classes", [*folders[1:], folders[0]]))
    assert ((swapped - found).abs().amax(1) > 1e-2).all()  # control
    for folder in folders:
        write_peft(read_peft(folder, llm.model.spec), tmp_path / "again")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("kind", ["soft", "prefix"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_peft_reads_what_we_write(tiny_encoders: dict[str, Path], tmp_path: Path, family: str, kind: str) -> None:
    """A prompt with a head of three classes, made here and written in PEFT's format, gives PEFT our scores."""
    llm = LLM(tiny_encoders[family])
    name, donor = ("prompt_embeddings", 2) if kind == "soft" else ("prefix", 6)
    prompt = library(tiny_encoders[family], family)[donor]
    head = {f"head.{part}": tensor[:3] if "dense" not in part else tensor for part, tensor in prompt.head.items()}
    artifact = encode(kind, {name: prompt.tensors[name], **head})
    write_peft(artifact, tmp_path, spec=llm.model.spec)
    tuned = PeftModel.from_pretrained(base(tiny_encoders[family]), tmp_path).eval()  # type: ignore[arg-type]
    (found,) = llm.pool(TEXTS[:1], "classes", [artifact])
    torch.testing.assert_close(torch.tensor(found), scores(tuned, TEXTS[0]), rtol=0, atol=2e-4)
