"""Programs that try what no program may. Every one is run for real, with small limits."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from modelglue.errors import RunError, UserError
from modelglue.evaluation import jail, sandbox
from modelglue.evaluation.sandbox import Isolation, Limits, Verdict, isolation_here, run_program

LIMITS = Limits(seconds=1.0, memory_bytes=200 * 2**20, file_bytes=2**20, processes=8)
ISOLATIONS: list[Isolation] = ["jail", "process"] if isolation_here() == "jail" else ["process"]
jailed = pytest.mark.skipif("jail" not in ISOLATIONS, reason="this system gives no jail")
everywhere = pytest.mark.parametrize("isolation", ISOLATIONS)


def run(source: str, isolation: Isolation, **limits: float) -> Verdict:
    return run_program(source, limits=Limits(**{**LIMITS.__dict__, **limits}), isolation=isolation)


def refused(source: str, isolation: Isolation, *said: str) -> None:
    verdict = run(source, isolation)
    assert not verdict.passed
    assert any(word in verdict.reason for word in said), verdict


@everywhere
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert sorted([3, 1, 2]) == [1, 2, 3]", None),
        ("import math, collections, re, heapq, itertools, functools, random, json, datetime\nassert math.pi > 3", None),
        ("if __name__ == '__main__': raise ValueError", None),
        ("x = 'ä\\ud800'\nassert len(x) == 2", None),
        ("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()", None),
        ("print('a' * 1000)", None),
        ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import sys\nsys.exit(0)", "ended with status 0 before its end"),
        ("import os\nos._exit(0)", "ended with status 0 before its end"),
        ("import sys\nsys.exit(3)", "ended with status 3 before its end"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
    ],
)
def test_a_program_passes_if_it_comes_to_its_end(isolation: Isolation, source: str, reason: str | None) -> None:
    verdict = run(source, isolation)
    assert (verdict.passed, verdict.reason) == (reason is None, reason or "")


@everywhere
def test_the_environment_is_empty(isolation: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    source = "import os, sys\nassert sorted(os.environ) == ['HOME', 'LANG', 'PATH', 'TMPDIR'], os.environ\nassert sys.argv == ['runner.py']"
    assert run(source, isolation) == Verdict(True, "", "")


# -- hostile ----------------------------------------------------------------------------------------------------------------------


@everywhere
def test_a_loop_without_end(isolation: Isolation) -> None:
    refused("while True: pass", isolation, "ran longer than 1 seconds")


@everywhere
def test_a_long_sleep(isolation: Isolation) -> None:
    refused("import time\ntime.sleep(1000)", isolation, "ran longer than 1 seconds")


@everywhere
@pytest.mark.parametrize("source", ["x = 'a' * 10**10", "x = []\nwhile True: x.append('a' * 10**7)"])
def test_a_memory_hog(isolation: Isolation, source: str) -> None:
    assert "MemoryError" in run(source, isolation, seconds=30).reason


@everywhere
def test_a_flood_of_output(isolation: Isolation) -> None:
    """It is read and thrown away; what is kept of it is little."""
    verdict = run("import os\nfor _ in range(2000): os.write(1, b'x' * 65536)", isolation, seconds=30)
    assert verdict.passed
    assert len(verdict.output) <= sandbox._KEPT
    refused("while True: print('x' * 10000)", isolation, "ran longer than 1 seconds")


@everywhere
def test_a_huge_file(isolation: Isolation) -> None:
    refused("open('f', 'w').write('x' * 10**7)", isolation, "File too large")


@everywhere
def test_a_network_connection(isolation: Isolation) -> None:
    """To somebody who listens on this very machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)
        port = server.getsockname()[1]
        source = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5).send(b'x')"
        refused(source, isolation, "Network is unreachable", "Connection refused", "PermissionError")
        with pytest.raises(BlockingIOError):
            server.accept()


@everywhere
def test_writing_outside(isolation: Isolation, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    name = repr(str(victim))
    for source in (f"open({name}, 'w').write('x')", f"import os\nos.remove({name})", f"import os\nos.truncate({name}, 0)"):
        refused(source, isolation, "PermissionError", "FileNotFoundError", "Read-only")
    refused(f"open({str(tmp_path / 'new')!r}, 'w')", isolation, "PermissionError", "FileNotFoundError", "Read-only")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "new").exists()


@jailed
def test_reading_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    tmp_path.chmod(0o777)
    for path in (tmp_path / "secret", Path("/etc/passwd"), Path(__file__), Path("/proc/self/environ")):
        refused(f"open({str(path)!r}).read()", "jail", "FileNotFoundError", "PermissionError")
    refused(f"import pathlib\npathlib.Path({os.__file__!r}).write_text('x')", "jail", "Read-only file system", "PermissionError")


@everywhere
def test_killing_others(isolation: Isolation) -> None:
    """Its parent, who runs it; us; everybody."""
    for target in ("os.getppid()", str(os.getpid())):
        verdict = run(f"import os, signal\nos.kill({target}, signal.SIGKILL)", isolation)
        assert isolation == "jail" or "PermissionError" in verdict.reason
    verdict = run("import os, signal\nos.kill(-1, signal.SIGKILL)", isolation)
    assert not verdict.passed
    assert run("pass", isolation).passed


@jailed
def test_a_fork_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded in number, and gone with the program."""
    monkeypatch.setattr(sandbox.secrets, "randbelow", lambda most: 12_345)
    source = """
import os
count = 0
try:
    while count < 500:
        if os.fork() == 0:
            import time
            time.sleep(1000)
        count += 1
except OSError:
    pass
assert 1 <= count <= 8, count
"""
    assert run(source, "jail", seconds=20) == Verdict(True, "", "")
    refused("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", "jail", "ran longer than 1 seconds")
    assert [path for path in Path("/proc").glob("[0-9]*") if _owner(path) == jail._FIRST_USER + 12_345] == []


def _owner(path: Path) -> int | None:
    try:
        return path.stat().st_uid
    except OSError:  # it has just ended
        return None


@pytest.mark.parametrize(
    "call",
    ["os.fork()", "os.system('true')", "__import__('subprocess').run(['true'])", "__import__('ctypes')", "os.execv('/bin/true', ['x'])"],
)
def test_other_processes_without_a_jail(call: str) -> None:
    refused(f"import os\n{call}", "process", "PermissionError")


@jailed
def test_it_is_nobody() -> None:
    source = "import os\nassert os.getuid() not in (0, %d) or %d\nassert os.getpid() == 1\nassert not os.path.exists('/tmp')"
    assert run(source % (os.getuid(), os.getuid() != 0), "jail").passed
    refused("import os\nos.setuid(0)", "jail", "PermissionError")
    refused("import os\nos.chroot('/work')", "jail", "PermissionError")


@everywhere
def test_nothing_is_left_behind(isolation: Isolation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    assert run("open('file', 'w').write('x')\nimport os\nos.mkdir('folder')", isolation).passed
    refused("open('file', 'w').write('x')\nwhile True: pass", isolation, "ran longer")
    assert list(tmp_path.iterdir()) == []


# -- what the kernel refuses ------------------------------------------------------------------------------------------------------

get_seccomp = 21
filtered = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.uname().machine not in jail._CALLS or ctypes.CDLL(None).prctl(get_seccomp, 0, 0, 0, 0) < 0,
    reason="this kernel knows no filters of system calls",
)
_CALL = "import ctypes\ncall = ctypes.CDLL(None, use_errno=True).syscall\nassert call({}) >= 0, ctypes.get_errno()"


def call_of(name: str, *arguments: int) -> str:
    """A program that asks the kernel itself: it passes if the kernel obeys, and fails with the kernel's reason if not."""
    numbers = jail._CALLS[os.uname().machine][1] if os.uname().machine in jail._CALLS else {}
    return _CALL.format(", ".join(map(str, (numbers.get(name, 0), *arguments))))


@filtered
@everywhere
@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.memfd_create('hidden')",  # memory that no limit counts
        call_of("shmget", 0, 2**20, 0o1600),
        call_of("unshare", 0x10000000),
        call_of("clone", 0x10000000 | 17, 0, 0, 0, 0),  # a process that would be root of its own
        call_of("ptrace", 0, 0, 0, 0),
        call_of("io_uring_setup", 1, 0),
    ],
)
def test_calls_that_are_refused(isolation: Isolation, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_HOOK", "")  # as if the program had got around Python's own refusals
    refused(source, isolation, "PermissionError", "AssertionError: 1")


@filtered
@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.fork()", "import subprocess\nsubprocess.run(['/bin/true'])", "import socket\nsocket.socket()",
        "import socket\nsocket.socket(socket.AF_UNIX)", call_of("clone", 17, 0, 0, 0, 0), call_of("socket", 2, 1, 0),
    ],
)  # fmt: skip
def test_no_sockets_and_no_other_processes_without_a_jail(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Python thinks of it."""
    monkeypatch.setattr(sandbox, "_HOOK", "")
    refused(source, "process", "PermissionError", "AssertionError: 1", "BlockingIOError")
    assert run("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()", "process").passed


@jailed
def test_processes_in_a_jail_are_its_own() -> None:
    """They are allowed, and share one folder of limited size."""
    source = (
        "import subprocess, sys\nassert subprocess.run([sys.executable, '-S', '-c', 'print(7)'], capture_output=True).stdout == b'7\\n'"
    )
    assert run(source, "jail", seconds=10).passed
    refused("for n in range(9): open(str(n), 'w').write('x' * 2**19)", "jail", "No space left on device")


# -- JavaScript -------------------------------------------------------------------------------------------------------------------


@jailed
@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("const f = (a) => a + 1;\nconsole.assert(f(1) === 2)", None),
        ("const assert = require('node:assert');\nassert.deepEqual([1], [1])", None),
        ("console.assert(1 === 2, 'no')", "Error: assertion failed: no"),
        ("process.exit(0)", "ended with status 0 before its end"),
        ("require('fs').readFileSync('/etc/passwd')", "Error: ENOENT: no such file or directory, open '/etc/passwd'"),
        ("while (true) {}", "ran longer than 3 seconds"),
    ],
)
def test_programs_in_javascript(source: str, reason: str | None) -> None:
    verdict = run_program(source, "javascript", Limits(seconds=3))
    assert (verdict.passed, verdict.reason) == (reason is None, reason or "")


def test_javascript_is_not_run_without_a_jail_or_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: sys.executable)
    with pytest.raises(RunError, match="only run in a jail"):
        run_program("", "javascript", isolation="process")
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"need Node\.js, and there is no 'node' on the path"):
        run_program("", "javascript")


def test_where_there_is_no_jail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that forbids namespaces is found out once, and then done without; asked for by name, the jail is refused."""
    broken = {"visible": ["/dev/null/none"]}
    settings = sandbox._settings
    monkeypatch.setattr(sandbox, "_settings", lambda *values: {**settings(*values), **(broken if values[-1] == "jail" else {})})
    isolation_here.cache_clear()
    try:
        assert isolation_here() == "process"
        assert run_program("assert True", limits=LIMITS).passed
        with pytest.raises(RunError, match="a generated program cannot be run: there is no jail"):
            run_program("", isolation="jail")
    finally:
        isolation_here.cache_clear()
