"""The page of a run: well-formed, whole, true to the run, and safe to open."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from reports.fake_run import FAMILIES, HOSTILE, SKILL, FakeTrain, make, pipeline
from reports.page_reader import Element, read_page, table

from treadle.cli.app import build
from treadle.core.errors import FileFormatError, TreadleError
from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Step, Workspace
from treadle.core.results import Reasoned, ReasoningMetrics, accuracy
from treadle.reports.folder import read_run
from treadle.reports.report import DATA, PAGE, Report, write_report

pytest.importorskip("matplotlib")
STAGES = tuple(SKILL)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run: Path) -> Element:
    return read_page((run / "report" / PAGE).read_text())


def manifest(run: Path, step: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / step / "manifest.json").read_text())
    return found


SECONDS = {"s": 1, "min": 60}
JOULES = {"Wh": 3600, "kWh": 3.6e6}
BYTES = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def to_base(shown: str) -> float:
    """`1.5 min` -> 90.0: in seconds, joules or bytes."""
    value, unit = shown.split()
    return float(value.replace(",", "")) * (SECONDS | JOULES | BYTES)[unit]


# The page


def test_every_figure_is_on_the_page(run: Path, page: Element) -> None:
    """Each stage's row has what its evaluation recorded, in order, and nothing else."""
    results, costs, *_ = page.all("table", **{"class": "stack"})
    rows = table(results)
    assert list(rows) == ["5-gram baseline", *STAGES]
    for stage in STAGES:
        recorded = manifest(run, f"evaluate-{stage}")["metrics"]["results"]
        expected = []
        for name in ("overall", *FAMILIES):
            f = recorded[name]
            low, high = 100 * f["low"], 100 * f["high"]
            expected.append(f"{100 * f['value']:.1f}% {low:.1f}–{high:.1f}%")
        p = recorded["wikitext-2"]
        expected.append(f"{p['value']:.2f} {p['low']:.2f}–{p['high']:.2f}")
        assert rows[stage] == expected
    assert rows["5-gram baseline"] == ["–", "–", "–", "–", "143.2"]

    rows = table(costs)
    for stage in STAGES:
        speed, size, _, parameters, time, energy, memory = rows[stage]
        assert speed == "412"
        assert size == ("85 MB" if stage == "quantised" else "269 MB")
        trained = "4.9 M" if stage in ("sft", "grpo") else "–"
        assert parameters == f"{trained} / 134.5 M"
        if stage == "base":
            assert (time, energy, memory) == ("–", "–", "–")
        else:
            cost = manifest(run, "export" if stage == "quantised" else stage)["cost"]
            watts, unit, *kind = energy.split()
            assert " ".join(kind) == cost["energy"]
            assert to_base(time) == pytest.approx(cost["seconds"], rel=0.005)
            assert to_base(f"{watts} {unit}") == pytest.approx(cost["joules"], rel=0.005)
            assert to_base(memory) == pytest.approx(cost["peak_bytes"], rel=0.005)


def test_the_result_is_told_in_words(run: Path, page: Element) -> None:
    said = page.all("p", **{"class": "lead"})[0].text
    base = manifest(run, "evaluate-base")["metrics"]["results"]["overall"]
    final = manifest(run, "evaluate-quantised")["metrics"]["results"]["overall"]
    for figure in (base, final):
        value, low, high = (100 * figure[name] for name in ("value", "low", "high"))
        assert f"{value:.1f}% (95% interval {low:.1f} to {high:.1f}%)" in said
    assert "The final model (quantised)" in said
    before, after = (
        {(r := json.loads(line))["problem"]: r["score"] for line in path.read_text().splitlines()}
        for path in (run / f"evaluate-{s}" / "samples.jsonl" for s in ("base", "quantised"))
    )
    fixed = sum(after[p] > before[p] for p in before)
    broken = sum(after[p] < before[p] for p in before)
    assert f"{fixed} turned from wrong to right and {broken} from right to wrong" in said
    assert "Perplexity of wikitext-2 is 26.40, against 143.2 (5-gram) and 24.31 before." in said


def test_curves_answers_recipe_and_record_are_there(run: Path, page: Element) -> None:
    titles = [c.text.split(" last")[0] for c in page.all("figcaption")]
    for title in ("Loss", "Learning rate", "Gradient norm"):
        assert titles.count(title) == 2
    for title in ("Reward", "KL to the reference", "Sampler mismatch", "Completion length"):
        assert titles.count(title) == 1
    for sample in page.all("article"):
        marks = [s.text for s in sample.all("span", **{"class": "mark"})]
        assert len(marks) == 2
        for side, mark in zip(sample.all("div", **{"class": "answer"}), marks, strict=True):
            right = sample.all("code")[0].text in side.all("pre")[0].text.rsplit("<", 2)[1]
            assert ("right" in mark) == right
    assert (run / "pipeline.yaml").read_text() == page.all("pre", **{"class": "code"})[0].text
    everything = page.text
    for step in ("sft", "grpo", "export", "evaluate-base"):
        for name, entry in manifest(run, step)["files"].items():
            assert f"{step}/{name}" in everything
            assert entry["sha256"] in everything
    assert manifest(run, "sft")["machine"]["processor"] in everything
    assert "sft.seed 7" in everything
    assert "treadle run pipeline.yaml" in everything


def test_the_page_needs_nothing_else(run: Path, page: Element) -> None:
    text = (run / "report" / PAGE).read_text()
    assert len(text.encode()) < 400_000
    elements = page.everything()
    assert not {e.tag for e in elements} & {"script", "link", "img", "iframe", "object", "base"}
    for element in elements:
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href"):
                assert value.startswith("#")
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\"' <)]+", text)) <= {"http://www.w3.org/2000/svg"}
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0].attributes["content"]
    assert policy.startswith("default-src 'none';")


def test_ids_are_unique_and_resolve(page: Element) -> None:
    ids = [e.attributes["id"] for e in page.everything() if "id" in e.attributes]
    assert len(ids) == len(set(ids)) > 10
    used = re.findall(r"#([\w-]+)", " ".join(str(e.attributes) for e in page.everything()))
    assert set(used) == set(ids)


def test_the_same_figures_are_in_json(run: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (run / "report" / DATA).read_text()
    data = json.loads(text, parse_constant=refuse)
    assert data["format"] == "treadle-report-1"
    assert [s["subject"] for s in data["stages"]] == ["5-gram", *STAGES]
    for stage in data["stages"][1:]:
        recorded = manifest(run, f"evaluate-{stage['subject']}")["metrics"]["results"]
        assert stage["results"] == recorded


def test_writing_again_changes_nothing(run: Path, tmp_path: Path) -> None:
    write_report(run, tmp_path)
    for name in (PAGE, DATA):
        assert (tmp_path / name).read_bytes() == (run / "report" / name).read_bytes()


# Hostile and broken input


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    page = read_page((make(tmp_path, hostile=True) / "report" / PAGE).read_text())
    assert not {"script", "img"} & {e.tag for e in page.everything()}
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    answers = [a.text for s in page.all("div", **{"class": "answer"}) for a in s.all("pre")]
    assert shown in answers
    json.loads((tmp_path / "report" / DATA).read_text())


def test_names_of_metrics_are_only_text(tmp_path: Path) -> None:
    execute(Pipeline(name="names", steps=(FakeTrain(name="sft"),)), tmp_path)
    names = ("<b>loss</b>", "$x_{", 'a"b', "#010203", "a&amp;b")
    rows = "".join(json.dumps({"step": i, **dict.fromkeys(names, 1.5)}) + "\n" for i in (1, 2))
    (tmp_path / "sft" / "metrics.jsonl").write_text(f"{rows}not json\n[]\n")
    page = read_page(write_report(tmp_path, tmp_path / "out").read_text())
    captions = [c.text for c in page.all("figcaption")]
    assert captions == [f"{name.replace('_', ' ')} last 1.5" for name in names]
    assert not any(c.all("b") for c in page.all("figcaption"))
    labels = [s.attributes["aria-label"] for s in page.all("svg")]
    assert labels == [f"{name} over 2 steps, from 1.5 to 1.5" for name in names]


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        execute(pipeline(fails=True), tmp_path)
    page = read_page(write_report(tmp_path, tmp_path / "out").read_text())
    said = page.all("p", **{"class": "lead"})[0].text
    assert "grpo was interrupted; evaluate-grpo has not run; export has not run" in said
    assert "The last model so far (sft)" in said
    assert list(table(page.all("table", **{"class": "stack"})[0])) == [
        "5-gram baseline",
        "base",
        "sft",
    ]
    assert "grpo was interrupted" in " ".join(h.text for h in page.all("h3"))
    assert "Reward" in page.text  # its curve so far
    steps = table(page.all("table", **{"class": "stack"})[2])
    assert steps["grpo"][1] == "interrupted"
    assert steps["export"][1:] == ["not run", "–", "–", "–", "–"]


def test_a_run_that_just_began(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        execute(
            Pipeline(name="one", steps=(pipeline(fails=True).steps[4].replace(model=None),)),
            tmp_path,
        )
    (tmp_path / "grpo" / "metrics.jsonl").unlink()
    page = read_page(write_report(tmp_path, tmp_path / "out").read_text())
    assert "Nothing of one has been measured yet." in page.text
    assert "No evaluation has finished" in page.text


def test_figures_of_another_configuration_are_left_out(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    source = tmp_path / "run" / "pipeline.yaml"
    source.write_text(source.read_text().replace("seed: 3", "seed: 4"))
    states = {s.name: s.state for s in read_run(tmp_path / "run").steps}
    stale = {"grpo", "evaluate-grpo", "export", "evaluate-quantised", "report"}
    assert {name for name, state in states.items() if state == "outdated"} == stale
    page = read_page(write_report(tmp_path / "run", tmp_path / "out").read_text())
    assert list(table(page.all("table", **{"class": "stack"})[0]))[-1] == "sft"


def test_the_report_is_made_again_when_a_step_changes(tmp_path: Path) -> None:
    steps = pipeline().steps
    short = (steps[0], steps[1], steps[-1])
    execute(Pipeline(name="short", steps=short), tmp_path)
    first = manifest(tmp_path, "report")["key"]
    execute(Pipeline(name="short", steps=short), tmp_path)
    assert manifest(tmp_path, "report")["key"] == first
    changed = (steps[0], steps[1].replace(problems=20), steps[-1])
    execute(Pipeline(name="short", steps=changed), tmp_path)
    assert manifest(tmp_path, "report")["key"] != first
    assert "60 problems" in (tmp_path / "report" / PAGE).read_text()


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(TreadleError, match=r"not the folder of a run: it has no pipeline\.yaml"):
        write_report(tmp_path, tmp_path)
    (tmp_path / "pipeline.yaml").write_text("name: x\nsteps: [1]\n")
    with pytest.raises(FileFormatError, match="not a pipeline"):
        write_report(tmp_path, tmp_path)


def test_the_command(run: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    result = CliRunner().invoke(build(), ["report", str(run), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(tmp_path / PAGE)
    read_page((tmp_path / PAGE).read_text())


# In a browser

PROBE = """<!doctype html><body style="margin:0"><iframe id="f" style="width:{width}px;height:900px;
border:0" sandbox="allow-same-origin" srcdoc="{page}"></iframe><script>
const f = document.getElementById("f");
f.onload = () => {{
  const d = f.contentDocument, wide = d.documentElement.scrollWidth, svg = d.querySelector("svg");
  document.title = JSON.stringify({{
    wide, svg: svg.getBoundingClientRect().width, text: d.body.innerText.length,
    font: parseFloat(f.contentWindow.getComputedStyle(svg.querySelector("text")).fontSize)
      * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width}});
}};
</script>"""


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_it_fits_a_phone_and_a_screen(run: Path, tmp_path: Path, width: int) -> None:
    """Nothing sticks out sideways, and the letters in the plots stay readable."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium")
    text = (run / "report" / PAGE).read_text().replace("&", "&amp;").replace('"', "&quot;")
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(width=width, page=text))
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync"
    )
    result = subprocess.run(
        [
            browser,
            *flags.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    match = re.search(r"<title>(\{.*?\})</title>", result.stdout)
    assert match, result.stderr[-2000:]
    seen = json.loads(match[1])
    assert seen["wide"] <= width
    assert seen["svg"] > 250
    assert seen["font"] >= 10
    assert seen["text"] > 2000


class FakeReason(Step):
    """Records two ways to answer."""

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        rows = [
            Reasoned(
                strategy=name,
                exam="gcd",
                accuracy=accuracy([1.0] * right + [0.0] * (40 - right)),
                tokens=tokens,
                seconds=90.0,
                overflows=0,
            )
            for name, right, tokens in (("BestOfN n=4", 22, 1320.4), ("OneAnswer", 12, 330.0))
        ]
        return ReasoningMetrics(kind="reasoning", rows=rows)


def test_ways_to_answer_are_laid_side_by_side(tmp_path: Path) -> None:
    """The cheapest first; in words the best and the cheapest."""
    execute(Pipeline(name="ways", steps=(FakeReason(name="reason"), Report())), tmp_path)
    page = read_page((tmp_path / "report" / PAGE).read_text())
    (found,) = (t for t in page.all("table") if "Exam" in t.text)
    assert list(table(found).items()) == [
        ("OneAnswer", ["gcd", "30.0% 18.1\u201345.4%", "330", "90 s"]),
        ("BestOfN n=4", ["gcd", "55.0% 39.8\u201369.3%", "1,320", "90 s"]),
    ]
    lead = " ".join(page.all("p", **{"class": "lead"})[0].text.split())
    best, least = "95% interval 39.8 to 69.3%", "95% interval 18.1 to 45.4%"
    assert (
        f"In reason, gcd: BestOfN n=4 is right on 55.0% ({best}) for 1,320 tokens a problem, "
        f"OneAnswer is right on 30.0% ({least}) for 330 tokens a problem."
    ) in lead
