"""`sglang-dualpath`: what the installed package can do. Servers are started by SGLang's own commands."""

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sglang_dualpath import __version__
from sglang_dualpath.config import flag_rows, flags_markdown
from sglang_dualpath.policy import BUILTIN_POLICIES, DEFAULT_POLICY, known_policies

app = typer.Typer(
    help="DualPath for SGLang: what `--kv-connector dualpath` understands.", no_args_is_help=True, add_completion=False
)


@app.command("flags")
def print_flags(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table that the README holds.")] = False,
) -> None:
    """List the flags that this package adds to SGLang's servers, with defaults and environment twins."""
    if markdown:
        typer.echo(flags_markdown(), nl=False)
        return
    table = Table("flag", "default", "environment", "what it does", show_lines=True)
    for row in flag_rows():
        table.add_row(*row)
    Console().print(table)


@app.command("policies")
def print_policies() -> None:
    """List the policies that `--dualpath-policy` finds by name."""
    table = Table("policy", "class", "from")
    for name, target in known_policies().items():
        origin = "this package" if name in BUILTIN_POLICIES else "another package"
        table.add_row(f"{name} (default)" if name == DEFAULT_POLICY else name, target, origin)
    Console().print(table)


@app.command("version")
def print_version() -> None:
    """Print the versions of this package and of the SGLang beside it."""
    try:
        sglang_version = version("sglang")
    except PackageNotFoundError:
        sglang_version = "not installed"
    typer.echo(f"sglang-dualpath {__version__}, sglang {sglang_version}")
