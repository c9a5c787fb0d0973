"""`modelglue push`: an output goes to the hub."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def push(
    folder: Path,
    repository: str,
    *,
    private: Annotated[bool, Parameter(negative=())] = False,
    revision: str | None = None,
    message: str | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Upload an output to the hub.

    Only a complete output is uploaded: its record must be there, and names, dtypes, shapes and recipe must agree with it
    (`modelglue verify` also hashes the weights). The token is taken from HF_TOKEN, the address from HF_ENDPOINT.

    Parameters
    ----------
    folder
        What `modelglue merge` wrote.
    repository
        Where it goes, org/name; it is made if it does not exist.
    private
        Make the repository private; one that exists and is public is refused.
    revision
        The branch to write to; it is made if it does not exist. Default: main.
    message
        Of the commit. Default: the folder's name.
    json
        Print the commit's address as JSON.
    quiet
        No progress; print nothing.
    """
    from modelglue.checkpoint.output.upload import local_references
    from modelglue.checkpoint.output.upload import push as upload
    from modelglue.cli.console import print_json, print_warnings, stderr

    local = local_references(folder)
    if local and not quiet:
        print_warnings(stderr(), [f"the recipe in {folder} names local paths, which everybody will see: {', '.join(local)}."])
    with _progress(shown=not quiet and not json):
        url = upload(folder, repository, private=private, revision=revision, message=message)
    if json:
        print_json({"folder": str(folder), "repository": repository, "commit": url})
    elif not quiet:
        print(url)


@contextmanager
def _progress(*, shown: bool) -> Iterator[None]:
    """The hub's own bars, on a terminal only."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if (shown and sys.stderr.isatty()) or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
