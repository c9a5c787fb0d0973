"""Floor 5: which members of a family are merged, with which coefficients.

Candidates out, scores in; no tensor is ever touched.
"""

from modelglue.search.findings import SearchReport
from modelglue.search.heuristics import STRATEGIES, HeuristicSearch
from modelglue.search.journal import ReplayError
from modelglue.search.ranking import Ranking, Rule
from modelglue.search.recorded import recorded
from modelglue.search.run import candidate_of, progress_of, read_settings, run_study, warm_start
from modelglue.search.searcher import Budget, Needs, Outcome, Proposal, Searcher
from modelglue.search.select import SelectResult, select
from modelglue.search.selection import Round, Selection
from modelglue.search.settings import SEARCHERS, Facts, SearchSettings
from modelglue.search.strategies import AverageSearch, CoefficientSearch
from modelglue.search.study import Study
from modelglue.search.synthetic import SyntheticEvaluator

__all__ = [
    "SEARCHERS",
    "STRATEGIES",
    "AverageSearch",
    "Budget",
    "CoefficientSearch",
    "Facts",
    "HeuristicSearch",
    "Needs",
    "Outcome",
    "Proposal",
    "Ranking",
    "ReplayError",
    "Round",
    "Rule",
    "SearchReport",
    "SearchSettings",
    "Searcher",
    "SelectResult",
    "Selection",
    "Study",
    "SyntheticEvaluator",
    "candidate_of",
    "progress_of",
    "read_settings",
    "recorded",
    "run_study",
    "select",
    "warm_start",
]
