"""Starts Python programs by forking a process that has loaded the libraries already: 0.05 s instead of 0.8 s.

Most tests of the command line start `python -m tokenmill`, `python -c PROGRAM` or one of `scripts/`, and most of what
such a process does is to load NumPy, Arrow and the tokenizers. `install` lets `subprocess.Popen` have these forked
instead. What comes of it is a process as any other: a child of this one, with its own signals, files, environment and
exit status. It is not used where the difference could show: where memory is measured, libraries are preloaded, or
Python has other settings.

Linux only, as it needs child subreapers (prctl(2)); elsewhere processes start as ever.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import gc
import inspect
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import tokenmill

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"

_PR_SET_CHILD_SUBREAPER = 36
_NOT_FORKED = ("VmHWM", "importtime", "sys.modules")
"""Parts of programs whose result depends on how their process began."""

_OF_THE_START = ("LD_", "PYTHON", "LC_", "LANG", "ARROW_", "MIMALLOC_", "OMP_", "OPENBLAS_", "GLIBC_", "MALLOC_")
"""Beginnings of variables that Python or a library reads when it starts, and then never again."""

_LIBRARIES = "numpy pyarrow pyarrow.parquet pyarrow.compute pyarrow.ipc gigatoken awkward tokenizers rich.live requests"
_LIBRARIES += " botocore.session botocore.parsers botocore.retryhandler msgspec click filelock tenacity fsspec.utils"


def serve(sock: socket.socket) -> NoReturn:
    """Fork a process for each request: JSON, with its standard streams as file descriptors."""
    for name in _LIBRARIES.split():
        __import__(name)
    for module in pkgutil.walk_packages(tokenmill.__path__, "tokenmill."):
        if module.name not in ("tokenmill.__main__", "tokenmill.ray", "tokenmill.torch"):
            __import__(module.name)
    _load_demo_tokenizer()
    gc.collect()
    gc.freeze()  # a collection would write to every object, and so copy memory that processes share
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        header, streams, _, _ = socket.recv_fds(sock, 8, 3)
        if len(header) < 8:
            os._exit(0)
        size = int.from_bytes(header, "little")
        data = b""
        while len(data) < size:
            data += sock.recv(size - len(data))
        told, tell = os.pipe()
        wait, go = os.pipe()
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid:
                os.write(tell, pid.to_bytes(8, "little"))
                os._exit(0)  # now the process is the child of the one that asked
            os.close(go)
            os.read(wait, 1)
            for descriptor in (told, tell, wait):
                os.close(descriptor)
            sock.close()
            _become(json.loads(data), streams)
        pid = int.from_bytes(os.read(told, 8), "little")
        os.waitpid(between, 0)
        sock.sendall(pid.to_bytes(8, "little"))
        for descriptor in (told, tell, wait, go, *streams):
            os.close(descriptor)


def _load_demo_tokenizer() -> None:
    """Most tests use it, and loading it is most of what is left of the start of a short run."""
    from tokenmill.cli.demo import TOKENIZER
    from tokenmill.encoding.encoder import Encoder
    from tokenmill.encoding.tokenizer import load_tokenizer

    for backend in ("gigatoken", "hf"):
        Encoder(load_tokenizer(str(TOKENIZER)), backend=backend, special_in_text="parse", dtype="auto")


def _become(request: dict[str, Any], streams: list[int]) -> NoReturn:
    """Run the program as `python` would, and exit as it would."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["session"]:
        os.setsid()
    if request["group"] is not None:
        os.setpgid(0, request["group"])
    if request["folder"] is not None:
        os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    sys.stdin = os.fdopen(0, encoding=sys.stdin.encoding, closefd=False)
    sys.stdout = os.fdopen(1, "w", 1 if os.isatty(1) else -1, sys.stdout.encoding, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, sys.stderr.encoding, errors="backslashreplace", closefd=False)
    kind, *arguments = request["arguments"]
    what = arguments[0] if kind in ("-m", "-c") else kind
    sys.argv = [what, *arguments[1:]] if kind == "-m" else [kind, *arguments[kind == "-c" :]]
    sys.path[0] = {"-m": str(Path.cwd()), "-c": ""}.get(kind, str(Path(what).parent))
    status = 0
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif kind != "-c":
            runpy.run_path(what, run_name="__main__")
        else:
            sys.modules["__main__"].__dict__.clear()
            main = type(sys)("__main__")
            sys.modules["__main__"] = main
            exec(compile(what, "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001  # as the interpreter does
        sys.excepthook(*sys.exc_info())
        status = 1
    _leave(status)


def _leave(status: int) -> NoReturn:
    """End as the interpreter does: threads awaited, exit functions run, streams flushed."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError):
            status = status or 120
    os._exit(status & 0xFF)


def _adopt_orphans(yes: bool) -> bool:
    """Whether the system lets this process say that processes without a parent become its children."""
    return ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0) == 0


class _Server:
    """The process that forks, started when it is first needed."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None
        self._owner = 0
        self._lock = threading.Lock()
        atexit.register(self.close)

    def close(self) -> None:
        """End the process that forks."""
        if self._sock is not None and self._owner == os.getpid():
            self._sock.close()
            self._process.wait()

    def fork(self, request: dict[str, Any], streams: list[int]) -> int:
        """The process id of a new child of this process."""
        if self._sock is None or self._owner != os.getpid():
            ours, theirs = socket.socketpair()
            program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r}); import socket; "
            program += f"from support import forkserver; forkserver.serve(socket.socket(fileno={theirs.fileno()}))"
            self._process = _Popen(
                [sys.executable, "-c", program], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
            theirs.close()
            self._sock, self._owner = ours, os.getpid()
        data = json.dumps(request).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))]
        with self._lock:
            _adopt_orphans(True)  # no longer than it takes: who adopts a process must also reap it
            try:
                self._sock.sendmsg([len(data).to_bytes(8, "little")], rights)
                self._sock.sendall(data)
                answer = self._sock.recv(8)
            finally:
                _adopt_orphans(False)
        assert len(answer) == 8, "the fork server ended"
        return int.from_bytes(answer, "little")


_server = _Server()
_Popen = subprocess.Popen
_parameters = list(inspect.signature(_Popen._execute_child).parameters)[1:]  # type: ignore[attr-defined]


class _ForkingPopen(_Popen):  # type: ignore[type-arg]
    """A `Popen` that has Python programs forked."""

    def _execute_child(self, *values: Any) -> None:
        given = dict(zip(_parameters, values, strict=True))
        if not _is_forked(given):
            super()._execute_child(*values)  # type: ignore[misc]
            return
        streams = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        environment = os.environ if given["env"] is None else given["env"]
        request = {
            "arguments": [os.fsdecode(each) for each in list(given["args"])[1:]],
            "environment": {os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()},
            "folder": os.fsdecode(given["cwd"] or Path.cwd()),
            "session": given["start_new_session"],
            "group": None if given.get("process_group", -1) == -1 else given["process_group"],
        }
        self.pid = _server.fork(request, [number if at == -1 else at for number, at in enumerate(streams)])
        self._child_created = True
        self._close_pipe_fds(  # type: ignore[attr-defined]
            *(given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
        )


def _is_forked(given: dict[str, Any]) -> bool:
    arguments = given["args"]
    if isinstance(arguments, str | bytes | os.PathLike) or given["shell"] or given["preexec_fn"] or given["pass_fds"]:
        return False
    words = list(arguments)
    environment = os.environ if given["env"] is None else given["env"]
    is_script = len(words) > 1 and Path(words[1]).parent == SCRIPTS
    is_program = words[1:3] == ["-m", "tokenmill"] or (words[1:2] == ["-c"] and "tokenmill" in words[2])
    return (
        words[0] == sys.executable
        and (is_script or is_program)
        and not any(mark in word for word in words[2:3] for mark in _NOT_FORKED)
        and all(
            environment.get(name) == os.environ.get(name)
            for name in {*environment, *os.environ}
            if name.startswith(_OF_THE_START)
        )
        and all(given.get(name, -1) in (-1, None) for name in ("gid", "uid", "umask"))
    )


_SHIM = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect({path!r})
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(asked, [len(request).to_bytes(8, "little")], [0, 1, 2])
    asked.sendall(request)
    sys.exit(int(asked.recv(8)))
"""


@contextlib.contextmanager
def command_in(folder: Path) -> Iterator[None]:
    """A program `tokenmill` in `folder`, for shells whose PATH begins with it; its work is done by a forked process."""
    elsewhere = tempfile.TemporaryDirectory()  # a socket's path has at most about 100 characters
    path = str(Path(elsewhere.name, "asked"))
    shim = folder / "tokenmill"
    shim.write_text(_SHIM.format(python=sys.executable, path=path))
    shim.chmod(0o755)

    def answer(asked: socket.socket) -> None:
        with asked:
            header, streams, _, _ = socket.recv_fds(asked, 8, 3)
            size, data = int.from_bytes(header, "little"), b""
            while len(data) < size:
                data += asked.recv(size - len(data))
            arguments, cwd, environment = json.loads(data)
            stdin, stdout, stderr = streams
            line = [sys.executable, "-m", "tokenmill", *arguments]
            with subprocess.Popen(line, stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd, env=environment) as process:
                for stream in streams:
                    os.close(stream)
            asked.sendall(str(process.returncode).encode())

    def serve_all() -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    with elsewhere, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        serving = threading.Thread(target=serve_all, daemon=True)
        serving.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        serving.join()


def install() -> None:
    """Let `subprocess` have Python programs forked, where the system can."""
    if sys.platform == "linux" and _adopt_orphans(False):
        subprocess.Popen = _ForkingPopen  # type: ignore[misc]
