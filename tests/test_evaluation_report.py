"""What compare leaves: tables, plots, and the page, in a real browser."""

import csv
import json
import re
import shutil

import evaluations
import numpy as np
import pyarrow.parquet as pq
import pytest
from evaluations import PROMPTS, arguments, configured
from PIL import Image

import evaluate
from evaluate import compare
from evaluation.generate import generate
from evaluation.score import score

assets, own_judge, drawn, out = evaluations.assets, evaluations.own_judge, evaluations.drawn, evaluations.out


def test_compare_writes_what_the_scores_say(assets, out, capsys):
    compare(configured(assets, out))
    printed = capsys.readouterr().out
    scores = {(r["model"], r["prompt"]): r["score"] for r in pq.read_table(out / "scores.parquet").to_pylist()}
    wins = np.mean([scores["tuned", p] > scores["base", p] for p in PROMPTS])
    with open(out / "results.csv", newline="") as file:
        (result,) = csv.DictReader(file)
    assert float(result["win_rate"]) == wins and result["prompts"] == "6"
    assert float(result["model_mean"]) == pytest.approx(np.mean([scores["tuned", p] for p in PROMPTS]))
    assert float(result["reference_median"]) == pytest.approx(np.median([scores["base", p] for p in PROMPTS]))
    assert f"{wins:.1%}" in printed and f"{wins:.1%}" in (out / "results.md").read_text()
    assert printed == (out / "summary.txt").read_text() and str(out / "report.html") in printed
    assert Image.open(out / "win_rates.png").width > 300
    assert Image.open(out / "comparison.png").width > 300


def test_the_report_is_one_file_that_escapes_what_prompts_say(assets, out):
    compare(configured(assets, out, "--report_prompts", "4"))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)  # nothing is fetched
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))
    assert len(data["prompts"]) == 4 and data["total"] == 6
    scores = {(r["model"], r["prompt"]): r["score"] for r in pq.read_table(out / "scores.parquet").to_pylist()}
    gains = {p: scores["tuned", p] - scores["base", p] for p in PROMPTS}
    shown = {p["prompt"]: p for p in data["prompts"]}
    assert {max(gains, key=gains.get), min(gains, key=gains.get)} <= shown.keys()  # the extremes are among them
    for prompt, row in shown.items():
        assert row["scores"][0] == pytest.approx([scores["base", prompt], scores["tuned", prompt]], abs=1e-4)
        assert all(i.startswith("data:image/webp;base64,") for i in row["images"])
    compare(configured(assets, out))
    assert "a \\u003cb>bold" in (out / "report.html").read_text(encoding="utf-8")


def test_the_report_sorts_and_filters_in_a_browser(assets, out, browser):
    compare(configured(assets, out))
    scores = {(r["model"], r["prompt"]): r["score"] for r in pq.read_table(out / "scores.parquet").to_pylist()}
    gains = {p: scores["tuned", p] - scores["base", p] for p in PROMPTS}
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or errors.append(request.url))
    page.goto((out / "report.html").as_uri())

    def shown() -> list[str]:
        return page.locator(".prompt").all_inner_texts()

    assert shown() == sorted(PROMPTS, key=gains.get, reverse=True)
    page.select_option("#order", "loss")
    assert shown() == sorted(PROMPTS, key=gains.get)
    assert (
        page.locator(".gain").first.inner_text()
        == f"{min(gains.values()):.{3 if abs(min(gains.values())) < 10 else 2}f}"
    )
    page.select_option("#order", "number")
    assert shown() == PROMPTS
    page.fill("#find", "DOG")
    assert shown() == [p for p in PROMPTS if "dog" in p] and page.inner_text("#count") == "2 shown"
    page.fill("#find", "")
    page.select_option("#order", "win")
    page.select_option("#model", label="base")
    page.select_option("#reference", label="tuned")
    assert shown() == sorted(PROMPTS, key=gains.get)  # the other way round, wins are losses
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert not errors


def test_checkpoints_of_a_run_make_curves(assets, tmp_path, capsys):
    shutil.copytree(assets / "run", tmp_path / "run")
    extra = [
        "--models",
        "base",
        "--runs",
        f"mine={tmp_path / 'run'}",
        "--max_prompts",
        "3",
        "--samples_per_prompt",
        "2",
    ]
    config = configured(assets, tmp_path / "out", *extra)
    for step in (generate, score, compare):
        step(config)
    with open(tmp_path / "out" / "curves.csv", newline="") as file:
        points = list(csv.DictReader(file))
    assert [(p["run"], p["step"], p["seconds"]) for p in points] == [
        ("mine", "5", "7.5"), ("mine", "10", "15.0"), ("mine", "20", "30.0")
    ]  # fmt: skip
    rows = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    mean = {m: np.mean([r["score"] for r in rows if r["model"] == m]) for m in ("base", "mine@10")}
    assert float(points[1]["mean"]) == pytest.approx(mean["mine@10"])
    assert float(points[1]["gain"]) == pytest.approx(mean["mine@10"] - mean["base"])
    assert (tmp_path / "out" / "curves_seconds.png").is_file() and (tmp_path / "out" / "curves_step.png").is_file()

    for manifest in tmp_path.glob("run/*/manifest.json"):  # as an older training script left them
        manifest.write_text('{"step": 1}')
    config = configured(assets, tmp_path / "out-2", *extra)
    for step in (generate, score, compare):
        step(config)
    assert "no curves against seconds" in capsys.readouterr().out
    assert not (tmp_path / "out-2" / "curves_seconds.png").exists()
    assert (tmp_path / "out-2" / "curves_step.png").is_file()


def test_the_judges_votes_join_the_report_and_are_counted_alone(assets, out, tmp_path, capsys):
    """`tuned` won the overall question on each of six pairs."""
    evaluate.main(["annotate", *arguments(assets, out)])
    key = json.loads((out / "annotation" / "key.json").read_text())
    votes = [{"overall": "left" if pair["left"] == "tuned" else "right"} for pair in key["pairs"]]
    files = [tmp_path / "ann.json", tmp_path / "bob.json"]
    for file in files:
        file.write_text(json.dumps({"page": key["page"], "annotator": file.stem, "votes": votes}))
    given = [*arguments(assets, out), "--votes", *map(str, files)]
    capsys.readouterr()
    evaluate.main(["count", *given])
    line = "overall    tuned over base  6      6 / 0 / 0"
    assert line in (counted := capsys.readouterr().out) and "evaluate.py compare" in counted
    assert not (out / "results.md").exists() and not (out / "report.html").exists()
    tables = {name: (out / name).read_bytes() for name in ("votes.csv", "votes.md", "votes.png")}
    evaluate.main(["compare", *given])
    assert line in capsys.readouterr().out and line in (out / "summary.txt").read_text()
    assert (out / "votes.md").read_text() in (out / "results.md").read_text().partition("## Human judges")[2]
    assert '<img class="plot votes"' in (out / "report.html").read_text(encoding="utf-8")
    assert {name: (out / name).read_bytes() for name in tables} == tables
    evaluate.main(["compare", *arguments(assets, out)])
    assert "Human judges" not in (out / "results.md").read_text()
