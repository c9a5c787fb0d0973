"""Floor 5: which members of a family are merged, with which coefficients.

Candidates out, scores in; no tensor is ever touched.
"""

from modelglue.search.ranking import Ranking, Rule
from modelglue.search.select import STRATEGIES, SelectResult, select
from modelglue.search.selection import Round, Selection
from modelglue.search.strategies import AverageSearch, CoefficientSearch, Searcher

__all__ = [
    "STRATEGIES",
    "AverageSearch",
    "CoefficientSearch",
    "Ranking",
    "Round",
    "Rule",
    "Searcher",
    "SelectResult",
    "Selection",
    "select",
]
