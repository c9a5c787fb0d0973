"""Numbers as text, axes, findings in words, and colours that can be told apart."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import modelglue.report
from modelglue.report import findings, text
from modelglue.report.charts import Axis, best_trial, heat, trials, verdict
from modelglue.report.heatmap import lowest
from modelglue.report.svg import tag
from tests.report.conftest import Runs
from tests.report.tree import parse

NARROW = "\u202f"


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (text.score(0.8731), "87.3"), (text.score(1.0), "100.0"), (text.score(None), "–"), (text.score(math.nan), "–"),
        (text.score(-0.05), "−5.0"), (text.gain(0.0142), "+1.4"), (text.gain(-0.0142), "−1.4"), (text.gain(0.0), "0.0"),
        (text.gain(0.0004), "0.0"), (text.gain(-0.0004), "0.0"), (text.gain(0.1), "+10.0"), (text.gain(None), "–"),
        (text.interval([-0.01, 0.02]), "−1.0 to +2.0"), (text.with_interval(0.5, [0.4, 0.6]), "50.0 (40.0 to 60.0)"),
        (text.similarity(0.96678), "0.9668"), (text.similarity(-0.2), "−0.2000"), (text.similarity(math.nan), "–"),
        (text.short_similarity(0.9312), ".931"), (text.short_similarity(0.9999), "1.00"), (text.short_similarity(-0.25), "−.250"),
        (text.short_similarity(-1.0), "−1.00"), (text.plain(-0.01344), "−0.0134"), (text.plain(27.13), "27.1"),
        (text.percent(1, 3), "33.3 %"), (text.percent(0, 0), "–"), (text.count(1234567), f"1{NARROW}234{NARROW}567"),
        (text.count(12), "12"),
        (text.parameters(6_738_415_616), "6.74 B"), (text.parameters(541_056), "541 k"), (text.parameters(70_000_000_000), "70.0 B"),
        (text.parameters(999_600), "1.00 M"), (text.parameters(12), "12"), (text.parameters(1_800_000_000_000), "1,800 B"),
        (text.size(999), "999 B"), (text.size(2_164_224), "2.2 MB"), (text.size(5e12), "5.00 TB"), (text.size(15e9), "15.0 GB"),
        (text.duration(0.04), "0.0 s"), (text.duration(59.94), "59.9 s"), (text.duration(59.96), "1 min 00 s"),
        (text.duration(3599.6), "1 h 00 min"), (text.duration(133.5), "2 min 14 s"), (text.duration(90_000), "25 h 00 min"),
        (text.clip("abcdef", 4), "abc…"), (text.clip("abcd", 4), "abcd"), (str(text.width("a名")), "3"),
        (text.listed([]), ""), (text.listed(["a"]), "a"), (text.listed(["a", "b", "c"]), "a, b and c"),
        (text.number_of(1, "family", "families"), "1 family"), (text.number_of(0, "family", "families"), "0 families"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(written: str, wanted: str) -> None:
    assert written == wanted


SHARES = st.floats(0, 1)


@given(values=st.lists(SHARES, min_size=1, max_size=8), signed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_an_axis_holds_its_values_between_few_round_ticks(values: list[float], signed: bool) -> None:
    axis = Axis.around(values, signed=signed)
    assert all(0 < axis.share(value) < 1 for value in [*values, *([0.0] if signed else [])])
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 6
    assert all(0 <= axis.share(tick) <= 1 for tick in ticks)
    steps = {round(100 * (b - a), 6) for a, b in pairwise(ticks)}
    assert len(steps) <= 1
    for step in steps:
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert round(mantissa, 6) in (1, 2, 5)
    if signed:
        assert min(abs(tick) for tick in ticks) == 0


def test_an_axis_of_nothing_is_an_axis() -> None:
    assert Axis.around([math.nan]).ticks()
    assert Axis.around([]).share(0.5) == pytest.approx(0.5)
    labels = re.findall(">([^<>]+)<", str(Axis.around([-0.02, 0.03], signed=True, most=8).head()))
    assert labels == ["−2", "−1", "0", "+1", "+2", "+3"]


@pytest.mark.parametrize(
    ("bounds", "wanted"), [((0.01, 0.2), "better"), ((-0.2, -0.01), "worse"), ((0.0, 0.2), "undecided"), ((-0.1, 0.1), "undecided")]
)
def test_an_interval_that_holds_0_is_undecided(bounds: tuple[float, float], wanted: str) -> None:
    assert verdict(bounds) == wanted


def test_equal_trials_go_to_the_larger_coefficient() -> None:
    assert best_trial({"0.1": 0.5, "0.9": 0.5, "0.5": 0.4}) == (0.9, 0.5)


def test_noise_is_drawn_small() -> None:
    """Trials that differ by less than five points stand closer together than the picture is high."""

    def heights(scores: dict[str, float], before: float) -> list[float]:
        picture = parse(f"<!doctype html>{trials(scores, before, taken=True)}")
        return [float(dot.attributes["cy"]) for dot in picture.all("circle", "trial")]

    low, high = heights({"0.2": 0.500, "0.8": 0.505}, 0.5)
    assert low - high == pytest.approx(0.1 * 32, abs=0.02)
    low, high = heights({"0.2": 0.2, "0.8": 0.9}, 0.5)
    assert low - high == pytest.approx(32, abs=0.02)


@given(value=SHARES, low=SHARES, high=SHARES)
@settings(max_examples=40, deadline=None)
def test_colours_stay_on_their_scale(value: float, low: float, high: float) -> None:
    assert 0 <= float(heat(value, low, high).removeprefix("--t:")) <= 1


def test_elements_escape_everything_but_markup() -> None:
    assert tag("text", "<b>", tag("title", '"&'), x=1.005, font_size=12.0, class_='a"b', hidden=None) == (
        '<text x="1" font-size="12" class="a&#34;b">&lt;b&gt;<title>&#34;&amp;</title></text>'
    )


def test_the_scale_of_the_heat_map_starts_at_the_smallest_similarity_below_0(runs: Runs) -> None:
    import dataclasses

    from modelglue.report.read import read_run

    found = read_run(runs.folder("plain")).similarity
    assert found is not None
    assert lowest(found) == 0.0
    matrix = found.matrix.copy()
    matrix[0, 1] = matrix[1, 0] = -0.25
    assert lowest(dataclasses.replace(found, matrix=matrix)) == -0.25


def families(inside: list[float], across: float | None, singles: int = 0) -> dict[str, Any]:
    found = [{"weakest_pair": {"similarity": value}} for value in inside] + [{"weakest_pair": None}] * singles
    return {"families": found, "strongest_across": None if across is None else {"similarity": across}}


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (families([0.98, 0.96], 0.7), "2 families. Any threshold from 0.7000 to 0.9600 gives the same."),
        (families([0.98], None), "All models are one family. Any threshold below 0.9800 gives the same."),
        (families([], 0.7, singles=3), "No two models are similar enough: 3 families of one. Any threshold from 0.7000 up gives the same."),
        (families([], None, singles=2), "No two models are similar enough: 2 families of one."),
        (families([0.96], 0.97, singles=1),
         "2 families. The strongest pair across families (0.9700) is no less similar than the weakest pair inside one (0.9600): "
         "the threshold alone does not make the families."),
    ],
)  # fmt: skip
def test_families_say_how_much_they_hang_on_the_threshold(found: dict[str, Any], wanted: str) -> None:
    assert findings.families(found) == wanted


@pytest.mark.parametrize(
    ("kind", "headline"),
    [
        ("plain", "The mixture of 3 experts beats the best single model by"),
        ("one-family", "The merge of 5 models beats the best single model by"),
        ("no-test", "The mixture of 3 experts beats the best single model by"),
        ("bad-merges", "The mixture of 3 experts beats the best single model by"),
        ("bad-mixture", "The merge of"),
    ],
)
def test_findings_count_what_the_intervals_say(runs: Runs, kind: str, headline: str) -> None:
    page, results, outcome = runs.page(kind), runs.json(kind, "results"), runs.json(kind, "decisions")["outcome"]
    assert page.one("h1").text.startswith(headline)
    others = [row for row in results["models"] if row["name"] != outcome["name"]]
    judged = [verdict(row["result_minus"][1:]) for row in others]
    undecided = [row["name"] for row, one in zip(others, judged, strict=True) if one == "undecided"]
    wanted = f"better than every one of the {len(others)} others"
    if undecided:
        wanted = f"better than {judged.count('better')} of the {len(others)} others and not to be told apart from {text.listed(undecided)}"
    singles = [row for row in results["models"] if row["kind"] == "single"]
    best = [max((row["tasks"][skill] for row in singles), key=lambda task: task["score"]) for skill in results["skills"]]
    against = [verdict(task["result_minus"][1:]) for task in best]
    stand = ", ".join(f"{one} on {against.count(one)}" for one in ("better", "undecided", "worse"))
    assert page.by_id("results").one("p", "finding").text == (
        f"Over all skills the result is {wanted}. Against the best single model of each skill it is {stand}."
    )


def row(name: str, low: float, high: float, kind: str = "single") -> dict[str, Any]:
    found = [(low + high) / 2, low, high]
    return {"name": name, "kind": kind, "result_minus": found, "tasks": {"one": {"score": 0.5, "result_minus": found}}}


def test_a_result_that_loses_says_to_whom() -> None:
    rows = [row("mixture", 0, 0, "mixture"), row("a", -0.2, -0.1), row("b", -0.1, 0.1), row("c", -0.1, 0.1), row("d", 0.1, 0.2)]
    rows += [row(name, -0.1, 0.1) for name in "ef"]
    found = {"models": rows, "skills": ["one"]}
    assert findings.results(found, {"kind": "mixture", "name": "mixture"}) == (
        "Over all skills the result is better than 1 of the 6 others, not to be told apart from 4 and worse than a. "
        "Against the best single model of each skill it is better on 0, undecided on 0, worse on 1."
    )
    found = {"models": rows[:2], "skills": ["one"]}
    assert findings.results(found, {"kind": "mixture", "name": "mixture"}).startswith("Over all skills the result is worse than a. Against")


def test_merging_that_did_not_help_says_so(runs: Runs) -> None:
    assert runs.page("bad-merges").by_id("merging").one("p", "finding").text == (
        "No merge was better than the best member, in 2 families with several members."
    )
    assert "no merge was better" in runs.page("bad-merges").by_id("merging").all("div", "headed")[0].text
    assert runs.page("plain").by_id("merging").one("p", "finding").text == (
        "2 of 2 families with several members got a merge; the gain over the best member is above 0 for 2 of them, "
        "on items that the search looked at."
    )


STYLE = (Path(modelglue.report.__file__).parent / "templates" / "page.css").read_text()
Colour = tuple[float, float, float]


def palette(scheme: str) -> dict[str, Colour]:
    """Linear red, green and blue of every colour of the style sheet."""
    start = STYLE.index(":root", 1) if scheme == "dark" else 0
    block = STYLE[start : STYLE.index("}", start)]
    found = re.findall(r"--([a-z-]+): #([0-9a-f]{6});", block)
    return {name: tuple(_linear(int(code[i : i + 2], 16) / 255) for i in (0, 2, 4)) for name, code in found}  # type: ignore[misc]


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def contrast(a: Colour, b: Colour) -> float:
    """Contrast ratio of WCAG 2."""
    bright, dark = sorted((0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2] for c in (a, b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_ground(scheme: str) -> None:
    colours = palette(scheme)
    for ink in ("ink", "soft", "accent", "good", "bad"):
        for ground in ("page", "panel"):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for ground in colours:
        if ground.endswith(("-low", "-high", "-fill")):
            assert contrast(colours["ink"], colours[ground]) >= 4.5, ground


#: what is left of a colour without the red or the green receptors (Machado, Oliveira and Fernandes 2009, severity 1)
BLIND = {
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
}


def seen(colour: Colour, blindness: str) -> tuple[float, float, float]:
    """The colour in CIE Lab as a colour-blind eye has it."""
    red, green, blue = (max(0.0, sum(a * b for a, b in zip(row, colour, strict=True))) for row in BLIND[blindness])
    x = (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505
    y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    z = (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089
    fx, fy, fz = (value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("blindness", BLIND)
@pytest.mark.parametrize("pair", [("good", "bad"), ("better-high", "worse-high")])
def test_better_and_worse_differ_for_the_colour_blind(scheme: str, blindness: str, pair: tuple[str, str]) -> None:
    colours = palette(scheme)
    distance = math.dist(*(seen(colours[name], blindness) for name in pair))
    assert distance > 20, distance
