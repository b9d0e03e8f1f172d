"""The study: plans, statistics over seeds and prompts, and a whole plan at toy size."""

import csv

import numpy as np
import pytest
from support import ROOT, python

from ncp.common.errors import UserError
from study.plan import read_plan
from study.report import arms_table, as_markdown, gain_at, pairs_table, read_results
from study.statistics import at_time, hierarchical_interval, verdict, win_indicator

PLAN = """about: a toy
seeds: [5]
steps: [1, 2]
max_prompts: 2
data: {rule: no_ties}
common: {train_batch_size: 2, gradient_accumulation_steps: 1, effective_batch_size: 2, lr_warmup_steps: 1}
arms:
  ncp: {config: configs/tiny_ncp_dpo.yaml, learning_rate: 1.0e-3, heldout_steps: 1}
  sft: {config: configs/tiny_ncp_sft.yaml, steps: [2], heldout_pairs: 0}
"""


def test_an_interval_covers_seeds_and_prompts():
    """Effects of seeds (0.5) and of prompts (1): the mean of 5 x 40 has variance 0.25 / 5 + 1 / 40 = 0.075."""
    rng = np.random.default_rng(1)
    hits, widths = 0, []
    for trial in range(60):
        values = rng.normal(0, 0.5, (5, 1)) + rng.normal(0, 1, (1, 40)) + rng.normal(0, 0.3, (5, 40))
        low, high = hierarchical_interval(values, seed=trial)
        hits += low < 0 < high
        widths.append(high - low)
    assert 48 <= hits <= 60  # 95% nominally; five seeds make a percentile interval somewhat short
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.075**0.5, rel=0.25)
    only_prompts = hierarchical_interval(np.repeat(rng.normal(0, 1, (1, 40)), 5, axis=0))
    assert only_prompts[1] - only_prompts[0] == pytest.approx(2 * 1.96 / 40**0.5, rel=0.3)


def test_wins_times_and_verdicts():
    assert win_indicator(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 1.0])).tolist() == [1, 0.5, 0]
    seconds, values = np.array([0.0, 10.0, 30.0]), np.array([[0.0], [1.0], [5.0]])
    assert [at_time(seconds, values, t).item() for t in (0, 5, 10, 20, 30, 99)] == [0, 0.5, 1, 3, 5, 5]
    assert [verdict(0.6, 0.7, 0.5), verdict(0.3, 0.4, 0.5), verdict(0.4, 0.6, 0.5)] == [
        "holds",
        "does not hold",
        "cannot be told",
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"about": "abuot"}, "unknown key 'abuot'"),
        ({"seeds: [5]": "seeds: []"}, "'seeds' is missing or empty"),
        ({"max_prompts: 2": "prompts: all"}, "prompts is 'all'; expected heldout or search"),
        ({"configs/tiny_ncp_dpo.yaml": "configs/none.yaml"}, "arm 'ncp' needs config"),
    ],
)
def test_a_wrong_plan_is_refused_in_a_line(tmp_path, change, message):
    text = PLAN
    for old, new in change.items():
        text = text.replace(old, new)
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_plan(tmp_path / "plan.yaml")


def test_a_plan_is_carried_out_by_the_real_programs_and_goes_on(tmp_path):
    """Two arms, one seed, two pairs a step; twice, the second time without training anything again."""
    (tmp_path / "toy.yaml").write_text(PLAN)
    out = tmp_path / "out"
    arguments = ("-m", "study.run", tmp_path / "toy.yaml", "--output_dir", out, "--results", out / "results")
    first = python(*arguments, timeout=900)
    assert first.returncode == 0, first.stderr
    table = out / "results" / "toy.csv"
    content = table.read_text()
    rows = list(csv.DictReader(content.splitlines()))
    named = {(r["arm"], r["seed"], r["step"]) for r in rows}
    assert named == {("base", "", "0"), ("ncp", "5", "1"), ("ncp", "5", "2"), ("sft", "5", "2")}
    assert len(rows) == 3 * len(named) and all(float(r["seconds"]) > 0 for r in rows if r["arm"] != "base")
    assert all(r["heldout_winner_drift"] for r in rows if r["arm"] == "ncp")

    logs = {f: f.stat().st_mtime_ns for f in (out / "toy" / "logs").iterdir()}
    again = python(*arguments, timeout=900)
    assert again.returncode == 0 and table.read_text() == content
    assert {f: f.stat().st_mtime_ns for f in (out / "toy" / "logs").iterdir()} == logs

    base, arms = read_results(table, "overall")
    assert arms["ncp"].scores.shape == (1, 2, 2) and arms["sft"].steps.tolist() == [2]
    assert np.allclose(gain_at(base, arms["ncp"], 1e9), arms["ncp"].scores[:, -1] - base)
    assert "| ncp | sft |" in as_markdown(pairs_table(base, arms, [("ncp", "sft")]))


def test_results_of_another_place_are_missed_in_a_line(tmp_path):
    with pytest.raises(UserError, match="run python -m study"):
        read_results(tmp_path / "none.csv", "overall")


@pytest.mark.parametrize("judge", ["overall", "appeal"])
def test_the_documented_verdict_follows_from_the_results(judge):
    """docs/replication.md shows what study/results/dpo.csv gives, to the digit."""
    base, arms = read_results(ROOT / "study/results/dpo.csv", judge)
    page = (ROOT / "docs/replication.md").read_text(encoding="utf-8")
    assert as_markdown(arms_table(base, arms)) in page
    assert as_markdown(pairs_table(base, arms, [("ncp_dpo", "dpo")])) in page
