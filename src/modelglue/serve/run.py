"""The server as a process, or as a thread of one."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from modelglue.errors import UserError
from modelglue.serve.engine import Engine

#: names under which this machine is asked when it listens to itself only
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
#: seconds that requests have to end when the server stops
_GRACE = 3


def serve(
    engine: Engine, name: str, *, host: str = "127.0.0.1", port: int = 8000, api_key: str | None = None, ready: Callable[[str], None]
) -> None:
    """Answer until the process is interrupted. `ready` is told the address as soon as requests are accepted.

    Raises UserError for an address that cannot be listened on, one that others can reach without an `api_key`, and where the libraries
    of the extra are missing.
    """
    uvicorn = _uvicorn()
    with _listening(host, port, api_key) as listener, engine:
        ready(_address(listener))
        uvicorn.Server(_config(uvicorn, engine, name, listener, api_key)).run(sockets=[listener])


@contextmanager
def serving(engine: Engine, name: str, *, host: str = "127.0.0.1", port: int = 0, api_key: str | None = None) -> Iterator[str]:
    """The same in a thread, for as long as the context lasts: gives the address. Port 0 is any that is free."""
    uvicorn = _uvicorn()
    with _listening(host, port, api_key) as listener, engine:
        server = uvicorn.Server(_config(uvicorn, engine, name, listener, api_key))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="modelglue-http", daemon=True)
        thread.start()
        try:
            yield _address(listener)
        finally:
            server.should_exit = True
            thread.join()


def check_installed() -> None:
    """Raise UserError where the libraries of the extra are missing."""
    _uvicorn()


def _uvicorn() -> Any:
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(f"serving needs the extra `serve` ({error.name} is not installed). Run pip install 'modelglue[serve]'.") from error
    return uvicorn


def _config(uvicorn: Any, engine: Engine, name: str, listener: socket.socket, api_key: str | None) -> Any:
    from modelglue.serve.app import application

    bound = listener.getsockname()[0]
    app = application(engine, name, api_key=api_key, hosts=(*_LOOPBACK, bound) if _is_loopback(bound) else None)
    return uvicorn.Config(app, log_level="warning", lifespan="off", ws="none", timeout_graceful_shutdown=_GRACE)


def _listening(host: str, port: int, api_key: str | None) -> socket.socket:
    if not 0 <= port <= 65535:
        raise UserError(f"port {port}: there is no such port; allowed is 1 to 65535, or 0 for any that is free.")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"'{host}' port {port}: is no address of this machine ({error}). Use --host 127.0.0.1.") from error
    if api_key is None and not _is_loopback(found[4][0]):
        raise UserError(f"{host} can be reached by others. Give an API key (--api-key-file), or listen on 127.0.0.1.")
    listener = socket.socket(found[0], socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(found[4])
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UserError(f"{host}:{port}: cannot be listened on ({error.strerror or error}). Choose another --port or --host.") from error
    return listener


def _is_loopback(address: Any) -> bool:
    return ipaddress.ip_address(str(address).partition("%")[0]).is_loopback


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
