"""Pre-train the embedded base model from a folder of text.

    python -m promptd.demo.pretrain prepare --corpus DIR --data DIR --out RUN
    python -m promptd.demo.pretrain train   --out RUN --tokens 20e6     (stable rate; stop and resume at will)
    python -m promptd.demo.pretrain anneal  --out RUN --tokens 6e6      (longer context, rate to 0, exports RUN/model)

The learning rate follows warm-up, stable, decay: `train` may be run again for more tokens at any time, and
`anneal` starts from the newest checkpoint without touching it. Matrices of the blocks learn with Muon, the rest with
AdamW. With CUDA present everything runs there in bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from promptd.demo.corpus import EOS_TOKEN, prepare

WARMUP_TOKENS = 400_000
MATRIX_LR, OTHER_LR = 0.01, 2e-3


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """A small Llama: RoPE, RMSNorm, SwiGLU, grouped-query attention, tied embeddings."""
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.hidden_size // 64,
            num_key_value_heads=max(1, args.hidden_size // 128),
            intermediate_size=3 * args.hidden_size,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
    )


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the 2-D weights of the blocks, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.05),
        torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def batches(tokens: np.ndarray, context: int, per_batch: int, seed: int, skip: int) -> Iterator[torch.Tensor]:
    """Yield `[rows, context + 1]` windows in an order fixed by the seed; `skip` windows were already seen."""
    windows = (len(tokens) - 1) // context
    rows = max(1, per_batch // context)
    epoch, start = divmod(skip, windows)
    while True:
        order = np.random.default_rng(seed + epoch).permutation(windows)
        for at in range(start, windows - rows + 1, rows):
            chosen = [tokens[w * context : w * context + context + 1] for w in order[at : at + rows]]
            yield torch.from_numpy(np.stack(chosen).astype(np.int64))
        epoch, start = epoch + 1, 0


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats; bf16 matrix products, fp32 softmax."""
    with torch.autocast(rows.device.type, dtype=torch.bfloat16):
        hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, path: Path, context: int, device: torch.device) -> float:
    """Loss in nats per token over the held-out documents."""
    tokens = np.fromfile(path, dtype=np.uint16)[: 200 * context + 1]
    total, count = 0.0, 0
    for rows in batches(tokens, context, 8 * context, 0, 0):
        total, count = total + loss_of(model, rows.to(device)).item(), count + 1
        if count >= (len(tokens) - 1) // context // 8:
            return total / count
    return math.nan


def run(args: argparse.Namespace, anneal: bool) -> None:
    """Train from the newest checkpoint for `args.tokens` more tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    tokens = np.fromfile(args.out / "train.bin", dtype=np.uint16)
    model = build_model(args)
    torch.nn.Module.to(model, device)
    optimizers = build_optimizers(model)
    checkpoint = args.out / "checkpoint.pt"
    state: dict[str, Any] = {"tokens": 0}
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    seen, start = state["tokens"], state["tokens"]
    base_rates = [MATRIX_LR, OTHER_LR]
    compiled = torch.compile(loss_of)
    context = args.anneal_context if anneal else args.context
    began = saved_at = time.monotonic()
    smooth = None
    seed = args.seed + (1000 if anneal else 0)
    for rows in batches(tokens, context, args.batch_tokens, seed, 0 if anneal else start // context):
        left = 1 - (seen - start) / args.tokens
        if left <= 0:
            break
        scale = min(1.0, (seen + args.batch_tokens) / WARMUP_TOKENS) * (left if anneal else 1.0)
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        loss = compiled(model, rows.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += rows.numel() - len(rows)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        now = time.monotonic()
        if now - saved_at > 60:
            saved_at = now
            rate = (seen - start) / (now - began)
            print(f"{seen / 1e6:.2f}M tokens  loss {smooth:.3f}  {rate:.0f} tokens/s", flush=True)
            if not anneal:
                save(checkpoint, model, optimizers, seen)
    if anneal:
        export(args, model, seen, held_out_loss(model, args.out / "held_out.bin", 512, device))
    else:
        save(checkpoint, model, optimizers, seen)


def save(path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], seen: int) -> None:
    """Write the checkpoint beside the old one, then replace it."""
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "tokens": seen}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def export(args: argparse.Namespace, model: LlamaForCausalLM, seen: int, loss: float) -> None:
    """Write `RUN/model`: bf16 safetensors, the tokenizer, and what was measured."""
    target = args.out / "model"
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(target)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(args.out / "tokenizer.json"),
        bos_token=EOS_TOKEN,
        eos_token=EOS_TOKEN,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(target)
    facts = {
        "tokens": seen,
        "held_out_loss_nats_per_token": round(loss, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (target / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))


def main() -> None:
    """Parse the command line and run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["prepare", "train", "anneal"])
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=20e6)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=5)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--anneal-context", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.stage == "prepare":
        prepare(args.corpus, args.data, args.out, args.vocab_size, args.seed)
    else:
        run(args, anneal=args.stage == "anneal")


if __name__ == "__main__":
    main()
