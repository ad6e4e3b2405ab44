"""The frozen base model: loaded once, shared by every request and every training job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from promptd_store import BaseModelSpec, PromptArtifact
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from promptd.modeling.attention import Attends
from promptd.modeling.attention_pooled import PooledAttention
from promptd.modeling.attention_rows import RowAttention
from promptd.modeling.families.base import Arrangement, Asked, Family
from promptd.modeling.fingerprint import digest_of_tensors
from promptd.modeling.kv_pool import KVPool, kv_bytes_per_token
from promptd.modeling.packed_batch import PackedBatch
from promptd.modeling.step_graph import StepGraph
from promptd.modeling.text_ids import TextIds

EMBEDDING_CHUNK = 4096
"""Tokens embedded at a time where the whole vocabulary is looked at."""


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """A model of transformers whose attention is ours and whose weights never change."""

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: BaseModelSpec
    served_name: str
    family: Family
    """What only this kind of model does; nobody but this class and the loader asks for more than it tells."""
    step_graph: StepGraph | None = field(default=None, kw_only=True)
    """Its forward for single tokens without its Python, where there is one."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.hf.device

    def use_device(self) -> None:
        """Have the calling thread compute on the weights' device: which one it is belongs to a thread."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """The serving dtype of weights, activations and K/V."""
        return self.hf.dtype

    @property
    def bos_token_id(self) -> int | None:
        """The tokenizer's BOS, or None."""
        token_id: int | None = self.tokenizer.bos_token_id
        return token_id

    def begins_after_bos(self, chain: Sequence[PromptArtifact]) -> bool:
        """Whether BOS stands in front of a chain of prompts."""
        return self.family.begins_after_bos(chain)

    def takes_special_tokens(self, chain: Sequence[PromptArtifact]) -> bool:
        """Whether the tokenizer's special tokens stand in front of the text behind a chain: no second BOS unasked."""
        stated = chain[-1].manifest.add_special_tokens if chain else True
        return not self.begins_after_bos(chain) if stated is None else stated

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every token of the vocabulary that ends a generation: the tokenizer's and the generation config's."""
        ids: set[int] = set()
        config = getattr(self.hf, "generation_config", None)
        for source in (self.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
            if source is not None:
                ids.update(source if isinstance(source, list) else [source])
        return frozenset(token_id for token_id in ids if token_id < self.spec.vocab_size)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embed `[num_tokens]` ids as the model does (Gemma scales here), `[num_tokens, hidden_size]`."""
        embedded: torch.Tensor = self.hf.get_input_embeddings()(token_ids)
        return embedded

    @property
    def reads_whole(self) -> bool:
        """Whether answers are read off texts, which are read whole, and nothing is written."""
        return self.family.reads_whole

    @property
    def has_sources(self) -> bool:
        """Whether texts are read whole, be it as the answer or for a target that is written."""
        return "source" in self.family.banks

    @property
    def stores_text(self) -> bool:
        """Whether texts leave keys and values behind that take room in the K/V pool."""
        return self.family.stores_text

    @property
    def num_stored_layers(self) -> int:
        """Layers of a slot of the K/V pool: those of the deepest stack."""
        return max(self.family.sizes.num_layers, self.family.sizes.num_encoder_layers)

    @property
    def class_labels(self) -> tuple[str, ...] | None:
        """The classes that the base model's own head tells apart; None where it has none."""
        return self.family.class_labels

    def arrange(self, asked: Asked) -> Arrangement:
        """Say where the parts of a request go. Raises `InvalidRequestError` for what this model cannot answer."""
        return self.family.arrange(asked, lambda text: list(self.text_ids.of(text)))

    def num_prompt_tokens(self, chain: Sequence[PromptArtifact]) -> int:
        """Return how many tokens of the model's length a chain of prompts takes."""
        texts = (artifact.manifest.text for artifact in chain)
        learned = sum(artifact.num_virtual_tokens for artifact in chain)
        return learned + sum(len(self.text_ids.of(text)) for text in texts if text) + self.begins_after_bos(chain)

    def pool_sizes(self, num_slots: int) -> dict[str, Any]:
        """Return what a K/V pool of so many slots is made with."""
        sizes = self.family.sizes
        return {
            "num_layers": self.num_stored_layers,
            "num_slots": num_slots,
            "num_kv_heads": sizes.num_kv_heads,
            "head_dim": sizes.head_dim,
            "dtype": self.dtype,
            "device": self.device,
        }

    @property
    def bytes_per_slot(self) -> int:
        """Bytes that one token's keys and values take on a device."""
        sizes = self.family.sizes
        return kv_bytes_per_token(self.num_stored_layers, sizes.num_kv_heads, sizes.head_dim, self.dtype)

    def make_pool(self, num_slots: int) -> KVPool:
        """Make room for the keys and values of so many tokens."""
        return KVPool(**self.pool_sizes(num_slots))

    def split_prefix(self, prefix: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cut a prefix into its banks, `[num_layers, 2, num_kv_heads, n, head_dim]` each."""
        return self.family.split_prefix(prefix)

    def forward(
        self, embeds: torch.Tensor, positions: torch.Tensor, logits_index: torch.Tensor, batch: Attends
    ) -> torch.Tensor:
        """Run packed tokens `[num_tokens, hidden_size]` at `positions`; return logits `[num_logits, vocab_size]`."""
        return self.family.read(embeds, positions, logits_index, batch)

    def read_whole(self, embeds: torch.Tensor, positions: torch.Tensor, batch: Attends) -> torch.Tensor:
        """Read packed sources `[num_tokens, hidden_size]` at `positions`; return hidden states of the same shape."""
        return self.family.read_whole(embeds, positions, batch)

    def pooled(self, first: torch.Tensor) -> torch.Tensor:
        """Return what a linear classification head reads, of rows' first hidden states `[num_rows, hidden_size]`."""
        return self.family.pooled(first)

    def predict_words(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of words at masks, of hidden states `[num_rows, hidden_size]`: `[num_rows, vocab_size]`."""
        return self.family.predict_words(hidden)

    def cross_keys(self, hidden: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield what each of the target's layers reads of sources: see `Family.cross_keys`."""
        return self.family.cross_keys(hidden)

    @torch.no_grad()
    def forward_packed(self, batch: PackedBatch) -> torch.Tensor:
        """Read one step's targets and return logits `[num_logits, vocab_size]`; K/V of all its tokens are stored."""
        forward = self.step_graph if self.step_graph is not None and batch.is_step else self.forward
        return forward(self.embed_rows(batch), batch.position_ids, batch.logits_index, attention_for(batch))

    @torch.no_grad()
    def read_sources(self, batch: PackedBatch) -> list[torch.Tensor]:
        """Read one step's sources whole; return each row's hidden states `[num_tokens, hidden_size]`.

        Where the rows have slots, the keys and values that their targets will read are stored there.
        """
        hidden = self.family.read_whole(self.embed_rows(batch), batch.position_ids, attention_for(batch))
        if len(batch.slot_mapping):
            for layer, (key, value) in enumerate(self.family.cross_keys(hidden)):
                batch.pool.write(layer, batch.slot_mapping, key, value)
        return list(hidden.split([len(row.token_ids) for row in batch.rows]))

    def steps_over(self, pool: KVPool) -> Callable[[PackedBatch], torch.Tensor] | None:
        """Return what reads steps over one engine's pool faster than `forward_packed`; None where nothing does."""
        if self.device.type != "cuda" or self.family.reads_whole:
            return None
        from promptd.modeling.cuda_steps import CudaSteps

        return CudaSteps(self, pool)

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be begun while the one before still computes: what decides it is known on the device."""
        return self.device.type == "cuda"

    def embed_rows(self, batch: PackedBatch) -> torch.Tensor:
        """Embed a batch's tokens `[num_tokens, hidden_size]`, soft prompts in their places."""
        embeds = self.embed(batch.input_ids)
        for start, row in zip(batch.row_starts, batch.rows, strict=True):
            for virtual in row.virtual:
                first = start + virtual.offset
                embeds[first : first + virtual.embeds.shape[0]] = batch.pool.stage(virtual.embeds).to(embeds)
        return embeds

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenize one text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    @cached_property
    def text_ids(self) -> TextIds:
        """Token ids of text prompts."""
        return TextIds(lambda text: self.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Turn tokens back into text."""
        text = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)

    @cached_property
    @torch.no_grad()
    def embedding_std(self) -> float:
        """Standard deviation of the embedding output over the whole vocabulary: the unit of a prompt's learning."""
        total = squares = torch.zeros((), dtype=torch.float64)
        for ids in torch.arange(self.spec.vocab_size, device=self.device).split(EMBEDDING_CHUNK):
            rows = self.embed(ids).double()
            total, squares = total + rows.sum().cpu(), squares + rows.square().sum().cpu()
        count = self.spec.vocab_size * self.spec.hidden_size
        return float((squares / count - (total / count) ** 2) ** 0.5)

    def digest(self) -> str:
        """Digest of the weights as they are in memory now: equal before and after any training."""
        return digest_of_tensors(dict(self.hf.named_parameters()))


def attention_for(batch: PackedBatch) -> Attends:
    """Pick the attention of the batch: row by row where rows are more than texts that continue."""
    if not batch.is_plain:
        return RowAttention(batch)
    if batch.pool.keys.is_cuda:
        from promptd.modeling.attention_triton import TritonAttention

        attention: Attends = TritonAttention.of(batch)
        return attention
    return PooledAttention(batch)
