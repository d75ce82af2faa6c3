"""What all remote locations share: connections, retries, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, TypeVar

from tokenmill.corpus.location import SourceFile
from tokenmill.errors import SourceChangedError, SourceError, StorageError
from tokenmill.remote.http import CONNECTIONS, HttpClient
from tokenmill.remote.remote_file import RemoteFile
from tokenmill.remote.retry import Retrier, call_with_retries

T = TypeVar("T")


class RemoteLocation:
    """A `location.Location` that is reached over a network."""

    name: str
    login: str
    """What to do when the store wants other credentials."""
    own: ClassVar[frozenset[str]] = frozenset({"retrier", "http", "pool"})
    """Attributes that stay in this process."""
    opens_at_once = 8

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.connect()

    @property
    def retries(self) -> int:
        return self.retrier.count

    def require_unchanged(self, file: SourceFile) -> None:
        """Every range is compared as it is read."""

    def connect(self) -> None:
        """Make what is this process's own, credentials from its environment included."""
        self.retrier = Retrier()
        self.http = HttpClient()
        self.pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch")

    def __getstate__(self) -> dict[str, object]:
        """Return what another process needs to read the same files: no connection, no credential but those in URLs."""
        return {name: value for name, value in self.__dict__.items() if name not in self.own}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.connect()

    def remote_file(
        self, file: SourceFile, read: Callable[[int, int], bytearray], planned: Iterable[tuple[int, int]]
    ) -> RemoteFile:
        def fetch(offset: int, nbytes: int) -> bytearray:
            return self.request(f"{self.name}/{file.path}", lambda: read(offset, nbytes))

        return RemoteFile(file.nbytes, fetch, self.pool, planned)

    def close(self) -> None:
        self.retrier.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def request(self, what: str, task: Callable[[], T]) -> T:
        """Return the result of a task, transient faults tried again.

        Raises:
            SourceError: refused, gone, or still failing.
            SourceChangedError: no longer what was listed.
        """
        try:
            return call_with_retries(
                what, self.retrier, task, kind=SourceError, changed=SourceChangedError, login=self.login
            )
        except StorageError as error:
            raise SourceError(error.message, next_step=error.next_step) from None
