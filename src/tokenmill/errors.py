"""Errors: one class per way a user can react. Pure.

Every message says what is wrong and where, what was expected and found; `next_step` says what to do
about it. `exit_code` is what the command line exits with.
"""

from __future__ import annotations

from tokenmill.redact import escape_surrogates, redact


class TokenmillError(Exception):
    """Something a user can act on.

    Args:
        message: what is wrong, where, expected and found.
        next_step: what to do next, as an instruction or a command.
    """

    exit_code = 1

    def __init__(self, message: str, *, next_step: str) -> None:
        self.message = escape_surrogates(redact(message))
        self.next_step = escape_surrogates(redact(next_step))
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\n  next: {self.next_step}"

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _rebuild, (type(self), self.message, self.next_step)


def _rebuild(kind: type[TokenmillError], message: str, next_step: str) -> TokenmillError:
    """Keyword-only arguments do not survive the default pickling of exceptions."""
    return kind(message, next_step=next_step)


class RecipeError(TokenmillError):
    """The recipe (or an override of it) is wrong: change the recipe."""

    exit_code = 2


class QueryError(TokenmillError):
    """What was asked for is not in the data root: ask for something else."""

    exit_code = 2


class ExtraError(TokenmillError):
    """A library that only some commands need is not installed: install the extra."""

    exit_code = 2


class ReceiptError(TokenmillError):
    """Not a receipt: give another file."""

    exit_code = 2


class SourceError(TokenmillError):
    """The corpus cannot be read as it is: mend or exclude the file named."""

    exit_code = 3


class SourceChangedError(SourceError):
    """The corpus is not the one this data root was started from."""


class TokenizerError(TokenmillError):
    """The tokenizer cannot be loaded or lacks what the recipe needs: give another."""

    exit_code = 4


class AuditError(TokenizerError):
    """The fast and the reference tokenizer backends disagree: use the reference backend."""


class DataRootError(TokenmillError):
    """The data root is in use, foreign, or made by another recipe: choose another directory."""

    exit_code = 5


class StorageError(TokenmillError):
    """The disk is full or cannot be written: make room or fix permissions, then run again."""

    exit_code = 6


class LedgerError(TokenmillError):
    """Rows read and rows accounted for differ: a bug in tokenmill, never ignored."""

    exit_code = 7


class EngineError(TokenmillError):
    """The cluster is not there or cannot do it: start or mend it, then run again."""

    exit_code = 8


class ExportError(TokenmillError):
    """The format of a trainer cannot hold the data set: choose another format, or make the data set otherwise."""

    exit_code = 2


class ImportDataError(TokenmillError):
    """What is to be imported is not what its format says: mend it, or name its format."""

    exit_code = 3
