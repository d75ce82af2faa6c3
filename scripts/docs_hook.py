"""A hook of MkDocs: fills `docs/commands.md` with what `--help` prints, command by command."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from tokenmill.cli.main import cli

_PLACE = "{{ commands }}"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the placeholder; MkDocs calls this for each page."""
    return markdown.replace(_PLACE, "\n".join(_sections(cli, ["tokenmill"])))


def _sections(command: click.Command, words: list[str]) -> Iterator[str]:
    context = click.Context(command, info_name=" ".join(words), max_content_width=100, terminal_width=100)
    with context:
        yield f"## {' '.join(words)}\n\n```text\n{command.get_help(context)}\n```\n"
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                assert inner is not None
                yield from _sections(inner, [*words, name])
