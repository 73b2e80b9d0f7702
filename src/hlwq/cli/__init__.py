"""The command `hlwq`: the library's functions with tables for people and JSON for machines."""

from __future__ import annotations

import errno
import sys
import warnings
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from hlwq.cli import evaluate, listing, printing, quantize, report
from hlwq.cli.options import spelled, with_json
from hlwq.errors import HlwqError, HlwqWarning, was_interrupted
from hlwq.version import __version__

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


class Command(TyperCommand):
    """A command whose errors and warnings are one line each on standard error, in the command's own flags."""

    def invoke(self, ctx: Any) -> Any:
        """Run it and print what it returns. A user's mistake ends it with exit status 1."""
        warnings.showwarning = self._show_warning
        try:
            output = super().invoke(ctx)
        except HlwqError as error:
            if was_interrupted(error):
                raise KeyboardInterrupt from None
            self._show("[red]error:[/red]", error)
            raise typer.Exit(1) from None
        output.show(ctx.params["as_json"], self._spelled)
        try:
            output.afterwards()
        except HlwqError as error:
            self._show("[yellow]warning:[/yellow] the result is not kept:", error)
        raise typer.Exit(output.status)

    def _show_warning(self, message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        """Print a warning of hlwq's own; those of libraries are not shown."""
        if issubclass(category, HlwqWarning):
            self._show("[yellow]warning:[/yellow]", message)

    def _show(self, kind: str, message: object) -> None:
        printing.messages.print(f"{kind} {escape(self._spelled(str(message)))}", soft_wrap=True, highlight=False)

    def _spelled(self, text: str) -> str:
        """A text in this command's flags; in those of `quantize` where it advises to quantize again."""
        again: Any = typer.main.get_command(app)
        return spelled(text, self, again.commands["quantize"]) if "Quantize again" in text else spelled(text, self)


class Group(TyperGroup):
    """Commands that an interrupt ends in one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named. Ctrl-C ends it with exit status 130, also while it reads its arguments."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            resumes = ctx.invoked_subcommand in ("quantize", "convert", "humaneval")
            text = "interrupted; the same command goes on where it stopped" if resumes else "interrupted"
            printing.messages.print(text, highlight=False)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="hlwq",
    cls=Group,
    help="Turn a Hugging Face LLM into the best small checkpoint that vLLM, mlx-lm and transformers load as it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
evaluation = typer.Typer(cls=Group, help="Measure a model.", no_args_is_help=True)
app.add_typer(evaluation, name="eval")
for command in (
    *(quantize.quantize, quantize.convert, quantize.inspect, quantize.check),
    *(report.compare, report.card, report.push),
    *(listing.demo, listing.models, listing.recipes, listing.formats),
):
    app.command(cls=Command)(with_json(command))
for command in (
    evaluate.perplexity,
    evaluate.divergence,
    evaluate.humaneval,
    evaluate.speed,
    evaluate.experts,
):
    evaluation.command(cls=Command)(with_json(command))


def _version(value: bool) -> None:
    if value:
        printing.console.print(__version__)
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    printing.prepare_streams()
    try:
        app()
    except OSError as error:
        if error.filename is not None or error.errno not in UNWRITABLE:
            raise
        # Standard output is a full disk, say; standard error may be one too.
        with suppress(OSError):
            printing.messages.print(f"error: the output cannot be written: {error.strerror}", highlight=False)
        sys.stdout = None  # what it still holds cannot be written when Python ends
        sys.exit(1)
