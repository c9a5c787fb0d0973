"""`level: auto`: the ways in which the experts can be joined, each scored on the proxy items; the best is kept.

Complete models behind one router always work. Where the experts share structure and tokens, their feed-forward networks can be
experts of one model too, routed by sample or by token, with all layers mixed or only the upper half (Model-GLUE, arXiv 2410.05357).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelglue.checkpoint import open_checkpoint
from modelglue.errors import UserError
from modelglue.glue.bench import Bench
from modelglue.glue.replay import MixturePlan
from modelglue.glue.run_folder import RunFolder
from modelglue.mixture import Mixture
from modelglue.models import LiveTextModel, load_live, load_tokenizer

#: name -> what it changes in the plan; the lower half of the layers stays merged where `half` is said
INSIDE: Mapping[str, Mapping[str, Any]] = {
    "ffn by sample": {"level": "ffn", "routing": "sample"},
    "ffn by token": {"level": "ffn", "routing": "token"},
    "ffn by token, lower half merged": {"level": "ffn", "routing": "token", "half": True},
}
#: tried before them: what always works
_FIRST: Mapping[str, Mapping[str, Any]] = {"complete models": {}}


class OneModel:
    """A mixture that is one model: experts inside, text in, text out. There is no one route of a prompt to report."""

    manifest = None

    def __init__(self, directory: Path) -> None:
        checkpoint = open_checkpoint(directory)
        self.identity = checkpoint.identity
        self._model = LiveTextModel(load_live(checkpoint), load_tokenizer(checkpoint))

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """See `TextModel`."""
        return self._model.loglikelihood(pairs)

    def generate(self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int) -> list[str]:
        """See `TextModel`."""
        return self._model.generate(prompts, until=until, max_new_tokens=max_new_tokens)


def opened(plan: MixturePlan, directory: Path) -> Mixture | OneModel:
    """What a plan has written."""
    return Mixture.load(directory) if plan.level == "model" else OneModel(directory)


def choose_level(bench: Bench, run: RunFolder, plan: MixturePlan) -> MixturePlan:
    """The plan at the level that scores best on the proxy items; of equal ones the first, complete models before all.

    Every way is written to a hidden folder and removed again; `levels.json` keeps the scores, and why some ways are closed.
    """
    if bench.file.mixture.level == "model":
        return plan
    found = run.step("levels.json", lambda: _tried(bench, run, plan))
    for row in found["levels"]:  # a run that continues has asked for the same as one that was never killed
        if row["identity"] is not None:
            bench.score_text_model(lambda: None, row["identity"], "proxy")
    return plan.model_copy(update=found["chosen"])


def _tried(bench: Bench, run: RunFolder, plan: MixturePlan) -> dict[str, Any]:
    """levels.json."""
    rows: list[dict[str, Any]] = []
    best, chosen = -1.0, dict[str, Any]()
    for name, changes in {**_FIRST, **INSIDE}.items():
        folder = run.path(f".level-{len(rows)}")
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        try:
            update = _changes(plan, run, changes)
            trial = plan.model_copy(update=update)
            trial.write(run.root, folder)
            model = opened(trial, folder)
            score = bench.score_text_model(model, model.identity, "proxy").mean
        except UserError as error:
            rows.append({"name": name, "score": None, "identity": None, "reason": str(error).replace(str(run.root), run.root.name)})
            continue
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        rows.append({"name": name, "score": score, "identity": model.identity, "reason": None})
        if score > best:
            best, chosen = score, update
    if best < 0:
        raise UserError("no level can join these experts: " + "; ".join(f"{row['name']}: {row['reason']}" for row in rows))
    return {"levels": rows, "chosen": chosen}


def _changes(plan: MixturePlan, run: RunFolder, changes: Mapping[str, Any]) -> dict[str, Any]:
    if not changes:
        return {}
    merged = 0
    if changes.get("half"):
        config = open_checkpoint(plan.specs(run.root)[0].path).config
        merged = int(config.get("num_hidden_layers") or config.get("n_layer") or 0) // 2
        if merged == 0:
            raise UserError("the experts' configs do not say how many layers there are, or there is one alone.")
    return {"level": changes["level"], "routing": changes["routing"], "merged_layers": merged, "learned": None}
