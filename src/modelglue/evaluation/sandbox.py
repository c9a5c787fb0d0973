"""Generated programs are run here, and nowhere else.

A program is run in a process of its own, in an empty folder, with an empty environment, no input, and limits: wall-clock and processor
time, memory of each process, size of each file, number of open files and of processes, and output that is read and thrown away beyond a
few kilobytes. On Linux (x86-64 and arm64) the kernel refuses what goes around these limits or what programs need least: shared memory
without a file, new namespaces, looking into other processes, io_uring and the like.

In a *jail*, which Linux gives to root and, on most systems, to everybody (namespaces), the program also has
- no network: its only interface is a loopback of its own that is down;
- no files but the interpreter's and the system's libraries (read-only) and its folder, which is memory (twice the largest file, whatever
  the number of files) and goes with it;
- no processes but its own: it can neither see nor signal others, and all that it has started ends with it;
- no privileges: it is an unknown user, and gains none by running programs.
That stops loops, fork bombs, memory hogs, floods of output, reading and writing other files, connections, and killing the parent. All its
processes together may take the memory of one times their number.

Where there is no jail (containers that forbid namespaces, macOS) the limits stay, and Python itself refuses network, other processes,
signals and writing outside the folder; Linux's kernel refuses sockets and other processes too. That stops programs that a model writes by
mistake. It does not stop one that is written to break out (by tricks that go around the interpreter) from writing files and signalling
processes of the user, nor any from reading files that the user may read or from filling the disk with many files. JavaScript is then not
run at all.

Nothing here stops: flaws of the kernel; what can be read of the machine through the processor; using all of one core for the time that is
allowed; and a program that finds out how its success is reported and reports it without passing its tests. Do not run programs of somebody
who wants to hurt you on a machine that matters: use a virtual machine.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from modelglue.errors import RunError, UserError
from modelglue.evaluation import jail

Language = Literal["python", "javascript"]
Isolation = Literal["jail", "process"]

#: bytes of standard output and error that are kept; the rest is read and thrown away
_KEPT = 16_384
#: places that interpreters and their libraries need; those that exist are shown
_SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/bin", "/usr/local/lib", "/lib", "/lib64", "/bin", "/usr/share/nodejs", "/usr/share/node_modules")
#: seconds after the program's time until it is given up on: the jail has to be made as well
_GRACE = 1.0

_PYTHON = """
import sys
source = open("program.py", encoding="utf-8", errors="surrogatepass").read()
__HOOK__
def run():
    exec(compile(source, "program.py", "exec"), {"__name__": "program"})
run()
sys.stdout.flush()
__import__("os").write(1, __NONCE__)
"""
_JAVASCRIPT = """
console.assert = (ok, ...rest) => { if (!ok) { throw new Error("assertion failed: " + rest.join(" ")); } };
const run = new Function("require", require("fs").readFileSync("program.js", "utf8"));
run(require);
require("fs").writeSync(1, __NONCE__);
"""
#: what Python refuses where there is no jail. Audit hooks cannot be taken away again.
_HOOK = """
def hook():
    import os, sys
    home = os.path.realpath(os.getcwd()) + os.sep
    refused = ("socket.", "subprocess.", "os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.kill", "os.system", "ctypes.", "pty.",
               "os.chown", "os.chmod", "os.link", "os.symlink", "os.putenv", "signal.pthread_kill", "shutil.", "webbrowser.", "syslog.")
    named = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.utime")
    inside = lambda path: isinstance(path, int) or os.path.realpath(os.fsdecode(path)).startswith(home)
    def look(event, values):
        if event.startswith(refused) or (event == "import" and values[0] in ("_ctypes", "_posixsubprocess", "_socket")):
            raise PermissionError(event)
        if event == "open" and not inside(values[0]):
            mode, flags = values[1], values[2] or 0
            if (mode and any(c in mode for c in "wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
                raise PermissionError(event)
        if event in named and not all(inside(value) for value in values[:2] if isinstance(value, (str, bytes, os.PathLike))):
            raise PermissionError(event)
    sys.addaudithook(look)
hook()
del hook
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use. `memory_bytes` is address space (for JavaScript: the heap), `file_bytes` the size of each file."""

    seconds: float = 10.0
    memory_bytes: int = 512 * 2**20
    file_bytes: int = 16 * 2**20
    processes: int = 8


@dataclass(frozen=True)
class Verdict:
    """How a program ended: it `passed` if it came to its end by itself, without an exception and within its limits."""

    passed: bool
    reason: str
    """Why not, in a few words."""
    output: str
    """The beginning of what it wrote, for people."""


def run_program(
    source: str,
    language: Language = "python",
    limits: Limits = Limits(),
    *,
    isolation: Isolation | None = None,
) -> Verdict:
    """Run a program with its tests; see the module for what it cannot do. Default isolation: the best there is (`isolation_here`).

    Time: 0.1 s and the program's. Raises RunError where the program cannot be run at all, UserError for a language without interpreter.
    """
    kind = isolation or isolation_here()
    interpreter = _interpreter(language)
    if language != "python" and kind != "jail":
        raise RunError("programs in JavaScript are only run in a jail, and this system gives none (Linux namespaces are forbidden).")
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="modelglue-program-", ignore_cleanup_errors=True) as folder:
        command, files = _program(source, language, interpreter, nonce, limits, hooked=kind != "jail")
        settings = _settings(language, interpreter, command, limits, folder, kind)
        code, out, err, late = _communicate(settings, json.dumps(files), limits.seconds + _GRACE)
    if code == jail.NO_JAIL:
        raise RunError(f"a generated program cannot be run: there is no jail ({err.strip()}).")
    passed = out.rstrip().endswith(nonce) and code == 0 and not late
    shown = (out.replace(nonce, "") + err).strip()
    if passed:
        return Verdict(True, "", shown)
    lines = [line for line in err.strip().splitlines() if line]
    last = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")
    if late or code in (jail.LATE, -signal.SIGALRM, -signal.SIGXCPU, 128 + signal.SIGXCPU):
        reason = f"ran longer than {limits.seconds:g} seconds"
    else:
        reason = last or f"ended with status {code} before its end"
    return Verdict(False, reason, shown)


@functools.cache
def isolation_here() -> Isolation:
    """Whether this system gives a jail: tried once, with a program that does nothing."""
    if not sys.platform.startswith("linux"):
        return "process"
    try:
        return "jail" if run_program("", isolation="jail").passed else "process"
    except RunError:
        return "process"


def _interpreter(language: Language) -> str:
    if language == "python":
        return os.path.realpath(sys.executable)
    found = shutil.which("node")
    if found is None:
        raise UserError("programs in JavaScript need Node.js, and there is no 'node' on the path. Install it, or leave the task out.")
    return os.path.realpath(found)


def _program(
    source: str, language: Language, interpreter: str, nonce: str, limits: Limits, *, hooked: bool
) -> tuple[list[str], dict[str, str]]:
    """Command line and files."""
    if language == "python":
        runner = _PYTHON.replace("__NONCE__", repr(nonce.encode())).replace("__HOOK__", _HOOK if hooked else "")
        return [interpreter, "-I", "-S", "-B", "runner.py"], {"runner.py": runner, "program.py": source}
    runner = _JAVASCRIPT.replace("__NONCE__", json.dumps(nonce))
    heap = f"--max-old-space-size={max(limits.memory_bytes // 2**20, 16)}"
    return [interpreter, heap, "runner.js"], {"runner.js": runner, "program.js": source}


def _settings(language: Language, interpreter: str, command: Sequence[str], limits: Limits, folder: str, kind: Isolation) -> dict[str, Any]:
    """What `jail` is told."""
    homes = [sys.base_prefix] if language == "python" else []
    visible = [place for place in dict.fromkeys([*_SYSTEM, *homes, os.path.dirname(interpreter)]) if Path(place).is_dir()]  # noqa: PTH120
    kept = [place for place in visible if not any(place != other and place.startswith(other + "/") for other in visible)]
    javascript = language == "javascript"
    return {
        "folder": folder, "jail": kind == "jail", "drop": True, "node": javascript, "visible": kept, "command": list(command),
        "wall_seconds": limits.seconds,
        "environment": {"PATH": "/usr/bin:/bin", "HOME": "/work", "LANG": "C.UTF-8", "TMPDIR": "/work" if kind == "jail" else folder},
        "seconds": int(limits.seconds) + 1, "memory_bytes": None if javascript else limits.memory_bytes, "file_bytes": limits.file_bytes,
        "processes": limits.processes + (32 if javascript else 0), "number": secrets.randbelow(30_000),
    }  # fmt: skip


def _communicate(settings: Mapping[str, Any], files: str, seconds: float) -> tuple[int, str, str, bool]:
    """(exit status, output, errors, whether the time was over) of the jail's process group, which is gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", jail.__file__, json.dumps(settings)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", env={}, start_new_session=True, close_fds=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    end = time.monotonic() + seconds
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(files.encode("utf-8", errors="surrogatepass"))
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        out, err, late = _read([process.stdout, process.stderr], end)
        if not late:
            try:
                process.wait(max(end - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                late = True
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _read([process.stdout, process.stderr], time.monotonic() + _GRACE)  # whoever had them is gone when they end
        for stream in (process.stdout, process.stderr):
            stream.close()
    return process.returncode, out, err, late


def _read(streams: Sequence[IO[bytes]], end: float) -> tuple[str, str, bool]:
    """The ends of two streams, read until both are closed or the time is over: the last bytes say what went wrong."""
    kept = [b""] * len(streams)
    with selectors.DefaultSelector() as selector:
        for number, stream in enumerate(streams):
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ, number)
        while selector.get_map():
            left = end - time.monotonic()
            if left <= 0:
                break
            for key, _ in selector.select(left):
                data = os.read(key.fd, 2**16)
                if not data:
                    selector.unregister(key.fileobj)
                kept[key.data] = (kept[key.data] + data)[-_KEPT:]
        late = bool(selector.get_map())
    out, err = (data.decode("utf-8", errors="replace") for data in kept)
    return out, err, late
