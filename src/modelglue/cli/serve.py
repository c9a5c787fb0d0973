"""`modelglue serve`: an OpenAI-compatible server over a model or a mixture."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key_file: Path | None = None,
    residency: str | None = None,
    dtype: Literal["float32", "stored"] = "float32",
    max_tokens: int = 4096,
    max_body: str = "1MiB",
    max_choices: int = 16,
    rows: int = 32,
    queue: int = 256,
    timeout: float = 600.0,
    json: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Serve a model or a mixture in OpenAI's dialect: completions, chat completions, streams, the list of models.

    Runs until it is interrupted. Behind a mixture every prompt is answered by the expert that the router chooses for it; prompts of
    one expert are written together, and new ones join between two tokens.

    Parameters
    ----------
    model
        Local folder, hub id, mixture folder, or recipe (.yaml), which is merged in memory.
    host
        Address to listen on. Others can reach the server at any but the default, so they need a key.
    port
        Port to listen on; 0 is any that is free.
    name
        What clients call the model; the folder's name unless given.
    api_key_file
        File with the key that clients must send. The variable MODELGLUE_API_KEY holds one, too.
    residency
        Which experts of a mixture are in memory: lazy (those that were needed), all, or lru:N (the N that were used last).
    dtype
        Compute in float32, or as stored: in the dtype of the files, which are then mapped and not copied.
    max_tokens
        Tokens that one choice may have at most.
    max_body
        Bytes that a request may have, such as 1MiB.
    max_choices
        Choices that a request may ask for: prompts times n.
    rows
        Choices that one expert writes at a time.
    queue
        Prompts that may wait; more are sent away with status 503.
    timeout
        Seconds that an answer may take, waiting included.
    json
        Print the address and the model's name as JSON when requests are accepted.
    quiet
        Say nothing but errors.
    """
    from modelglue.cli.console import parse_size, print_json
    from modelglue.cli.opening import open_live
    from modelglue.serve import Engine, Limits, host_of
    from modelglue.serve.run import check_installed
    from modelglue.serve.run import serve as run

    check_installed()
    limits = Limits(parse_size(max_body, "--max-body"), max_tokens, max_choices, rows, queue, timeout)
    key = _key(api_key_file)
    opened = open_live(model, residency=residency, dtype=dtype)
    called = name or (Path(model).resolve().name if Path(model).exists() else model)

    def ready(address: str) -> None:
        if json:
            print_json({"url": f"{address}/v1", "model": called})
            sys.stdout.flush()
        elif not quiet:
            print(f"{called} at {address}/v1 (Ctrl-C stops it)", file=sys.stderr, flush=True)

    try:
        run(Engine(host_of(opened), limits), called, host=host, port=port, api_key=key, ready=ready)
    except KeyboardInterrupt:
        if not quiet:
            print("stopped", file=sys.stderr)


def _key(file: Path | None) -> str | None:
    """The key of the file, else of the environment (an empty variable is none); UserError for what no client could send."""
    from modelglue.errors import UserError

    variable = "MODELGLUE_API_KEY"
    if file is None and not os.environ.get(variable):
        return None
    try:
        key = (os.environ[variable] if file is None else file.read_text(encoding="utf-8")).strip()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}). Give a file with one key.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is no text ({error.reason}). Give a file with one key.") from error
    if not key or not key.isascii() or len(key.split()) > 1:
        raise UserError(f"{variable if file is None else file}: holds no key; allowed is one line of letters, digits and signs.")
    return key
