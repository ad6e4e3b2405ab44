"""`promptd plan`: what fits where, before anything is bought or started."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from promptd.commands.console import AsJson, BaseModel, fail, human_bytes, out, print_json

if TYPE_CHECKING:
    from promptd.planning import ModelShape, Plan

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_BYTES_PER_NUMBER = {"float32": 4, "bfloat16": 2, "float16": 2}


def plan(
    model: BaseModel = None,
    gpu_bytes: Annotated[str, typer.Option(help="Memory of one device, as 80e9, 24GiB or 16G.", metavar="N")] = "24GiB",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts in all.", metavar="N")] = 1000,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Virtual tokens of one.", metavar="N")] = 20,
    dtype: Annotated[str, typer.Option(help="Serving dtype: float32, bfloat16 or float16.")] = "bfloat16",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Rows that run at once.", metavar="N")] = 16,
    row_tokens: Annotated[int, typer.Option(min=1, help="Tokens of text in one row.", metavar="N")] = 1024,
    servers: Annotated[int, typer.Option(min=1, help="Servers behind one balancer.", metavar="N")] = 1,
    zipf: Annotated[float, typer.Option(min=0, help="Exponent of the prompts' popularity; 0: all alike.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Print what one device holds, what the store needs, and how often a request finds its prompt resident.

    Reads the model's configuration and the headers of its weights; nothing is loaded.

    [dim]promptd plan --model ./Qwen2-0.5B --gpu-bytes 24GiB --prompts 100000 --prompt-tokens 20[/]
    [dim]promptd plan --prompts 1000000 --servers 100 --gpu-bytes 80e9[/]
    """
    from promptd.planning import REDIS_BYTES_PER_PROMPT, fleet_hit_ratios, make_plan

    planned = make_plan(
        _shape(model, dtype),
        gpu_bytes=parse_bytes(gpu_bytes),
        num_prompts=prompts,
        prompt_tokens=prompt_tokens,
        num_rows=max_num_seqs,
        row_tokens=row_tokens,
    )
    spread, routed = fleet_hit_ratios(prompts, planned.num_resident, servers, exponent=zipf)
    soft, prefix = planned.file_bytes
    facts = {
        "weights_bytes": planned.shape.weight_bytes,
        "step_bytes": planned.step_bytes,
        "texts_bytes": planned.text_bytes,
        "free_for_prompts_bytes": planned.free_bytes,
        "kv_bytes_per_token": planned.shape.kv_bytes_per_token,
        "resident_prompt_bytes": planned.prompt_bytes,
        "resident_prompts": planned.num_resident,
        "servers_for_all_prompts": planned.servers_for_all,
        "hit_ratio_spread_by_load": round(spread, 4),
        "hit_ratio_routed_by_prompt": round(routed, 4),
        "redis_bytes": prompts * REDIS_BYTES_PER_PROMPT,
        "soft_files_bytes": prompts * soft,
        "prefix_files_bytes": prompts * prefix,
    }
    if as_json:
        print_json(facts)
    else:
        _print(planned, facts, servers)
    if planned.free_bytes < planned.prompt_bytes:
        fail(
            "not one prompt fits beside the model and its texts",
            hint="A larger device, fewer rows (--max-num-seqs) or shorter ones (--row-tokens).",
        )


def parse_bytes(text: str) -> int:
    """Read `80e9`, `24GiB`, `16G`."""
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        fail(f"--gpu-bytes {text!r} is not a size", hint="Examples: 80e9, 24GiB, 16G.")
    return int(float(match[1]) * _UNITS[match[2]])


def _shape(model: str | None, dtype: str) -> ModelShape:
    if dtype not in _BYTES_PER_NUMBER:
        fail(f"--dtype {dtype!r} is not float32, bfloat16 or float16")
    from transformers import AutoConfig

    from promptd.demo import DEMO_MODEL_PATH
    from promptd.errors import ModelRefusedError
    from promptd.modeling.families.choice import choose
    from promptd.modeling.load import model_folder
    from promptd.planning import read_shape

    try:
        folder = model_folder(model or DEMO_MODEL_PATH)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        sizes = choose(config).sizes
    except (ModelRefusedError, OSError, ValueError) as error:
        fail(str(error).splitlines()[0])
    numbers = (sizes.hidden_size, sizes.num_layers, sizes.num_kv_heads, sizes.head_dim, config.vocab_size)
    return read_shape(folder, numbers, _BYTES_PER_NUMBER[dtype])


def _print(planned: Plan, facts: dict[str, int | float | None], servers: int) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    all_of_them = planned.num_resident == planned.num_prompts
    rows = {
        "one device": human_bytes(planned.gpu_bytes),
        "  weights": human_bytes(planned.shape.weight_bytes),
        "  steps": f"{human_bytes(planned.step_bytes)}  (logits, and a twentieth in reserve)",
        "  texts": human_bytes(planned.text_bytes),
        "  prompts": f"{human_bytes(max(0, planned.free_bytes))}, {human_bytes(planned.prompt_bytes)} each: "
        f"{planned.num_resident:,} resident" + (", all of them" if all_of_them else f" of {planned.num_prompts:,}"),
        "servers that hold all": f"{planned.servers_for_all or 'none can'}",
        f"found resident ({servers})": f"{facts['hit_ratio_spread_by_load']:.1%} spread by load, "
        f"{facts['hit_ratio_routed_by_prompt']:.1%} routed by prompt",
        "Redis, without files": human_bytes(int(facts["redis_bytes"] or 0)),
        "files": f"{human_bytes(int(facts['soft_files_bytes'] or 0))} as soft prompts, "
        f"{human_bytes(int(facts['prefix_files_bytes'] or 0))} as prefixes",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    out().print(table)
