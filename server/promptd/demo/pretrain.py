"""Pre-train the embedded base model from a folder of text.

    python -m promptd.demo.pretrain prepare --corpus DIR --data DIR --out RUN
    python -m promptd.demo.pretrain train   --out RUN --tokens 20e6     (stable rate; stop and resume at will)
    python -m promptd.demo.pretrain anneal  --out RUN --tokens 6e6      (longer context, rate to 0, exports RUN/model)

With `--shape t5` or `--shape bart` it is a model that reads a source (`shapes.py`), for the same three stages.

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
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from promptd.demo.corpus import EOS_TOKEN, prepare
from promptd.demo.shapes import OBJECTIVES, SHAPES, loss_of, take_embeddings

WARMUP_TOKENS = 400_000
MATRIX_LR, OTHER_LR = 0.01, 2e-3


def build_model(args: argparse.Namespace) -> PreTrainedModel:
    """Make the model of a shape; `args.embeddings` is the folder of a model whose embeddings it begins with."""
    torch.manual_seed(args.seed)
    model = SHAPES[args.shape].build(args.vocab_size, args.hidden_size, args.num_layers)
    if args.embeddings is not None:
        take_embeddings(model, args.embeddings)
    return model


def build_optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the linear layers of the blocks, AdamW for embeddings, norms and biases."""
    head = model.get_output_embeddings()
    matrices = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
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


def views(
    args: argparse.Namespace, rows: torch.Tensor, rng: np.random.Generator, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Turn windows `[rows, context + 1]` into what is read whole, if anything, and what is told."""
    objective = OBJECTIVES[args.objective or SHAPES[args.shape].objective]
    pairs = [objective(row, args.vocab_size, rng) for row in rows.numpy()]
    sources = [source for source, _ in pairs if source is not None]
    told = torch.from_numpy(np.stack([told for _, told in pairs])).to(device)
    return (torch.from_numpy(np.stack(sources)).to(device) if sources else None), told


@torch.no_grad()
def held_out_loss(args: argparse.Namespace, model: PreTrainedModel, context: int, device: torch.device) -> float:
    """Loss in nats per token that is told, over the held-out documents."""
    path, rng = args.out / "held_out.bin", np.random.default_rng(0)
    tokens = np.fromfile(path, dtype=np.uint16)[: 200 * context + 1]
    total, count = 0.0, 0
    for rows in batches(tokens, context, 8 * context, 0, 0):
        total, count = total + loss_of(model, *views(args, rows, rng, device)).item(), count + 1
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
    compute = loss_of if args.eager else torch.compile(loss_of)
    context = args.anneal_context if anneal else args.context
    began = saved_at = time.monotonic()
    smooth = None
    seed = args.seed + (1000 if anneal else 0)
    rng = np.random.default_rng(seed + start)
    for rows in batches(tokens, context, args.batch_tokens, seed, 0 if anneal else start // context):
        left = 1 - (seen - start) / args.tokens
        if left <= 0:
            break
        scale = min(1.0, (seen + args.batch_tokens) / WARMUP_TOKENS) * (left if anneal else 1.0)
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        loss = compute(model, *views(args, rows, rng, device))
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
        export(args, model, seen, held_out_loss(args, model, args.held_out_context, device))
    else:
        save(checkpoint, model, optimizers, seen)


def save(path: Path, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], seen: int) -> None:
    """Write the checkpoint beside the old one, then replace it."""
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "tokens": seen}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def export(args: argparse.Namespace, model: PreTrainedModel, seen: int, loss: float) -> None:
    """Write `RUN/model`: bf16 safetensors, the tokenizer, and what was measured."""
    target = args.out / args.export
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(target)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(args.out / "tokenizer.json"),
        bos_token=EOS_TOKEN,
        eos_token=EOS_TOKEN,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(list(SHAPES[args.shape].sentinels), special_tokens=True)
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
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--objective", choices=OBJECTIVES, help="default: the shape's own")
    parser.add_argument("--embeddings", type=Path, help="a model of the same tokens whose embeddings it begins with")
    parser.add_argument("--export", default="model", help="folder in RUN that anneal writes")
    parser.add_argument("--eager", action="store_true", help="do not compile: for a few minutes' training")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=20e6)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=5)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--anneal-context", type=int, default=1024)
    parser.add_argument("--held-out-context", type=int, default=512)
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
