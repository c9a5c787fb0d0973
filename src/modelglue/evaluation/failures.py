"""What an exception says of the candidate that was being scored."""

from __future__ import annotations

from modelglue.errors import CheckpointError, MergeError, ModelGlueError, RecipeError, WorkerDiedError
from modelglue.recipe import Status


def judged(error: Exception, timeout: float | None = None) -> tuple[Status, str]:
    """Status and words; the error is raised again if no candidate could have been scored.

    `invalid`: it is no model. `failed`: memory, time, a model that cannot be read, an exception that is not ours.
    """
    if is_out_of_memory(error):
        return "failed", f"out of memory: {error}".rstrip(": ")
    if isinstance(error, TimeoutError):
        return "failed", str(error) or f"took longer than {timeout or 0:g} seconds"
    if isinstance(error, MergeError | RecipeError):
        return "invalid", str(error)
    if isinstance(error, CheckpointError | WorkerDiedError):
        return "failed", str(error)
    if isinstance(error, ModelGlueError):
        raise error
    return "failed", str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python had no memory, of the machine or of an accelerator."""
    text = str(error).lower()
    torchs = isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    return torchs or isinstance(error, MemoryError)
