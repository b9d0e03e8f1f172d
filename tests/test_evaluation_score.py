"""Tables of scores: what joins them, what is left out, and what they refuse."""

import csv
import json

import evaluations
import pyarrow.parquet as pq
import pytest
from evaluations import BRIGHT, configured, refused
from pipelines import SIDE

from evaluate import compare
from evaluation.score import score

assets, own_judge, drawn, out = evaluations.assets, evaluations.own_judge, evaluations.drawn, evaluations.out


def test_scores_of_a_judge_that_was_added_join_the_others(assets, out):
    (assets / "judges_of_the_test_2.py").write_text(
        "def width(images, prompts):\n    return [i.width for i in images]\n"
    )
    config = configured(assets, out, "--scorers", f"[{BRIGHT}, judges_of_the_test_2:width]")
    before = pq.read_table(out / "scores.parquet").to_pylist()
    score(config)
    table = pq.read_table(out / "scores.parquet")
    rows = table.to_pylist()
    assert len(rows) == 24 and [r for r in rows if r["scorer"] == BRIGHT] == before
    assert {r["score"] for r in rows if r["scorer"] != BRIGHT} == {SIDE}
    assert table.schema.names[-2:] == ["scorer", "score"]
    compare(config)
    with open(out / "results.csv", newline="") as file:
        results = {r["judge"]: r for r in csv.DictReader(file)}
    assert results["judges_of_the_test_2:width"]["win_rate"] == "0.5"  # nothing but ties


def test_a_judge_may_leave_images_without_a_score(assets, out, capsys):
    config = configured(assets, out, "--scorers", "judges_of_the_test:shy")
    score(config)
    compare(config)
    with open(out / "results.csv", newline="") as file:
        (result,) = csv.DictReader(file)
    assert (result["prompts"], result["left_out"]) == ("4", "2")
    assert "4 (2 without scores)" in capsys.readouterr().out
    assert '"scores": [[null, null]]' in (out / "report.html").read_text(encoding="utf-8")


def test_an_unreadable_image_is_named(assets, out):
    (out / "scores.parquet").unlink()
    file = next((out / "images" / "base").glob("*.png"))
    file.write_bytes(file.read_bytes()[:200])
    said = refused(score, assets, out)
    assert f"images/base/{file.name} is no readable image" in said


def test_scores_of_another_origin_are_refused(assets, out, monkeypatch):
    table = pq.read_table(out / "scores.parquet")
    noted = json.loads(table.schema.metadata[b"noted"])
    noted["protocol"]["resolution"] = 64
    pq.write_table(table.replace_schema_metadata({"noted": json.dumps(noted)}), out / "scores.parquet")
    assert "the scores are of another protocol (resolution)" in refused(compare, assets, out)
    noted["protocol"]["resolution"] = SIDE
    noted["scorers"][BRIGHT] = "elsewhere"
    pq.write_table(table.replace_schema_metadata({"noted": json.dumps(noted)}), out / "scores.parquet")
    assert f"scores of '{BRIGHT}' are by elsewhere, the config says {BRIGHT}" in refused(compare, assets, out)
    pq.write_table(table.replace_schema_metadata({}), out / "scores.parquet")
    assert "not written by evaluate.py score" in refused(compare, assets, out)
    (out / "scores.parquet").write_bytes(b"PAR1")
    assert "not a readable parquet file" in refused(compare, assets, out)
    (out / "protocol.json").write_text("{")
    assert "protocol.json: not readable" in refused(compare, assets, out)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "scorer 'nonsense' is unknown; expected one of: pickscore, hpsv2, hpsv2.1"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("judges_of_the_test:missing", "has no function 'missing'"),
        ("judges_of_the_test:wrong", "gave (1,) scores for 4 images"),
        ("oracle_appeal", "judges the embedded world only: not a prompt of the embedded world"),
        ("vqascore", "scorer 'vqascore' needs an entry in endpoints: vqascore=MODEL@URL"),
        ("hpsv2", "scorer 'hpsv2': hpsv2_checkpoints: no such file or folder: /no/such"),
    ],
)
def test_a_scorer_that_cannot_judge_is_refused(assets, out, name, message):
    assert message in refused(score, assets, out, "--scorers", name, "--hpsv2_checkpoints", "/no/such")
