"""Floor 0: the one family of errors.

Every message says the place, what was found, what is allowed and what to do, in that order. The command line turns a
`UserError` into exit code 2 and a `RunError` into exit code 1; neither shows a traceback unless asked for.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class ModelGlueError(Exception):
    """Root of everything that modelglue raises on purpose."""

    exit_code = 1


class UserError(ModelGlueError):
    """Something that the user can mend: a recipe, a path, a permission, the content of a file."""

    exit_code = 2


class RunError(ModelGlueError):
    """A failure of the run itself: disk full, out of memory, a worker that died."""


class WorkerDiedError(RunError):
    """A worker process was killed from outside, most often for want of memory; what was finished stays for the next run."""


class RecipeError(UserError):
    """A recipe, zoo file or glue file that cannot be obeyed; names file and line."""


class CheckpointError(UserError):
    """A model folder or weight file that cannot be read or trusted; names path and tensor."""


class MergeError(UserError):
    """Inputs that a merge method cannot combine; names the method, the tensor and the models."""


#: what the system says of a path that cannot be used as it is: the user's to mend
MENDABLE = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


def did_you_mean(word: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return " Did you mean 'x'?" for the names in `known` nearest to `word`, or "" when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=limit, cutoff=0.6)
    if not near:
        return ""
    return " Did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
