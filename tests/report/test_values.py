"""The numbers and pictures of a page are those of the run's files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from modelglue.report.page import render
from modelglue.report.read import read_run
from modelglue.zoo import Similarity
from tests.report.conftest import Runs
from tests.report.tree import Node, parse

KINDS = ("plain", "many", "one-family", "no-test", "bad-merges", "bad-mixture")
KIND_NAMES = {"base": "base", "single": "single model", "average": "uniform average", "representative": "merge", "mixture": "mixture"}


def points(value: float) -> str:
    return f"{100 * value:.1f}"


def signed(value: float) -> str:
    written = f"{100 * value:+.1f}".replace("-", "−")
    return "0.0" if written in ("+0.0", "−0.0") else written


def grouped(number: int) -> str:
    return f"{number:,}".replace(",", "\u202f")


def judged(bounds: Sequence[float]) -> str:
    return "better" if bounds[0] > 0 else "worse" if bounds[1] < 0 else "undecided"


def is_final(row: dict[str, Any], outcome: dict[str, Any]) -> bool:
    kind = {"mixture": "mixture", "merge": "representative", "single": "single"}[outcome["kind"]]
    return row["name"] == outcome["name"] and row["kind"] == kind


class Scale:
    """What an axis says: read off two of its numbers."""

    def __init__(self, head: Node) -> None:
        ticks = [(float(label.text.replace("−", "-").replace("+", "")), percent(label.attributes["x"])) for label in head.all("text")]
        (self.first, at_first), (last, at_last) = ticks[0], ticks[-1]
        self.per_percent = (last - self.first) / (at_last - at_first)
        self.at_first = at_first
        assert all(abs(self.read(place) - value) < 0.01 for value, place in ticks), "the ticks are not evenly spaced"

    def read(self, place: float) -> float:
        return self.first + (place - self.at_first) * self.per_percent


def percent(text: str) -> float:
    assert text.endswith("%")
    return float(text[:-1])


def assert_drawn(plot: Node, scale: Scale, value: float, bounds: Sequence[float]) -> None:
    """Dot and line stand where the numbers are, to a tenth of a point."""
    line, dot = plot.one("line", "span"), plot.one("circle", "dot")
    places = dot.attributes["cx"], line.attributes["x1"], line.attributes["x2"]
    for place, wanted in zip(places, (value, *bounds), strict=True):
        assert scale.read(percent(place)) == pytest.approx(100 * wanted, abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_headline_agrees_with_results(runs: Runs, kind: str) -> None:
    results, outcome = runs.json(kind, "results"), runs.json(kind, "decisions")["outcome"]
    first = results["comparisons"][0]
    header = runs.page(kind).one("header")
    final = next(row for row in results["models"] if is_final(row, outcome))
    single = next(row for row in results["models"] if row["kind"] == "single" and row["name"] == first["b"])
    big = header.all("div", "big")
    assert [node.text for node in big] == [points(final["mean"]), points(single["mean"]), signed(first["difference"])]
    assert [node.text for node in header.all("div", "name")] == [outcome["name"], first["b"]]
    low, high = first["interval"]
    assert f"95 % interval {signed(low)} to {signed(high)}, paired" in header.text
    assert f"95 % interval {points(final['interval'][0])} to {points(final['interval'][1])}" in header.text
    assert signed(first["difference"]).lstrip("+−") in header.one("h1").text
    assert judged(first["interval"]) in big[2].classes
    items = sum(task["items"] for task in final["tasks"].values())
    assert (
        f"mean over 5 skills, {items:,} {results['split']} items".replace(",", "\u202f").replace("skills\u202f", "skills,") in header.text
    )


@pytest.mark.parametrize("kind", KINDS)
def test_score_table_agrees_with_results(runs: Runs, kind: str) -> None:
    results, outcome = runs.json(kind, "results"), runs.json(kind, "decisions")["outcome"]
    table = runs.page(kind).panel("Scores").one("table")
    heads = table.one("thead").one("tr").nodes
    assert [head.text for head in heads[:4]] == ["model", "kind", "family", "mean"]
    assert [head.text for head in heads[5:]] == results["skills"]
    scale = Scale(heads[4])
    wanted = sorted(results["models"], key=lambda row: -row["mean"])
    best = {skill: max(row["tasks"][skill]["score"] for row in wanted) for skill in results["skills"]}
    assert len(table.rows()) == len(wanted)
    for cells, row in zip(table.rows(), wanted, strict=True):
        name, kind_cell, family, mean, plot, *skills = cells
        assert name.one("span", "name").text == row["name"]
        assert kind_cell.text.removesuffix(" result") == KIND_NAMES[row["kind"]]
        assert kind_cell.text.endswith(" result") == is_final(row, outcome)
        assert family.text == ("–" if row["family"] is None else str(row["family"]))
        assert mean.text == points(row["mean"])
        assert float(mean.attributes["data-value"]) == row["mean"]
        assert_drawn(plot, scale, row["mean"], row["interval"])
        for cell, skill in zip(skills, results["skills"], strict=True):
            task = row["tasks"][skill]
            assert cell.text == points(task["score"])
            assert float(cell.attributes["data-value"]) == task["score"]
            assert cell.attributes["title"] == f"{points(task['interval'][0])} to {points(task['interval'][1])}"
            assert ("best" in cell.classes) == (task["score"] == best[skill])


@pytest.mark.parametrize("kind", KINDS)
def test_result_against_every_other_model(runs: Runs, kind: str) -> None:
    results, outcome = runs.json(kind, "results"), runs.json(kind, "decisions")["outcome"]
    table = runs.page(kind).panel("The result against every other model").one("table")
    scale = Scale(table.one("thead").one("tr").nodes[3])
    others = [row for row in sorted(results["models"], key=lambda row: -row["mean"]) if not is_final(row, outcome)]
    for cells, row in zip(table.rows(), others, strict=True):
        name, kind_cell, difference, plot, interval, *skills = cells
        value, *bounds = row["result_minus"]
        assert name.one("span", "name").text == row["name"]
        assert kind_cell.text.endswith("best") == (row["kind"] == "single" and row["name"] == results["comparisons"][0]["b"])
        assert difference.text == signed(value)
        assert judged(bounds) in difference.classes
        assert interval.text == f"{signed(bounds[0])} to {signed(bounds[1])}"
        assert judged(bounds) in plot.one("svg").classes
        assert_drawn(plot, scale, value, bounds)
        for cell, skill in zip(skills, results["skills"], strict=True):
            gap, *ends = row["tasks"][skill]["result_minus"]
            assert cell.text == signed(gap)
            assert cell.classes == ["heat", "gap", judged(ends)]
            assert cell.attributes["title"] == f"{signed(ends[0])} to {signed(ends[1])}"


@pytest.mark.parametrize("kind", KINDS)
def test_skill_by_skill_shows_the_whole_field(runs: Runs, kind: str) -> None:
    results, outcome = runs.json(kind, "results"), runs.json(kind, "decisions")["outcome"]
    table = runs.page(kind).panel("Skill by skill").one("table")
    scale = Scale(table.one("thead").one("tr").nodes[1])
    for cells, skill in zip(table.rows(), [None, *results["skills"]], strict=True):
        name, plot, score, best_score, best_name, difference, interval, verdict = cells
        rows = [
            {"name": row["name"], "kind": row["kind"], "final": is_final(row, outcome)}
            | ({**row, "score": row["mean"]} if skill is None else row["tasks"][skill] | {"name": row["name"], "kind": row["kind"]})
            for row in results["models"]
        ]
        final = next(row for row in rows if row["final"])
        best = max((row for row in rows if row["kind"] == "single"), key=lambda row: row["score"])
        assert name.one("span", "name").text == (skill or "all skills")
        if skill is not None:
            assert name.one("span", "sub").text == f"{final['items']} items"
        assert (score.text, best_score.text, best_name.text) == (points(final["score"]), points(best["score"]), best["name"])
        gap, *ends = best["result_minus"]
        if best["final"]:
            assert (difference.text, interval.text, verdict.text) == ("–", "", "same")
        else:
            assert (difference.text, verdict.text) == (signed(gap), judged(ends))
            assert interval.text == f"{signed(ends[0])} to {signed(ends[1])}"
        line = plot.one("line", "span")
        for place, end in zip(("x1", "x2"), final["interval"], strict=True):
            assert scale.read(percent(line.attributes[place])) == pytest.approx(100 * end, abs=0.1)
        marks = plot.one("svg", "field").all("svg")
        assert marks[-1].one("g").classes == ["mark", "final"], "the result is drawn last, in front"
        drawn = sorted(
            (mark.one("g").classes[1], mark.one("title").children[0], round(scale.read(percent(mark.attributes["x"])), 0)) for mark in marks
        )
        assert drawn == sorted(
            (
                "final" if row["final"] else row["kind"],
                f"{row['name']}: {points(row['score'])} ({points(row['interval'][0])} to {points(row['interval'][1])})",
                pytest.approx(100 * row["score"], abs=0.6),
            )
            for row in rows
        )


@pytest.mark.parametrize("kind", KINDS)
def test_merges_are_compared_as_in_results(runs: Runs, kind: str) -> None:
    results = runs.json(kind, "results")
    wanted = results["comparisons"][1:]
    titles = [head.text for head in runs.page(kind).all("h3")]
    assert ("Did merging help?" in titles) == bool(wanted)
    if not wanted:
        return
    table = runs.page(kind).panel("Did merging help?").one("table")
    scale = Scale(table.one("thead").one("tr").nodes[3])
    for cells, row in zip(table.rows(), wanted, strict=True):
        merge, rival, difference, plot, interval, verdict, skills = cells
        assert (merge.text, rival.text) == (row["a"], row["b"])
        assert skills.text == ("all skills" if row["skills"] == results["skills"] else ", ".join(row["skills"]))
        assert (difference.text, verdict.text) == (signed(row["difference"]), judged(row["interval"]))
        assert interval.text == f"{signed(row['interval'][0])} to {signed(row['interval'][1])}"
        assert_drawn(plot, scale, row["difference"], row["interval"])


@pytest.mark.parametrize("kind", ["plain", "many", "one-family", "one-model"])
def test_heat_map_cells_agree_with_the_matrix(runs: Runs, kind: str) -> None:
    families = runs.json(kind, "families")
    found = Similarity.load(runs.folder(kind) / "similarity.safetensors")
    picture = runs.page(kind).one("svg", "heatmap")
    order = [alias for family in families["families"] for alias in family["members"]]
    cells = picture.all("g", "cell")
    assert len(cells) == len(order) ** 2
    pairs = [*(family["weakest_pair"] for family in families["families"]), families["strongest_across"]]
    named = {frozenset(pair["models"]) for pair in pairs if pair}
    for cell, (a, b) in zip(cells, ((a, b) for a in order for b in order), strict=True):
        value = found.matrix[found.labels.index(a), found.labels.index(b)]
        tooltip = cell.one("title").children[0]
        assert bool(cell.all("rect", "named")) == (frozenset((a, b)) in named)
        if a == b:
            assert (cell.classes[1], tooltip, cell.text) == ("same", a, "")
        elif value != value:
            assert (cell.classes[1], tooltip, cell.text) == ("none", f"{a} – {b}: not comparable", "")
        else:
            assert cell.classes[1] == ("above" if value > families["threshold"] else "below")
            assert tooltip == f"{a} – {b}: {value:.4f}"
            assert cell.text == (f"{value:.3f}"[1:] if len(order) < 20 else "")
            low, high = (families["threshold"], 1.0) if value > families["threshold"] else (0.0, families["threshold"])
            shade = float(cell.all("rect")[0].attributes["style"].removeprefix("--t:"))
            assert shade == pytest.approx((value - low) / (high - low), abs=0.001)
    assert len(picture.all("rect", "family-box")) == len(families["families"])


@pytest.mark.parametrize("kind", ["plain", "many", "one-family", "one-model"])
def test_families_are_listed_with_what_holds_them(runs: Runs, kind: str) -> None:
    families = runs.json(kind, "families")
    listed = runs.page(kind).by_id("families").one("ul", "groups").nodes
    shown = families["families"] + ([None] if families["strongest_across"] else [])
    for item, family in zip(listed, shown, strict=True):
        pair = families["strongest_across"] if family is None else family["weakest_pair"]
        if family is not None:
            assert item.one("h3").text == f"Family {family['id']}"
            assert item.one("div", "members").text == ", ".join(family["members"])
        if pair:
            a, b = pair["models"]
            assert f"{a} – {b} {pair['similarity']:.4f}" in item.text


@pytest.mark.parametrize("kind", KINDS)
def test_ranking_agrees_with_decisions(runs: Runs, kind: str) -> None:
    decisions = runs.json(kind, "decisions")
    table = runs.page(kind).by_id("ranking").one("table")
    scale = Scale(table.one("thead").one("tr").nodes[3])
    home = {alias: family["id"] for family in decisions["families"] for alias in family["members"]}
    for number, (cells, row) in enumerate(zip(table.rows(), decisions["ranking"], strict=True), start=1):
        name, family, score, plot, *skills = cells
        assert name.text == f"{number}{row['alias']}"
        assert (family.text, score.text) == (str(home[row["alias"]]), points(row["score"]))
        assert [cell.text for cell in skills] == [points(row["tasks"][skill]) for skill in decisions["tasks"]["proxy"]]
        assert_drawn(plot, scale, row["score"], row["interval"])


def test_warnings_of_scores_stand_under_the_ranking(runs: Runs) -> None:
    data = read_run(runs.folder("small"))
    assert data.decisions is not None
    ranking = [{**row, "warnings": ["prompts were cut."] if row["alias"] in ("sort", "next") else []} for row in data.decisions["ranking"]]
    page = parse(render(replace(data, decisions={**data.decisions, "ranking": ranking})))
    order = [row["alias"] for row in ranking if row["warnings"]]
    assert [item.text for item in page.by_id("ranking").one("div", "note").all("li")] == [f"{alias}: prompts were cut." for alias in order]
    assert not runs.page("small").by_id("ranking").all("div", "note")


@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_agree_with_decisions(runs: Runs, kind: str) -> None:
    decisions = runs.json(kind, "decisions")
    panels = runs.page(kind).by_id("merging").all("div", "panel")
    for panel, family in zip(panels, decisions["families"], strict=True):
        weights = family["representative"]["weights"]
        if len(family["members"]) == 1:
            assert not panel.all("table")
            continue
        table = panel.one("table", "weights")
        for (name, bar, number), alias in zip(table.rows(), family["members"], strict=True):
            assert name.text == alias
            assert number.text == (f"{weights[alias]:.3f}" if alias in weights else "left out")
            assert bar.one("span", "bar").attributes["style"] == f"--w:{weights.get(alias, 0.0):.4f}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_round_of_every_strategy_is_shown(runs: Runs, kind: str) -> None:
    decisions = runs.json(kind, "decisions")
    panels = runs.page(kind).by_id("merging").all("div", "panel")
    seen = 0
    for panel, family in zip(panels, decisions["families"], strict=True):
        assert len(panel.all("details")) == len(family["strategies"])
        for part, run in zip(panel.all("details"), family["strategies"], strict=True):
            assert ("open" in part.attributes) == (run["strategy"] == family["chosen"])
            table = part.one("table", "rounds")
            heads = [head.text for head in table.one("thead").one("tr").nodes]
            scale = Scale(next(head for head in table.one("thead").one("tr").nodes if "plot" in head.classes))
            start, *rounds = table.rows()
            best = run["order"][0]
            assert [cell.text for cell in start[:3]] == [f"0{best}", "start", points(run["individual"][best])]
            before = run["individual"][best]
            for number, (cells, one) in enumerate(zip(rounds, run["rounds"], strict=True), start=1):
                shown = dict(zip(heads, cells, strict=True))
                assert shown["candidate"].text == f"{number}{one['candidate']}"
                assert shown["decision"].text == ("joined" if one["accepted"] else "left out")
                assert shown["alone"].text == points(run["individual"][one["candidate"]])
                assert shown["to beat"].text == points(before)
                assert shown["gain"].text == signed(one["interval"][0])
                assert shown["95 % interval"].text == f"{signed(one['interval'][1])} to {signed(one['interval'][2])}"
                assert shown["best trial" if one["scores"] else "with it"].text == points(one["score"])
                plot = next(cell for cell in cells if "plot" in cell.classes)
                assert_drawn(plot, scale, one["interval"][0], one["interval"][1:])
                if one["scores"]:
                    trial = next(cell for cell in cells if "chart" in cell.classes)
                    assert len(trial.all("circle", "trial")) == len(one["scores"])
                    for coefficient, score in one["scores"].items():
                        assert f"{float(coefficient):g}: {points(score)}" in trial.one("title").children[0]
                    top = max(one["scores"].values())
                    assert shown["at c"].text == f"{max(float(c) for c, score in one['scores'].items() if score == top):g}"
                before = one["current"]
                seen += 1
            kept = [alias for alias in run["order"] if run["weights"][alias]]
            assert part.all("p", "caption")[0].text == "Ends with " + ", ".join(f"{run['weights'][a]:.3f} {a}" for a in kept) + "."
    assert seen == sum(len(run["rounds"]) for family in decisions["families"] for run in family["strategies"])
    assert seen > 0


@pytest.mark.parametrize("kind", ["plain", "one-family"])
def test_strategies_agree_with_decisions(runs: Runs, kind: str) -> None:
    decisions = runs.json(kind, "decisions")
    for panel, family in zip(runs.page(kind).by_id("merging").all("div", "panel"), decisions["families"], strict=True):
        if not family["strategies"]:
            continue
        table = panel.one("table", "strategies")
        for cells, run in zip(table.rows(), family["strategies"], strict=True):
            kept = sum(1 for weight in run["weights"].values() if weight)
            numbers = [f"{kept} of {len(run['order'])}", str(run["evaluations"]), points(run["score"])]
            numbers += [] if run["confirmation"] is None else [points(run["confirmation"])]
            assert [cell.text for cell in cells[1:-1]] == numbers
            assert cells[-1].text == ("chosen" if run["strategy"] == family["chosen"] else "")


@pytest.mark.parametrize("kind", KINDS)
def test_experts_agree_with_decisions(runs: Runs, kind: str) -> None:
    decisions = runs.json(kind, "decisions")
    table = runs.page(kind).panel("Representatives on proxy items").one("table")
    skills = decisions["tasks"]["proxy"]
    for cells, expert, family in zip(table.rows(), decisions["experts"], decisions["families"], strict=True):
        found = family["representative"]
        assert [cell.text for cell in cells[:3]] == [expert["name"], str(expert["family"]), "expert" if expert["kept"] else "dropped"]
        values = cells[3 : 3 + len(skills)]
        assert [cell.text for cell in values] == [points(found["tasks"][skill]) for skill in skills]
        assert [skill for cell, skill in zip(values, skills, strict=True) if "best" in cell.classes] == expert["won"]
        assert cells[3 + len(skills)].text == points(found["proxy"])
        if not expert["won"]:
            assert cells[-1].text == expert["reason"]


def assert_counts(panel: Node, rows: Sequence[str], columns: Sequence[str], table: Any, home: dict[str, str]) -> None:
    """`table(row, column)` counts; the last line gives every column's share."""
    drawn = panel.one("table", "counts")
    assert [head.text for head in drawn.one("thead").one("tr").nodes[1:]] == [*columns, "all"]
    for cells, row in zip(drawn.rows(), rows, strict=True):
        numbers = [table(row, column) for column in columns]
        assert [cell.text for cell in cells] == [row, *map(str, numbers), str(sum(numbers))]
        for cell, column, number in zip(cells[1:-1], columns, numbers, strict=True):
            assert ("right" in cell.classes) == (home.get(row) == column)
            assert cell.attributes["style"] == f"--t:{number / sum(numbers):.3f}"
    everything = sum(table(row, column) for row in rows for column in columns)
    shares = [f"{100 * sum(table(row, column) for row in rows) / everything:.1f} %" for column in columns]
    assert [cell.text for cell in drawn.one("tfoot").one("tr").nodes] == ["share", *shares, grouped(everything)]


@pytest.mark.parametrize("kind", ["plain", "many", "no-test", "bad-mixture"])
def test_router_confusion_and_load_agree_with_the_files(runs: Runs, kind: str) -> None:
    decisions, results = runs.json(kind, "decisions"), runs.json(kind, "results")
    router, page, skills = decisions["router"], runs.page(kind), decisions["tasks"]["proxy"]
    experts, confusion = router["self_test"]["experts"], router["self_test"]["confusion"]
    home = {skill: expert["name"] for expert in decisions["experts"] for skill in expert["won"]}
    assert_counts(
        page.panel("Self-test: where each expert's own prompts go"), experts, experts,
        lambda row, column: confusion[experts.index(row)][experts.index(column)], {name: name for name in experts},
    )  # fmt: skip
    for split, load in (("proxy", router["load"]), (results["split"], results["routing"])):
        panel = page.panel(f"Load: where the {split} items of each skill go")
        assert_counts(panel, skills, experts, lambda row, column, load=load: load[row][column], home)
        right = sum(load[skill][home[skill]] for skill in skills) / sum(sum(load[skill].values()) for skill in skills)
        assert panel.one("p", "caption").text == f"{100 * right:.1f} % reach the expert that is best on their skill."
        assert f"{100 * right:.1f} % of the {split} items" in page.by_id("experts").one("p", "finding").text
    facts = [fact.text for fact in page.panel("The router").all("div", "value")]
    assert facts == [f"{100 * router['self_test']['accuracy']:.1f} %", signed(router["oracle_gap"]), "−0.0134", "2.71", "hidden"]
    assert page.panel("The router").one("div", "note").text == router["warnings"][0]


def test_a_merge_that_wins_everything_has_no_router(runs: Runs) -> None:
    page = runs.page("one-family")
    assert runs.json("one-family", "decisions")["router"] is None
    assert not page.all("table", "counts")
    assert "No router: the outcome is one model." in page.by_id("experts").text


@pytest.mark.parametrize("kind", KINDS)
def test_walk_counts_what_the_files_hold(runs: Runs, kind: str) -> None:
    zoo, families, decisions = (runs.json(kind, name) for name in ("zoo", "families", "decisions"))
    counts = [
        len(zoo["models"]),
        len(families["families"]),
        sum(family["representative"]["kind"] == "merge" for family in decisions["families"]),
        sum(expert["kept"] for expert in decisions["experts"]),
    ]
    steps = [item.text for item in runs.page(kind).one("ol", "walk").nodes]
    assert [int(step.split()[0]) for step in steps[:-1]] == counts
    assert steps[-1] == {"single": "single model"}.get(decisions["outcome"]["kind"], decisions["outcome"]["kind"])


def test_zoo_and_cost(runs: Runs) -> None:
    zoo, results, page = runs.json("plain", "zoo"), runs.json("plain", "results"), runs.page("plain")
    for cells, model in zip(page.by_id("zoo").one("table").rows(), zoo["models"], strict=True):
        assert [cell.text for cell in cells] == [
            *(model["alias"], model["architecture"], "5.41 k", "21.6 kB"),
            *(", ".join(model["domain"]), model["reference"], model["identity"][:10]),
        ]
        assert cells[-1].attributes["title"] == model["identity"]
    cost = page.by_id("cost")
    assert [fact.text for fact in cost.all("dd", "value")] == ["204", "81\u202f340", "238.0 kB"]
    assert results["cost"]["weights_bytes"] == 238_040


def test_times_come_from_the_log(runs: Runs) -> None:
    cost = runs.page("plain").by_id("cost")
    rows = [[cell.text for cell in cells] for cells in cost.one("table", "weights").rows()]
    assert [(row[0], row[-1]) for row in rows] == [
        ("description of the zoo", "0.2 s"),
        ("similarity", "2.0 s"),
        ("ranking", "14.2 s"),
        ("selection", "2 min 14 s"),
        ("writing merges", "0.4 s"),
        ("mixture and confirmation", "6.1 s"),
        ("final comparison", "41.0 s"),
        ("together", "3 min 17 s"),
    ]
    assert cost.one("p", "finding").text == "3 min 17 s in all, the largest part in selection (67.6 %)."
    assert "3 batches scored. First entry 2027-01-15 08:00:00 UTC, last 2027-01-15 08:03:20 UTC." in cost.text


def test_shades_are_within_the_scale(runs: Runs) -> None:
    for kind in KINDS:
        for found in re.findall(r"--[tw]:([^\";]*)", runs.text(kind)):
            assert 0.0 <= float(found) <= 1.0
