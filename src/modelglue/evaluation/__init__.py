"""Floor 5: what a candidate is worth, item by item, and never measured twice."""

from modelglue.evaluation.candidates import CandidateEvaluator
from modelglue.evaluation.evaluate import evaluate
from modelglue.evaluation.function import FunctionEvaluator
from modelglue.evaluation.items import Item
from modelglue.evaluation.resident import ResidentModel
from modelglue.evaluation.scoring import score_text_model
from modelglue.evaluation.store import ScoreStore
from modelglue.evaluation.tasks import TaskSet, leak_check
from modelglue.evaluation.vllm_engine import VllmResident

__all__ = [
    "CandidateEvaluator",
    "FunctionEvaluator",
    "Item",
    "ResidentModel",
    "ScoreStore",
    "TaskSet",
    "VllmResident",
    "evaluate",
    "leak_check",
    "score_text_model",
]
