"""Worker processes for a pure function of many tasks.

A worker is a fresh interpreter that reads pickled tasks from its standard input and
writes pickled results: it imports no main module, so that a script that calls the
library needs no guard, and starting one is safe whatever threads this process has.
"""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

_LENGTH_BYTES = 8
_END = object()


def num_cores() -> int:
    """Count the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_tasks(
    function: Callable[[Any, Any], Any],
    shared: Any,
    tasks: Iterable[Any],
    *,
    num_workers: int,
) -> Iterator[Any]:
    """Yield `function(shared, task)` for each task, as they are done.

    A process is started when there is a task for it, and each has one task at a time:
    there are at most `num_workers` tasks in memory. With one worker the function is
    called in this process.

    Args:
      function: of a module, so that it can be imported.
      shared: sent to each worker once.
      tasks: read one by one, by a thread.
      num_workers: processes at a time.

    Raises:
      ValueError: a worker was killed.
      Exception: what the tasks' iterator or the function raised.
    """
    if num_workers <= 1:
        for task in tasks:
            yield function(shared, task)
        return
    results: queue.Queue[Any] = queue.Queue()
    source, lock = iter(tasks), threading.Lock()
    processes: list[subprocess.Popen] = []
    stopping = threading.Event()

    def next_task() -> Any:
        with lock:
            return _END if stopping.is_set() else next(source, _END)

    def serve() -> None:
        process = None
        try:
            task = next_task()
            if task is _END:
                return
            with lock:
                if stopping.is_set():
                    return
                process = _start()
                processes.append(process)
            assert process.stdin is not None and process.stdout is not None
            _send(process.stdin, (function, shared))
            while task is not _END:
                _send(process.stdin, task)
                failed, value = pickle.loads(_receive(process.stdout))
                if failed:
                    raise value
                results.put((False, value))
                task = next_task()
        except (EOFError, BrokenPipeError):
            code = process.wait() if process else None
            results.put((True, ValueError(_killed_message(code))))
        except BaseException as error:
            results.put((True, error))
        finally:
            results.put(_END)

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(num_workers)]
    for thread in threads:
        thread.start()
    try:
        num_ended = 0
        while num_ended < num_workers:
            item = results.get()
            if item is _END:
                num_ended += 1
                continue
            failed, value = item
            if failed:
                raise value
            yield value
    finally:
        with lock:
            stopping.set()
        for process in processes:
            process.kill()
        for thread in threads:
            thread.join()
        for process in processes:
            with contextlib.suppress(BrokenPipeError), process:
                pass


def _killed_message(code: int | None) -> str:
    return (
        f"a worker process ended with exit code {code}, probably for want of memory: "
        "start again, it continues; data.num_workers=1 needs the least"
    )


def _start() -> subprocess.Popen:
    paths = [path or os.getcwd() for path in sys.path]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TOKENIZERS_PARALLELISM": "false",  # there is a process per core
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def _send(stream: IO[bytes], value: Any) -> None:
    content = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(len(content).to_bytes(_LENGTH_BYTES, "little"))
    stream.write(content)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes:
    head = stream.read(_LENGTH_BYTES)
    if len(head) < _LENGTH_BYTES:
        raise EOFError
    size = int.from_bytes(head, "little")
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


def main() -> None:
    """Serve the tasks of standard input until it ends; results go to standard output.

    What the function prints goes to standard error.
    """
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    tasks: queue.Queue[Any] = queue.Queue()

    def read() -> None:
        with contextlib.suppress(EOFError):
            while True:
                tasks.put(_receive(sys.stdin.buffer))
        os._exit(0)  # the other end is gone: what is being made is of no use

    threading.Thread(target=read, daemon=True).start()
    function, shared, cause = None, None, None
    try:
        function, shared = pickle.loads(tasks.get())
    except Exception as error:
        cause = error
    while True:
        content = tasks.get()
        try:
            if function is None:
                raise RuntimeError(f"the function cannot be loaded: {cause!r}")
            result = False, function(shared, pickle.loads(content))
        except Exception as error:
            result = True, error
        _send(output, result)
