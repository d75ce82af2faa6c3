"""SQL: which rows of a documents sidecar satisfy a condition; the one module that imports DuckDB (extra `views`)."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tokenmill.errors import RecipeError

_NOT_CONDITIONS = re.compile(r"\b(select|values|union|intersect|except|pivot|pragma|table)\b|\(\s*(from|with)\b", re.I)
"""Words of queries. A condition is asked of each sidecar, and says nothing of other documents."""
_ROW = "row=number"
"""A name that no metadata column can have."""
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/", re.S)


def _refuse_more_than_a_condition(text: str, where: str) -> None:
    """Require an expression about one document: no query within, and no parenthesis that closes ours.

    Raises:
        RecipeError: it is more.
    """
    plain = _QUOTED.sub(" ", text)
    depth = 0
    for character in plain:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
    word = _NOT_CONDITIONS.search(plain)
    if depth or word:
        what = (
            "parentheses that do not match"
            if depth
            else f"{word[0].strip('( ').lower()!r}, a query within"
            if word
            else ""
        )
        raise RecipeError(
            f"{where}: expected a condition about one document, found {what}",
            next_step="compare the columns of the document with constants",
        )


class Condition:
    """A condition over the columns of sidecars, as SQL; a context manager. It can reach nothing but the table.

    Args:
        text: an expression such as `tokens < 1000 and source like '%en%'`.
        where: what messages call it.

    Raises:
        RecipeError: DuckDB is not installed.
    """

    def __init__(self, text: str, where: str) -> None:
        try:
            import duckdb
        except ImportError:
            raise RecipeError(
                f"{where}: needs DuckDB, which is not installed", next_step="run: pip install 'tokenmill[views]'"
            ) from None
        self._errors = duckdb.Error
        _refuse_more_than_a_condition(text, where)
        self._text, self._where = text, where
        self._is_tried = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sql")
        self._connection: Any = duckdb.connect(
            config={"enable_external_access": "false", "lock_configuration": "true", "threads": "1"}
        )

    def __enter__(self) -> Condition:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        self._connection.close()

    def rows(self, table: pa.Table) -> NDArray[np.int64]:
        """Return the rows for which it is true, ascending.

        Raises:
            RecipeError: it is not a condition over the columns.
        """
        numbered = table.append_column(_ROW, pa.array(np.arange(len(table))))
        query = f'SELECT "{_ROW}" FROM documents WHERE (\n{self._text}\n)'
        try:
            self._refuse_several(query)
            self._connection.register("documents", numbered)
            found = self._ask(query)
            if not self._is_tried:
                self._is_tried = True
                self._refuse_another(query, found)
        except self._errors as error:
            raise RecipeError(
                f"{self._where}: {str(error).splitlines()[0]}",
                next_step=f"the columns are {', '.join(table.schema.names)}; the condition is SQL as DuckDB has it",
            ) from None
        return np.sort(found)

    def _ask(self, query: str) -> NDArray[np.int64]:
        """Return the rows that a query gives; asked on a thread, as DuckDB loses what a signal's handler raises."""
        answer = self._thread.submit(lambda: self._connection.execute(query).fetchnumpy()[_ROW])
        try:
            found: NDArray[np.int64] = answer.result()
        except BaseException:
            self._connection.interrupt()
            raise
        return found

    def _refuse_another(self, query: str, found: NDArray[np.int64]) -> None:
        if not np.array_equal(found, self._ask(query)):
            raise self._errors("it is not the same each time that it is asked")

    def _refuse_several(self, query: str) -> None:
        if len(self._connection.extract_statements(query)) != 1:
            raise self._errors("expected one condition, found several statements")
