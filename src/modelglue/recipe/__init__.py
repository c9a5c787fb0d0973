"""Floor 3: recipes in, checkpoint expressions out; and the words in which search and evaluation talk."""

from modelglue.recipe.build import build, build_with_warnings, linear_recipe, merge, read_with_models
from modelglue.recipe.candidate import DATA_FLOW, LEVELS, WHOLE, Candidate, Cost, Evaluator, Level, Plan, Request, Scorer, Scores, Status
from modelglue.recipe.canonical import canonical, dump
from modelglue.recipe.check import CheckReport, check
from modelglue.recipe.document import Document, load_document, parse_document, read_document, validate
from modelglue.recipe.intervals import interval, paired_interval
from modelglue.recipe.mergeable import check_mergeable, vocabulary, warnings_of
from modelglue.recipe.read import read_recipe
from modelglue.recipe.schema import FORMAT, Recipe
from modelglue.recipe.stacking import Stack, stack

__all__ = [
    "DATA_FLOW",
    "FORMAT",
    "LEVELS",
    "WHOLE",
    "Candidate",
    "CheckReport",
    "Cost",
    "Document",
    "Evaluator",
    "Level",
    "Plan",
    "Recipe",
    "Request",
    "Scorer",
    "Scores",
    "Stack",
    "Status",
    "build",
    "build_with_warnings",
    "canonical",
    "check",
    "check_mergeable",
    "dump",
    "interval",
    "linear_recipe",
    "load_document",
    "merge",
    "paired_interval",
    "parse_document",
    "read_document",
    "read_recipe",
    "read_with_models",
    "stack",
    "validate",
    "vocabulary",
    "warnings_of",
]
