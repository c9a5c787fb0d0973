"""An output goes to the hub: only when it is complete, and only where it is meant to go."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from modelglue.checkpoint.output.verify import verify
from modelglue.checkpoint.output.writer import RECIPE_FILE
from modelglue.checkpoint.reference import REFERENCE_KEYS
from modelglue.errors import RunError, UserError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: half-done siblings, locks and journals begin with a dot; nothing of an output does
_HIDDEN = [".*", "**/.*"]


def push(folder: Path, repository: str, *, private: bool = False, revision: str | None = None, message: str | None = None) -> str:
    """Upload an output folder to `org/name`, made if it is not there, on the branch `revision`; returns the URL of the commit.

    Uses the hub's own library and what it obeys: HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. An upload that broke off continues when it is
    called again: files that are there already are not sent twice. Memory: a few chunks, whatever the model's size.

    UserError, before anything is sent, for a folder that is no complete output (no record, or not what its record says), a wrong name, a
    missing token, and with `private` for a repository that exists and is public; UserError for what the hub refuses, RunError where
    it cannot be reached.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder. Give the folder of an output.")
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"'{repository}': is no name of a repository. Allowed is org/name.")
    faults = verify(folder, quick=True).faults
    if faults:
        found = "\n".join(f"  {name}: {fault}" for name, fault in faults[:8])
        raise UserError(f"{folder}: is not what was written, so it is not uploaded:\n{found}\nMerge it again, or restore it.")
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError("the hub wants to know who uploads. Set HF_TOKEN to a token with write permission, or run `hf auth login`.")
    api = HfApi()
    with _in_our_words(repository, api.endpoint):
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise UserError(
                f"'{repository}': exists and is public, so --private cannot be kept. Choose another name, or make it private first."
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit: Any = api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, ignore_patterns=_HIDDEN,
            commit_message=message or f"Add {folder.resolve().name}, merged by modelglue",
        )  # fmt: skip
    return str(commit.commit_url)


def local_references(folder: Path) -> list[str]:
    """Paths that the recipe in an output folder names: they go to the hub with it. Empty where there is no recipe."""
    try:
        recipe = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    return list(dict.fromkeys(name for name in _references(recipe) if name.startswith((".", "/", "~"))))


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for one in value:
            yield from _references(one)
    elif isinstance(value, dict):
        for key, one in value.items():
            if key in REFERENCE_KEYS and isinstance(one, str):
                yield one
            else:
                yield from _references(one)


@contextmanager
def _in_our_words(repository: str, endpoint: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (UserError, RunError):
        raise
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it.") from error
    except HfHubHTTPError as error:
        raise _refusal(repository, error) from error
    except Exception as error:  # the ways to say that there is no network have no class in common
        cause = error.__cause__ or error
        if isinstance(cause, HfHubHTTPError):
            raise _refusal(repository, cause) from error
        raise RunError(
            f"'{repository}': the hub at {endpoint} cannot be reached, or broke off ({type(cause).__name__}: {cause}). "
            "Try again later; what has arrived is not sent twice."
        ) from error


def _refusal(repository: str, error: Any) -> Exception:
    status = getattr(error.response, "status_code", None)
    said = str(getattr(error, "server_message", None) or error).strip().splitlines()
    words = {
        401: "the token is not valid. Set HF_TOKEN to a valid one with write permission.",
        403: "the token may not write there. Use one with write permission, of an account that may write to this organisation.",
        404: "there is no such organisation, repository or revision, or not for this token. Check the name, and whose token HF_TOKEN is.",
        409: "somebody else is writing it. Try again.",
        413: "that is more than the hub takes at once.",
    }  # fmt: skip
    text = words.get(status or 0, "")
    kind = RunError if status is None or status >= 500 else UserError
    return kind(f"'{repository}': {text or 'the hub refused:'} ({status}{': ' + said[0] if said else ''})")
