"""One worker process of an environment: started, asked, timed and ended.

In: an EnvironmentSpec and requests. Out: replies, in the order of the requests, or why the process
ended. Guarantees: a call that takes longer than `call_timeout_s` ends the process, and so does a
reply that is none; then every call that waits gets the reason.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from edge_node.settings import PREFIX, EnvironmentSpec

LOAD_S = 60.0
"""Shortest time that loading has: imports are slow where many processes start."""
MAX_REPLY_BYTES = 256 << 20
STOP_S = 5.0


class Ended(Exception):
    """A worker ended. Its message is a whole text; `mistake`: EDGE_ENVIRONMENTS is wrong."""

    def __init__(self, text: str, mistake: bool = False) -> None:
        super().__init__(text)
        self.mistake = mistake


@dataclass
class _Call:
    method: str
    began: float
    """When it was sent, or the call before it was answered."""
    future: Future[dict[str, Any]] = field(default_factory=Future)


class Child:
    """One worker process.

    Its thread starts it, reads the replies, keeps the time and ends it. The thread is the process's
    parent in the sense of `die_with_parent`, so it lives as long.
    """

    def __init__(
        self, spec: EnvironmentSpec, shows_output: bool, ended: Callable[[float, str], None]
    ) -> None:
        self._spec = spec
        self._shows_output = shows_output
        self._tell = ended
        self._began = time.monotonic()
        self._link, theirs = socket.socketpair()
        self._process: subprocess.Popen[bytes] | None = None
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._calls = deque([_Call("load", self._began)])
        """Sent and not answered, oldest first; guarded by `_changed`, as the two below."""
        self._ending = False
        self._end: Ended | None = None
        self.loaded = self._calls[0].future
        self._thread = threading.Thread(
            target=self._run, args=(theirs,), name=f"environment {spec.name}", daemon=True
        )
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """The process's, while it runs. It is reaped by the thread only, which may signal it."""
        process = self._process
        if process is None or process.returncode is not None:
            return None
        with suppress(ChildProcessError):  # reaped meanwhile
            look = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return process.pid if os.waitid(os.P_PID, process.pid, look) is None else None
        return None

    def can_answer(self) -> bool:
        """False after its end, and for one that died while it had nothing to do."""
        with self._changed:
            if not self._calls and self._process is not None and self.pid is None:
                self._ending = True
                self._changed.notify()
            return self._end is None and not self._ending

    def ask(self, method: str, given: Mapping[str, Any]) -> Future[dict[str, Any]]:
        """Sends a request; raises Ended."""
        line = json.dumps({"method": method, **given}).encode() + b"\n"
        call = _Call(method, time.monotonic())
        with self._sending:  # requests lie on the link in the order of `_calls`
            with self._changed:
                if self._end is not None:
                    raise self._end
                self._calls.append(call)
                self._changed.notify()
            with suppress(OSError):  # it has ended: the thread tells the call
                self._link.sendall(line)
        return call.future

    def end(self) -> None:
        """End the process, which is no fault of it."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        with suppress(OSError):  # it has ended
            self._link.shutdown(socket.SHUT_RDWR)
        self._thread.join(STOP_S)

    def _run(self, theirs: socket.socket) -> None:
        try:
            with theirs:
                self._process = self._start(theirs.fileno())
        except OSError as error:  # no memory or no process left
            end = Ended(self._text(f"could not be started ({error.strerror})."))
        else:
            why = self._read()
            if why is None:
                self._wait_for_its_end()
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            code = self._process.wait()
            with suppress(OSError):  # a process that left its group may hold the other end
                self._link.shutdown(socket.SHUT_RDWR)
            end = why or Ended(self._text(_how_ended(code, self._method())))
        if not self._ending:
            self._tell(time.monotonic() - self._began, str(end))
        with self._changed:
            self._end = end
            for call in self._calls:
                call.future.set_exception(end)
            self._calls.clear()
        with self._sending:
            self._link.close()

    def _start(self, link: int) -> subprocess.Popen[bytes]:
        # Not the node's settings: the join token and API keys are among them.
        given = {
            name: text for name, text in os.environ.items() if not name.upper().startswith(PREFIX)
        }
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "edge_node.environments.worker"),
                *("--parent", str(os.getpid()), "--socket", str(link)),
            ],
            env=given,
            pass_fds=(link,),
            stdin=subprocess.PIPE,  # options may be secrets, and every user sees arguments
            stdout=sys.stderr.fileno() if self._shows_output else subprocess.DEVNULL,
            stderr=None if self._shows_output else subprocess.DEVNULL,
            start_new_session=True,  # so that what it starts is ended with it
        )
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as stream:  # it may have ended already
            stream.write(self._spec.model_dump_json().encode())
        return process

    def _read(self) -> Ended | None:
        """Gives replies to their calls; why the process must end, or None when it does."""
        unread: list[bytes] = []
        poll = select.poll()
        poll.register(self._link, select.POLLIN)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._ending)
                if self._ending:
                    return Ended(self._text("was ended."))
                call, limit_s = self._calls[0], self._spec.call_timeout_s
            if call.method == "load":
                limit_s = max(LOAD_S, limit_s)
            elif call.method == "run_all":  # the worker cancels its runs before
                limit_s += self._spec.run_timeout_s
            left_s = call.began + limit_s - time.monotonic()
            if not poll.poll(max(0.0, left_s) * 1000):
                text = (
                    f"gave no answer to {call.method} within {limit_s:g} s. Raise its "
                    "call_timeout_s in EDGE_ENVIRONMENTS, or find out what it waits for."
                )
                return Ended(self._text(text))
            try:
                piece = self._link.recv(1 << 20)
            except OSError:
                return None
            if not piece:
                return None
            first, *others = piece.split(b"\n")
            unread.append(first)
            if sum(map(len, unread)) > MAX_REPLY_BYTES:
                text = f"answered {call.method} with more than {MAX_REPLY_BYTES >> 20} MiB."
                return Ended(self._text(text))
            for other in others:
                if (end := self._answer(b"".join(unread))) is not None:
                    return end
                unread = [other]

    def _wait_for_its_end(self) -> None:
        """It closed the link: its own exit code says more than the signal that ends it for sure."""
        ends = time.monotonic() + STOP_S
        while self.pid is not None and not self._ending and time.monotonic() < ends:
            time.sleep(0.01)

    def _answer(self, line: bytes) -> Ended | None:
        try:
            reply = json.loads(line)
            if not isinstance(reply, dict):
                raise TypeError
            if "ends" in reply:
                mistake = bool(reply.get("mistake"))
                return Ended(reply["ends"] if mistake else self._text(reply["ends"]), mistake)
            with self._changed:
                call = self._calls.popleft()
                if self._calls:
                    self._calls[0].began = time.monotonic()
        except (ValueError, TypeError, IndexError, RecursionError):
            return Ended(self._text("wrote into its worker's link; expected it not to."))
        call.future.set_result(reply)
        return None

    def _method(self) -> str:
        with self._changed:
            return self._calls[0].method if self._calls else "nothing"

    def _text(self, what: str) -> str:
        return f"Environment {self._spec.name!r} {what}"


def _how_ended(code: int, method: str) -> str:
    if code == -signal.SIGKILL:
        return (
            f"was killed in {method}. If nobody killed it, the machine's memory ran out: give the "
            "node more, or lower its memory_mb in EDGE_ENVIRONMENTS."
        )
    names = {known.value: known.name for known in signal.Signals}  # not of each real-time signal
    how = f"killed by {names.get(-code, f'signal {-code}')}" if code < 0 else f"exit code {code}"
    return f"ended in {method} ({how}); expected it to return."
