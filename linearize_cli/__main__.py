"""`python -m linearize_cli`."""

from linearize_cli.cli import main

main()
