"""Floor 6: searches over real models, from a file to a folder: the zoo opened, the tasks loaded, search and evaluation joined."""

from modelglue.studies.imported import Imported
from modelglue.studies.schema import SearchFile
from modelglue.studies.study_folder import (
    Finished,
    best_of,
    expression_of,
    limits_of,
    read_result,
    read_search,
    recipe_of,
    resume_search,
    run_search,
    write_candidate,
)

__all__ = [
    "Finished",
    "Imported",
    "SearchFile",
    "best_of",
    "expression_of",
    "limits_of",
    "read_result",
    "read_search",
    "recipe_of",
    "resume_search",
    "run_search",
    "write_candidate",
]
