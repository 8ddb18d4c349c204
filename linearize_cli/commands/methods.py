"""The `linearize methods` command."""

from typing import Any

import click

from linearize_cli.commands.options import (
    METHOD,
    command_options,
)
from linearize_cli.terminal import Terminal


@click.command(short_help="List the methods, or print a recipe.")
@click.argument("name", type=METHOD, required=False)
@command_options
def methods(terminal: Terminal, name: str | None) -> Any:
    """List the methods, or print the recipe NAME (a method or a file). Code named in a recipe is not run."""
    from linearize_cli.methods.registry import method_names, read_recipe
    from linearize_cli.tables import method_table

    if name:
        recipe = read_recipe(name)
        click.echo(recipe.dump(), nl=False)
        return recipe.to_dict()
    recipes = [read_recipe(method) for method in method_names()]
    terminal.out.print(method_table(recipes))
    return [recipe.to_dict() for recipe in recipes]
