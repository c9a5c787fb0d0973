"""Floor 5: which members of a family are merged, with which coefficients.

Candidates out, scores in; no tensor is ever touched.
"""

from modelglue.search.heuristics import STRATEGIES, HeuristicSearch
from modelglue.search.ranking import Ranking, Rule
from modelglue.search.select import SelectResult, select
from modelglue.search.selection import Round, Selection
from modelglue.search.strategies import AverageSearch, CoefficientSearch

__all__ = [
    "STRATEGIES",
    "AverageSearch",
    "CoefficientSearch",
    "HeuristicSearch",
    "Ranking",
    "Round",
    "Rule",
    "SelectResult",
    "Selection",
    "select",
]
