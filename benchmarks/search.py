"""What a search finds for the items that it may score: every strategy and searcher on the tiny zoo, with racing and without.

    python benchmarks/search.py out/ --seeds 5 --budgets 500,2000,8000

Writes out/search.md and out/search.json. Everything is kept in `out/` (item scores, finished runs), so that a second call only adds what
is missing; what was begun with other options is refused. A seed draws the items that are searched on, out of the proxy sets, besides
whatever the searcher draws, so searchers that draw nothing differ by seed, too. Test scores choose nothing.

Three parts (`--parts`): `budgets` runs every searcher at every budget; `racing` runs every searcher that may race over the same candidates
with racing and without; `start` compares the trials of CMA-ES started at the middle and started from Heuristic-Coefficient.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import search_table
from modelglue.errors import UserError
from modelglue.evaluation import CandidateEvaluator
from modelglue.evaluation.places import Place
from modelglue.recipe import Candidate, Level, Plan, Request, Scores
from modelglue.search import SearchReport, run_study
from modelglue.search.randomness import permutation, rng
from modelglue.search.settings import BudgetSettings, Facts, FitnessSettings, SearcherSettings, SpaceSettings
from modelglue.studies.bench import Bench, open_bench
from modelglue.studies.facts import facts_of
from modelglue.studies.schema import SearchFile

ZOO = Path(__file__).parents[1] / "examples" / "tiny-zoo"
#: more trials than any budget here pays for
ENDLESS = 10_000


@dataclass(frozen=True)
class Case:
    """A way to search. `ends`: by itself, after a number of candidates that the members say."""

    searcher: Mapping[str, Any]
    space: Mapping[str, Any] = field(default_factory=dict)
    fitness: Mapping[str, Any] = field(default_factory=dict)
    races: bool = True
    ends: bool = False


def _cma(**space: Any) -> Case:
    return Case({"name": "cma", "trials": ENDLESS}, space)


CASES: Mapping[str, Case] = {
    "random": Case({"name": "random", "trials": ENDLESS}),
    "grid": Case({"name": "grid", "steps": 3}),
    "average": Case({"name": "average"}, ends=True),
    "coefficient": Case({"name": "coefficient"}, ends=True),
    "coefficient, coarse": Case({"name": "coefficient", "coarse": True}, ends=True),
    "similarity_highest": Case({"name": "similarity_highest"}, ends=True),
    "similarity_lowest": Case({"name": "similarity_lowest"}, ends=True),
    "all": Case({"name": "all"}, ends=True),
    "cma": _cma(),
    "cma, heuristic start": Case({"name": "cma", "init": "heuristic"}),
    "cma, 4 layers": _cma(granularity=4),
    "cma, task_arithmetic": _cma(method="task_arithmetic"),
    "cma, ties": _cma(method="ties"),
    "cma, dare_linear": _cma(method="dare_linear"),
    "cma, half of the items": Case({"name": "cma", "trials": ENDLESS}, fitness={"kind": "item_response"}, races=False),
    "evolution": Case({"name": "evolution"}),
    "evolution, half of the items": Case({"name": "evolution"}, fitness={"kind": "item_response"}, races=False),
    "tpe": Case({"name": "tpe"}),
    "recycling": Case({"name": "recycling", "trials": ENDLESS}),
    "kinship_greedy": Case({"name": "kinship_greedy"}, races=False, ends=True),
    "map": Case({"name": "map", "points": 40}, races=False, ends=True),
}


@dataclass(frozen=True)
class Sampled:
    """An evaluator on `size` of its items of every task, drawn by `seed`."""

    evaluator: CandidateEvaluator
    seed: int
    size: int
    levels: frozenset[Level] = frozenset({"E0", "E1", "E2", "E3"})

    @property
    def tasks(self) -> Sequence[str]:
        return self.evaluator.tasks

    @property
    def identity(self) -> str:
        return f"{self.evaluator.identity} {self.seed} {self.size}"

    @cached_property
    def _items(self) -> Mapping[str, tuple[str, ...]]:
        pools = {task: self.evaluator.items(task) for task in self.tasks}
        return {
            task: tuple(pool[place] for place in permutation(rng(self.seed, "benchmark", task), len(pool))[: self.size])
            for task, pool in pools.items()
        }

    def items(self, task: str) -> Sequence[str]:
        return self._items[task]

    def evaluate(self, candidate: Candidate, plan: Plan = Plan()) -> Scores:  # noqa: B008 - immutable
        return self.evaluator.evaluate(candidate, plan if plan.items is not None else Plan(dict(self._items), plan.seed))

    def evaluate_many(self, requests: Sequence[Request]) -> Iterator[tuple[int, Scores]]:
        for number, (candidate, plan) in enumerate(requests):
            yield number, self.evaluate(candidate, plan)


class Runs:
    """Finished runs, one JSON line each, under the words that tell them apart."""

    def __init__(self, path: Path, options: Mapping[str, Any]) -> None:
        self._path = path
        self._known: dict[str, dict[str, Any]] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and json.loads(lines[0]) != options:
            raise UserError(f"{path}: was begun with {lines[0]}. Give the same options, or another folder.")
        if not lines:
            path.write_text(json.dumps(options) + "\n")
        for line in lines[1:]:
            row = json.loads(line)
            self._known[row["key"]] = row

    def get(self, *words: Any) -> dict[str, Any] | None:
        return self._known.get(" | ".join(map(str, words)))

    def add(self, row: Mapping[str, Any], *words: Any) -> dict[str, Any]:
        key = " | ".join(map(str, words))
        self._known[key] = {"key": key, **row}
        with self._path.open("a") as file:
            file.write(json.dumps(self._known[key]) + "\n")
        return self._known[key]


class Laboratory:
    """The models, their item sets, and what has been run on them."""

    def __init__(self, bench: Bench, proxy: CandidateEvaluator, test: CandidateEvaluator, runs: Runs, options: argparse.Namespace) -> None:
        self.bench, self.runs, self.options = bench, runs, options
        self._proxy, self._test = proxy, Sampled(test, 0, options.test_items)
        self._facts: dict[str, Facts] = {}
        self.uniform = Candidate.linear(dict.fromkeys(bench.settings.members, 1.0))

    def test(self, candidate: Candidate) -> float:
        return self._test.evaluate(candidate).mean

    def run(self, name: str, seed: int, *, racing: bool, what: str, budget: Mapping[str, int]) -> dict[str, Any]:
        """One search, unless it has been run before; `what` names the part that it is for."""
        words = (what, name, "racing" if racing else "everything", seed, json.dumps(budget))
        if (known := self.runs.get(*words)) is not None:
            return known
        case = CASES[name]
        kind: dict[str, Any] = {"kind": "racing" if racing else "everything", **case.fitness}
        if kind["kind"] == "item_response":
            kind["items"] = self.options.items // 2
        settings = self.bench.settings.model_copy(
            update={
                "searcher": SearcherSettings.model_validate(case.searcher), "space": SpaceSettings.model_validate(case.space),
                "fitness": FitnessSettings.model_validate(kind), "budget": BudgetSettings(**budget), "seed": seed,
            }
        )  # fmt: skip
        tasks = self.bench.tasks["proxy"]
        if (kind_of_facts := f"{case.searcher['name']} {case.space}") not in self._facts:
            self._facts[kind_of_facts] = facts_of(settings, self.bench.checkpoints, tasks, ZOO)
        evaluator = Sampled(self._proxy, seed, self.options.items)
        report = run_study(settings, evaluator, None, facts=self._facts[kind_of_facts])
        best = report.best.proposal.candidate if report.best is not None else None
        row: dict[str, Any] = {
            "test": self.test(best or self.uniform), "items": report.spent["items"], "candidates": report.counts["candidates"],
            "pruned": report.counts["pruned"], "proxy": report.best.value if report.best is not None else None,
            "trials": _improvements(report),
        }  # fmt: skip
        if what == "budgets" and budget["items"] == max(self.options.budgets):
            row["area"] = self._area(report, budget["items"])
        print(*words, {**row, "trials": len(row["trials"])}, flush=True)
        return self.runs.add(row, *words)

    def _area(self, report: SearchReport, budget: int) -> float:
        """Mean over items of the test score of the candidate that was best by then; of the uniform average before there is one."""
        total, before, current, best = 0.0, 0, self.test(self.uniform), float("-inf")
        for outcome, row in zip(report.outcomes, report.history(), strict=True):
            items = min(row["items"], budget)
            total += current * (items - before)
            before = items
            if outcome.whole and outcome.merit > best and outcome.proposal.candidate is not None:
                best, current = outcome.merit, self.test(outcome.proposal.candidate)
        return (total + current * (budget - before)) / budget


def _improvements(report: SearchReport) -> list[tuple[int, float]]:
    """(candidates so far, best value so far), where it got better; a recipe that was asked for before is no new candidate."""
    found: list[tuple[int, float]] = []
    seen: set[str] = set()
    for outcome in report.outcomes:
        if outcome.proposal.candidate is not None:
            seen.add(outcome.proposal.candidate.key)
        if outcome.whole and (not found or outcome.value > found[-1][1]):
            found.append((len(seen), outcome.value))
    return found


def _bench(options: argparse.Namespace) -> Bench:
    tasks = {"include": "tasks", **{split: [f"{skill}_{split}" for skill in options.skills] for split in ("proxy", "test")}}
    return open_bench(SearchFile.model_validate({"zoo": "zoo.yaml", "members": options.members, "tasks": tasks}), ZOO)


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budgets", type=_numbers, default=[500, 2000, 8000])
    parser.add_argument("--skills", type=_words, default=["reverse", "sort", "next", "larger"])
    parser.add_argument("--members", type=_words, default=["reverse", "sort", "next", "larger", "generalist", "corrupted"])
    parser.add_argument("--items", type=int, default=40, help="items of every skill that a search sees")
    parser.add_argument("--test-items", type=int, default=200, help="items of every skill that results are measured on")
    parser.add_argument("--searchers", default="", help="parts of names, separated by '/'; default all")
    parser.add_argument("--parts", type=_words, default=["budgets", "racing", "start"])
    return parser.parse_args()


def main() -> None:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    fixed = {name: getattr(options, name) for name in ("skills", "members", "items", "test_items", "budgets")}
    runs = Runs(options.out / "runs.jsonl", fixed)
    bench = _bench(options)
    names = [name for name in CASES if any(word in name for word in options.searchers.split("/"))]
    most = max(options.budgets) // (options.items * len(options.skills))  # candidates that the largest budget pays for
    with bench.scoring(options.out / "scores.sqlite", Place(workers=1)) as evaluators:
        lab = Laboratory(bench, evaluators["proxy"], evaluators["test"], runs, options)
        kinds = [(name, racing) for name in names for racing in ((False, True) if CASES[name].races else (False,))]
        found: dict[str, Any] = {"options": fixed, "seeds": options.seeds, "uniform": lab.test(lab.uniform)}
        found["members"] = {alias: lab.test(Candidate.single(alias)) for alias in bench.settings.members}
        # seed by seed, so that a run that is ended early has every searcher
        every: list[dict[str, Any]] = []
        for seed in range(options.seeds):
            for name, racing in kinds if "budgets" in options.parts else []:
                for budget in options.budgets:
                    row = lab.run(name, seed, racing=racing, what="budgets", budget={"items": budget})
                    every.append({"searcher": name, "racing": racing, "seed": seed, "budget": budget, **row})
            for name, racing in kinds if "racing" in options.parts else []:
                if CASES[name].races:
                    limit = {} if CASES[name].ends else {"candidates": most}
                    row = lab.run(name, seed, racing=racing, what="racing", budget=limit)
                    every.append({"searcher": name, "racing": racing, "seed": seed, "budget": None, **row})
            for name in ("cma", "cma, heuristic start") if "start" in options.parts else ():
                row = lab.run(name, seed, racing=False, what="start", budget={"candidates": 200})
                every.append({"searcher": name, "racing": False, "seed": seed, "budget": "200 trials", **row})
            found["runs"] = every
            (options.out / "search.json").write_text(json.dumps(found, indent=1) + "\n")
            (options.out / "search.md").write_text(search_table.markdown(found))
    print(search_table.markdown(found))


if __name__ == "__main__":
    main()
