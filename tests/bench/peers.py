"""The same weights under transformers and PEFT, each used the best way it offers for different soft prompts."""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from promptd.modeling import FrozenModel
from promptd.training import Encoded, Example, TaskFormat, encode_examples
from tests.bench.rows import Tokens


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the peers' remarks off the terminal."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plain_model(folder: Path) -> PreTrainedModel:
    """The weights as transformers serves them."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def _settings(max_tokens: int) -> dict[str, Any]:
    return {
        "max_new_tokens": max_tokens,
        "min_new_tokens": max_tokens,
        "do_sample": False,
        "eos_token_id": -1,
        "pad_token_id": 0,
    }


class StackedEmbeddings:
    """`generate` over `[soft prompt; embedded text]`, or over texts alone, in static batches of rows of one length."""

    def __init__(self, model: PreTrainedModel, batch_size: int) -> None:
        self._model = model
        self._batch_size = batch_size

    @torch.no_grad()
    def run(
        self, prompts: Sequence[torch.Tensor] | None, texts: Sequence[Tokens], max_tokens: int
    ) -> tuple[float, list[list[int]]]:
        """Return (seconds, answers); None for no prompts."""
        answers: list[list[int]] = []
        began = time.perf_counter()
        with quiet():
            for start in range(0, len(texts), self._batch_size):
                own = slice(start, start + self._batch_size)
                rows = self._model.get_input_embeddings()(torch.tensor(texts[own]))
                if prompts is not None:
                    rows = torch.cat([torch.stack(tuple(prompts[own])), rows], 1)
                mask = torch.ones(rows.shape[:2], dtype=torch.int64)
                made = self._model.generate(inputs_embeds=rows, attention_mask=mask, **_settings(max_tokens))  # type: ignore[operator]
                answers += made.tolist()
        return time.perf_counter() - began, answers


class PeftOneAtATime:
    """PEFT, an adapter a prompt: `set_adapter`, then `generate` with one row, for every request.

    Prompts are soft (`[tokens, hidden]`, prompt tuning) or prefixes (`[layers, 2, heads, tokens, head_dim]`).
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[torch.Tensor]) -> None:
        with quiet():
            for number, prompt in enumerate(prompts):
                is_soft = prompt.ndim == 2
                kind, count = (
                    (PromptTuningConfig, prompt.shape[0]) if is_soft else (PrefixTuningConfig, prompt.shape[3])
                )
                config = kind(task_type="CAUSAL_LM", num_virtual_tokens=count)
                if number == 0:
                    self._model = get_peft_model(model, config, adapter_name="p0").eval()
                else:
                    self._model.add_adapter(f"p{number}", config)
                rows = prompt if is_soft else prompt.permute(3, 0, 1, 2, 4).reshape(count, -1)
                self._model.prompt_encoder[f"p{number}"].embedding.weight.data.copy_(rows)

    @torch.no_grad()
    def answer(self, number: int, text: Tokens, max_tokens: int) -> list[int]:
        """Answer one text under prompt number so and so."""
        with quiet():
            self._model.set_adapter(f"p{number}")
            ids = torch.tensor([text])
            made = self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **_settings(max_tokens))
        answer: list[int] = made[0, len(text) :].tolist()
        return answer

    def run(self, texts: Sequence[Tokens], max_tokens: int) -> tuple[float, list[list[int]]]:
        """Return (seconds, answers); text number i runs under prompt number i."""
        began = time.perf_counter()
        answers = [self.answer(number, text, max_tokens) for number, text in enumerate(texts)]
        return time.perf_counter() - began, answers


class ContinuousBatching:
    """transformers' `generate_batch`. It takes token ids only: no prompts, so each row has fewer keys than ours."""

    def __init__(self, model: PreTrainedModel, batch_size: int) -> None:
        self._model = model
        self._config = ContinuousBatchingConfig(
            page_size=32,
            num_blocks=256,
            max_batch_tokens=2048,
            max_requests_per_batch=batch_size,
            auto_switch_to_flash=False,
            allow_block_sharing=False,
        )

    def run(self, texts: Sequence[Tokens], max_tokens: int) -> tuple[float, list[list[int]]]:
        """Return (seconds, answers)."""
        settings = _settings(max_tokens)
        del settings["min_new_tokens"]
        began = time.perf_counter()
        with quiet():
            made = self._model.generate_batch(  # type: ignore[operator]
                [list(text) for text in texts],
                generation_config=GenerationConfig(**settings),
                continuous_batching_config=self._config,
            )
        seconds = time.perf_counter() - began
        return seconds, [list(one.generated_tokens) for one in made.values()]


class PeftTraining:
    """PEFT prompt tuning with AdamW over padded batches of the same rows, loss on the targets alone."""

    def __init__(
        self, model: PreTrainedModel, frozen: FrozenModel, examples: Sequence[Example], batch_size: int, count: int
    ) -> None:
        with quiet():
            self._model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count))
        self._model.eval()
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-3)
        rows = encode_examples(frozen, TaskFormat(append_eos=False), examples, count)
        self._batches = itertools.cycle(
            [self._padded(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
        )

    @staticmethod
    def _padded(rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        whole = [row.text_ids + row.target_ids for row in rows]
        longest = max(map(len, whole))
        shape = (len(rows), longest)
        batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
        batch["labels"] = torch.full(shape, -100)
        for at, (row, ids) in enumerate(zip(rows, whole, strict=True)):
            batch["input_ids"][at, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][at, : len(ids)] = 1
            batch["labels"][at, len(row.text_ids) : len(ids)] = torch.tensor(row.target_ids)
        return batch

    def run(self, num_steps: int) -> None:
        """Take so many optimizer steps."""
        for _ in range(num_steps):
            loss = self._model(**next(self._batches)).loss
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
