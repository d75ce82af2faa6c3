"""The group of commands, and how errors become exit codes."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from tokenmill import __version__
from tokenmill.cli import card, inspect, interchange, make, report, tokenizers, transfer, verify, view, watch
from tokenmill.cli.console import InterruptedByUserError, log, settle_signals, show_bug, show_log
from tokenmill.errors import TokenmillError

_ALIASES = {"tokenize": "pretokenize", "merge": "consolidate"}
"""Other words for commands."""

_READ_SOURCES = ("pretokenize", "tokenize", "test-shard", "verify", "demo")
"""Commands that hand files of others to native libraries."""

_CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),  # --num_proc is --num-proc
    "max_content_width": 100,
}

EXIT_CODES = """\b
Exit codes:
  0   done, or done already
  1   validation failed, verify found something, a receipt is wrong, or two views share a text
  2   wrong usage, recipe or view, no such sample, not a receipt, a format that cannot hold it, or no extra
  3   the corpus, or what is imported, cannot be read, cannot be reached, or changed
  4   the tokenizer cannot be loaded, its backends disagree, or it loses text in a comparison
  5   the data root is in use, foreign, of another recipe, or its records cannot be read
  6   the disk is full or cannot be written, or a bucket or the hub cannot be reached or used
  7   the ledger does not balance: a bug
  8   the cluster is not there, or lost a task again and again
  70  a bug in tokenmill, with a traceback to report
  130, 143  ended by Ctrl-C or SIGTERM; what is finished is kept
"""


class _Group(click.Group):
    """A group whose commands have aliases and take `-v` before or after their name."""

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return super().get_command(context, _ALIASES.get(name, name))

    def add_command(self, command: click.Command, name: str | None = None) -> None:
        command.params.append(_verbose_option())
        super().add_command(command, name)


def _verbose_option() -> click.Option:
    return click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        expose_value=False,
        callback=lambda context, option, value: show_log() if value else None,
        help="Print the log on standard error: the settings, each shard, each retry, the summary.",
    )


@click.group(cls=_Group, context_settings=_CONTEXT, epilog=EXIT_CODES, params=[_verbose_option()])
@click.version_option(__version__)
def cli() -> None:
    """Turn text corpora into training data for language models.

    The same recipe gives the same bytes, whatever the number of workers, the engine or the crashes.
    """


@click.command("help", short_help="Print the help of a command.")
@click.argument("command", nargs=-1)
@click.pass_context
def help_command(context: click.Context, command: tuple[str, ...]) -> None:
    """Print the help of COMMAND, or of tokenmill."""
    inside = context.parent
    assert inside is not None
    for word in command:
        group = inside.command
        found = group.get_command(inside, word) if isinstance(group, click.Group) else None
        if found is None:
            raise click.UsageError(f"No such command {word!r}.", inside)
        inside = click.Context(found, inside, info_name=word)
    click.echo(inside.get_help())


for _command in (
    make.pretokenize,
    make.consolidate,
    make.test_shard,
    make.demo,
    watch.watch,
    verify.verify,
    transfer.download,
    transfer.upload,
    inspect.info,
    inspect.show,
    inspect.where,
    inspect.stats,
    inspect.receipts,
    report.report,
    card.card,
    tokenizers.tokenizers,
    view.view,
    interchange.export,
    interchange.import_,
    help_command,
):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line with `arguments` (None: those of the process) and exit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a check mark must not fail a run on an ASCII terminal
    sys.excepthook = show_bug
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if any(word in _READ_SOURCES for word in words[:2]):
            from tokenmill.corpus.crash import supervise

            supervise()
        exit_code = cli.main(arguments, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except TokenmillError as error:
        log.error("%s", error)  # the traceback is of no use to a user
        click.echo(f"tokenmill: error: {error}", err=True)
        sys.exit(error.exit_code)
    except InterruptedByUserError as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except Exception as error:  # noqa: BLE001  # a bug of ours, which must not look like a finding
        show_bug(type(error), error, error.__traceback__)
        sys.exit(70)
    finally:
        settle_signals()
    sys.exit(exit_code)
