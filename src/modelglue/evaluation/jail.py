"""Runs as a program of its own, with nothing but the standard library: puts itself into a jail and becomes the generated program.

`sandbox` starts it, says what to run as JSON on its command line, and gives the program's files on standard input. What the jail stops
and what it does not is said there.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import stat
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: exit status that says that there is no jail to be had here; the reason is on standard error
NO_JAIL = 97
#: exit status that says that the time was over
LATE = 98
_NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x04000000 | 0x20000000 | 0x40000000  # mounts, IPC, host name, processes, network
_NEW_USER = 0x10000000
_RECURSIVE_PRIVATE = 0x4000 | 0x40000
_BIND = 0x1000 | 0x4000
_READ_ONLY = 0x20 | 0x1000 | 1
_HARDENED = 2 | 4  # no set-user-id programs, no devices
_DETACH = 2
_DEATH_SIGNAL, _NO_NEW_PRIVILEGES = 1, 38
_NOBODY = 65534
#: users that are nobody: a number each, so that limits per user are limits per program
_FIRST_USER, _USERS = 1_000_000, 30_000
#: memory that no limit counts, other namespaces, and what programs need least and kernels have had most flaws in
_REFUSED = (
    "shmget", "msgget", "semget", "memfd_create", "memfd_secret", "unshare", "setns", "mount", "ptrace", "process_vm_readv",
    "process_vm_writev", "bpf", "userfaultfd", "perf_event_open", "add_key", "request_key", "keyctl", "io_uring_setup",
)  # fmt: skip
#: where there is no jail, in which these are harmless
_REFUSED_ALONE = ("socket", "fork", "vfork")
#: machine -> what the kernel calls it, and the numbers of its system calls
_CALLS: Mapping[str, tuple[int, Mapping[str, int]]] = {
    "x86_64": (0xC000003E, {
        "shmget": 29, "socket": 41, "clone": 56, "fork": 57, "vfork": 58, "semget": 64, "msgget": 68, "ptrace": 101, "mount": 165,
        "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298, "setns": 308, "process_vm_readv": 310,
        "process_vm_writev": 311, "memfd_create": 319, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425, "memfd_secret": 447,
    }),
    "aarch64": (0xC00000B7, {
        "mount": 40, "unshare": 97, "ptrace": 117, "msgget": 186, "semget": 190, "shmget": 194, "socket": 198, "add_key": 217,
        "request_key": 218, "keyctl": 219, "clone": 220, "perf_event_open": 241, "setns": 268, "process_vm_readv": 270,
        "process_vm_writev": 271, "memfd_create": 279, "bpf": 280, "userfaultfd": 282, "io_uring_setup": 425, "memfd_secret": 447,
    }),
}  # fmt: skip
_SECCOMP, _CLONE3, _THREAD, _NEW_CONTROL_GROUP = 22, 435, 0x00010000, 0x02000000
#: calls from here on are those of another interface of the same kernel, with other numbers
_X32 = 0x40000000
_DEVICES = ("null", "zero", "urandom", "random")


def main(settings: Mapping[str, Any]) -> None:
    """Never returns: the process becomes the program, or ends."""
    files = json.load(sys.stdin)
    work = settings["folder"]
    if settings["jail"]:
        try:
            work = _jail(Path(work), settings["visible"], settings["file_bytes"], settings["node"])
        except OSError as error:
            print(f"{error}", file=sys.stderr)
            sys.exit(NO_JAIL)
    os.chdir(work)
    for name, text in files.items():
        Path(name).write_text(text, encoding="utf-8", errors="surrogatepass")
    if settings["jail"]:
        child = os.fork()  # the first process of the new process namespace; with it goes everything that it has started
        if child:
            _watch(child, settings["wall_seconds"])
        if os.geteuid() == 0 and settings["drop"]:
            user = _FIRST_USER + settings["number"] % _USERS
            for name in (".", *files):
                os.chown(name, user, user)
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
    else:
        signal.setitimer(signal.ITIMER_REAL, settings["wall_seconds"])
    _limit(settings)
    os.execve(settings["command"][0], settings["command"], settings["environment"])


def _watch(child: int, seconds: float) -> None:
    """Wait for the program, end it when its time is over, and bury it: not every system has somebody who buries orphans."""
    late = False

    def over(*_: object) -> None:
        nonlocal late
        late = True
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(LATE if late else code if code >= 0 else 128 - code)


def _limit(settings: Mapping[str, Any]) -> None:
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        _filter(libc, alone=not settings["jail"], node=settings["node"])
    limits = {
        "RLIMIT_CORE": 0, "RLIMIT_CPU": settings["seconds"], "RLIMIT_FSIZE": settings["file_bytes"], "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": settings["processes"], "RLIMIT_AS": settings["memory_bytes"],
    }  # fmt: skip
    for name, value in limits.items():
        kind = getattr(resource, name, None)
        if kind is not None and value is not None:
            hard = resource.getrlimit(kind)[1]
            most = value if hard == resource.RLIM_INFINITY else min(value, hard)
            try:
                resource.setrlimit(kind, (most, most))
            except (OSError, ValueError):
                continue  # a system that does not know this limit for this value


def _filter(libc: Any, *, alone: bool, node: bool) -> None:
    """System calls that the kernel refuses from now on; `alone`: sockets and other processes too. Nothing where it knows no filters."""
    found = _CALLS.get(os.uname().machine)
    if found is None or sys.maxsize < 2**32:
        return
    arch, numbers = found
    refused = [numbers[name] for name in _REFUSED if name in numbers and not (node and name == "io_uring_setup")]
    refused += [numbers[name] for name in _REFUSED_ALONE if alone and name in numbers]
    load, equal, at_least, any_of, give = 0x20, 0x15, 0x35, 0x45, 0x06
    number, architecture, first_argument = 0, 4, 16
    allow, not_permitted, unknown = 0x7FFF0000, 0x00050001, 0x00050026
    # (code, steps forward if true, if false, value)
    steps = [(load, 0, 0, architecture), (equal, 1, 0, arch), (give, 0, 0, not_permitted), (load, 0, 0, number)]
    steps += [(at_least, 0, 1, _X32), (give, 0, 0, not_permitted)]
    for call in refused:
        steps += [(equal, 0, 1, call), (give, 0, 0, not_permitted)]
    steps += [(equal, 0, 1, _CLONE3), (give, 0, 0, unknown)]  # its flags cannot be looked at; the C library takes clone instead
    steps += [(equal, 0, 5 if alone else 3, numbers["clone"]), (load, 0, 0, first_argument)]
    steps += [(any_of, 0, 1, _NEW_NAMESPACES | _NEW_USER | _NEW_CONTROL_GROUP), (give, 0, 0, not_permitted)]
    if alone:
        steps += [(any_of, 1, 0, _THREAD), (give, 0, 0, not_permitted)]
    steps.append((give, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    libc.prctl(_SECCOMP, 2, ctypes.c_void_p(ctypes.addressof(program)), 0, 0)


def _jail(folder: Path, visible: Sequence[str], file_bytes: int, node: bool) -> str:
    """New namespaces, and a root that holds `visible` (read-only), a few devices and an empty work folder in memory; its path."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()

    def call(name: str, *arguments: Any) -> None:
        if getattr(libc, name)(*arguments) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"{name}: {os.strerror(error)}")

    def mount(source: str, target: Path, kind: str | None, flags: int, data: str | None = None) -> None:
        texts = [None if text is None else text.encode() for text in (source, str(target), kind)]
        call("mount", *texts, ctypes.c_ulong(flags), None if data is None else data.encode())

    try:
        if user != 0:
            raise PermissionError
        call("unshare", _NEW_NAMESPACES)
    except OSError:
        call("unshare", _NEW_NAMESPACES | _NEW_USER)
        inside = 0 if user == 0 else _NOBODY
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{inside} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{inside} {group} 1")
    mount("none", Path("/"), None, _RECURSIVE_PRIVATE)
    mount("tmpfs", folder, "tmpfs", _HARDENED, f"size={2 * file_bytes},mode=755,nr_inodes=4096")
    for place in visible:
        source = Path(place)
        target = folder / place.lstrip("/")
        if source.is_symlink():  # /lib is usr/lib on many systems
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source.readlink())
            continue
        target.mkdir(parents=True, exist_ok=True)
        _bind(mount, source, target, os.statvfs(source).f_flag)
    devices = folder / "dev"
    devices.mkdir()
    for name in _DEVICES:
        if stat.S_ISCHR(Path("/dev", name).stat().st_mode):
            (devices / name).touch()
            mount(f"/dev/{name}", devices / name, None, 0x1000)
    if node and Path("/proc/version").exists():
        (folder / "proc").mkdir()
    (folder / "work").mkdir(mode=0o777)
    (folder / "old").mkdir()
    os.chdir(folder)
    call("syscall", _pivot_root(), b".", b"old")
    os.chdir("/")
    call("umount2", b"/old", _DETACH)
    Path("/old").rmdir()
    return "/work"


def _bind(mount: Any, source: Path, target: Path, flags: int) -> None:
    """The same files, read-only; what the system has locked about them stays as it is."""
    mount(str(source), target, None, _BIND)
    kept = flags & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME | os.ST_RELATIME)
    known = {os.ST_NOSUID: 2, os.ST_NODEV: 4, os.ST_NOEXEC: 8, os.ST_NOATIME: 1024, os.ST_NODIRATIME: 2048, os.ST_RELATIME: 1 << 21}
    same = sum(number for flag, number in known.items() if kept & flag)
    mount("none", target, None, _READ_ONLY | _HARDENED | same)


def _pivot_root() -> int:
    """The system call's number; the C library has no function for it."""
    numbers = {"x86_64": 155, "aarch64": 41, "riscv64": 41}
    machine = os.uname().machine
    if machine not in numbers:
        raise OSError(f"no jail on {machine}")
    return numbers[machine]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
