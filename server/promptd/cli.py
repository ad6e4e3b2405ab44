"""`promptd`: the command line. Only typer is imported here; each command imports the rest when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from promptd.commands import jobs, keys, prompts, store, tenants
from promptd.commands.apply import apply
from promptd.commands.bench import bench
from promptd.commands.convert import convert
from promptd.commands.doctor import doctor
from promptd.commands.drain import drain
from promptd.commands.evaluate import evaluate
from promptd.commands.plan import plan
from promptd.commands.serve import serve
from promptd.commands.top import top
from promptd.commands.train import train
from promptd.commands.worker import worker

app = typer.Typer(
    name="promptd",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # locals may hold keys
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "[bold]Examples[/]\n\n"
        "promptd serve                          [dim]the embedded demo, on port 8000[/]\n\n"
        "promptd prompts push adapters/         [dim]every PEFT folder in there[/]\n\n"
        "promptd prompts ls                     [dim]what the server has[/]\n\n"
        "promptd convert old/ -o new/           [dim]pickles to safetensors[/]\n\n"
        "promptd jobs create rows.jsonl -w      [dim]train a prompt on the server and watch[/]\n\n"
        "promptd train rows.jsonl -o prompts/   [dim]or here, without a server[/]\n\n"
        "promptd eval -p snips-intent           [dim]how good is a prompt?[/]"
    ),
)

app.command(rich_help_panel="Serve")(serve)
app.command(rich_help_panel="Serve")(worker)
app.command(rich_help_panel="Serve")(doctor)
app.command(rich_help_panel="Serve")(plan)
app.command(rich_help_panel="Serve")(top)
app.add_typer(store.app, name="store", rich_help_panel="Serve")
app.add_typer(prompts.app, name="prompts", rich_help_panel="Prompts")
app.command(rich_help_panel="Prompts")(convert)
app.command(rich_help_panel="Train")(train)
app.add_typer(jobs.app, name="jobs", rich_help_panel="Train")
app.add_typer(keys.app, name="keys", rich_help_panel="Administrate")
app.add_typer(tenants.app, name="tenants", rich_help_panel="Administrate")
app.add_typer(tenants.users, name="users", rich_help_panel="Administrate")
app.command(rich_help_panel="Administrate")(apply)
app.command(rich_help_panel="Administrate")(drain)
app.command("eval", rich_help_panel="Measure")(evaluate)
app.command(
    rich_help_panel="Measure",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(bench)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from promptd import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """One frozen model, many learned prompts, one batch."""


if __name__ == "__main__":
    app()
