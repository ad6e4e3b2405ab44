"""`promptd convert`: pickles and NumPy files to PEFT folders with safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from promptd.commands.console import existing, fail

if TYPE_CHECKING:
    from promptd.commands.old_formats import OldPrompt

_FILES = (".pt", ".pth", ".bin", ".npy")


def convert(
    sources: Annotated[
        list[Path],
        typer.Argument(help="PEFT or TGIS folders, folders full of them, or .pt, .bin, .npy files.", metavar="SOURCE"),
    ],
    out_folder: Annotated[
        Path, typer.Option("--out", "-o", help="Where the converted folders go.", metavar="DIR")
    ] = Path("converted"),
    force: Annotated[bool, typer.Option("--force", help="Write over what is there.")] = False,
) -> None:
    """Convert prompts saved as pickles or NumPy arrays to safetensors, on this machine.

    Reads PEFT's adapter_model.bin, TGIS' decoder.pt and encoder.pt, and .npy arrays of prompt tuning. Numbers stay
    bit for bit as they are (float64 is rounded to float32). Nothing in a file is executed; files that hold more
    than tensors are refused. Each source becomes a PEFT folder that `promptd prompts push` takes.

    [dim]promptd convert old-adapters/ --out converted[/]
    [dim]promptd convert prompts/decoder.pt prompts/prompt.npy[/]
    """
    from promptd.commands.console import err, out
    from promptd.commands.old_formats import ConversionError, read_old

    jobs = [(each, name) for source in sources for each, name in _search(existing(source))]
    if not jobs:
        fail("nothing to convert: no adapter_model.bin, .pt or .npy in these folders")
    if len({name for _, name in jobs}) < len(jobs):
        fail("two sources would become one folder: " + ", ".join(sorted(_repeated([name for _, name in jobs]))))
    failed = 0
    for source, name in jobs:
        target = out_folder / name
        try:
            if target.exists() and not force:
                raise ConversionError(f"{target} is there already; --force writes over it")
            prompt = read_old(source)
            _write(prompt, target)
        except (ConversionError, OSError) as error:
            failed += 1
            out().print(f"[bold red]FAIL[/]  {source}  {error}", soft_wrap=True)
            continue
        shape = " x ".join(str(size) for size in prompt.tensor.shape)
        out().print(f"[green] ok [/]  {source} -> {target}  {shape} {prompt.tensor.dtype}", soft_wrap=True)
        for warning in prompt.warnings:
            err().print(f"[bold yellow]warning[/] {source}: {warning}")
    err().print(f"[bold]{len(jobs) - failed} converted, {failed} failed[/]")
    if failed:
        raise typer.Exit(1)


def _search(source: Path) -> list[tuple[Path, str]]:
    """Return every source at or below a path with the name of the folder that it becomes."""
    if source.is_file():
        return [(source, source.resolve().parent.name if _is_generic(source) else source.stem)]
    if _is_prompt_folder(source):
        return [(source, source.resolve().name)]
    found: list[tuple[Path, str]] = []
    for each in sorted(source.iterdir()):
        if each.is_dir() and not each.name.startswith("."):
            found += _search(each)
        elif each.suffix in _FILES:
            found.append((each, source.resolve().name if _is_generic(each) else each.stem))
    return found


def _is_generic(file: Path) -> bool:
    """Return whether a file's own name says nothing: its folder's name is the prompt's."""
    return file.stem in ("adapter_model", "decoder", "encoder", "prompt", "prompt_embeddings")


def _is_prompt_folder(folder: Path) -> bool:
    return any(
        (folder / name).is_file() for name in ("adapter_config.json", "adapter_model.bin", "decoder.pt", "encoder.pt")
    )


def _repeated(names: list[str]) -> set[str]:
    return {name for name in names if names.count(name) > 1}


def _write(prompt: OldPrompt, target: Path) -> None:
    """Write both files as PEFT does; the configuration last, since it is what marks the folder as complete."""
    from promptd_store.peft import CONFIG_NAME, WEIGHTS_NAME
    from safetensors.torch import save

    from promptd.commands.old_formats import TENSOR_NAME

    target.mkdir(parents=True, exist_ok=True)
    (target / WEIGHTS_NAME).write_bytes(save({TENSOR_NAME: prompt.tensor}, {"format": "pt"}))
    (target / CONFIG_NAME).write_bytes(prompt.config)
