"""The study: plans, statistics over seeds and prompts, and a whole plan at toy size."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from support import ROOT, python

import train_ncp_sft
from ncp.common.config import parse
from ncp.common.errors import UserError
from ncp.training.inputs import conditions, latents
from study import perception
from study.page import filled, measured, read_claims
from study.plan import read_plan
from study.report import ArmResults, as_markdown, gain_at, pairs_table, read_results
from study.statistics import at_time, hierarchical_interval, verdict, win_indicator
from tiny.forecast import PAIRS, random_batch

PLAN = """about: a toy
seeds: [5]
steps: [1, 2]
max_prompts: 2
evaluation: {num_inference_steps: 2}
data: {rule: no_ties}
common: {train_batch_size: 2, gradient_accumulation_steps: 1, effective_batch_size: 2, lr_warmup_steps: 1}
arms:
  ncp: {config: configs/tiny_ncp_dpo.yaml, heldout_steps: 1, mixed_precision: bf16, program: study/half_encoder.py}
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

    drawn = json.loads((out / "toy" / "evaluation" / "protocol.json").read_text())["protocol"]
    assert drawn["num_inference_steps"] == 2
    # With f in bf16 too, which the script itself does not do.
    assert "secant auto (derivative over" in (out / "toy" / "logs" / "ncp-5.log").read_text()

    logs = {f: f.stat().st_mtime_ns for f in (out / "toy" / "logs").iterdir()}
    again = python(*arguments, "--jobs", "1", timeout=900)
    assert again.returncode == 0 and table.read_text() == content
    assert {f: f.stat().st_mtime_ns for f in (out / "toy" / "logs").iterdir()} == logs

    base, arms = read_results(table, "overall")
    assert arms["ncp"].scores.shape == (1, 2, 2) and arms["sft"].steps.tolist() == [2]
    assert np.allclose(gain_at(base, arms["ncp"], 1e9), arms["ncp"].scores[:, -1] - base)
    assert "| ncp | sft |" in as_markdown(pairs_table(base, arms, [("ncp", "sft")]))


def test_results_of_another_place_are_missed_in_a_line(tmp_path):
    with pytest.raises(UserError, match="run python -m study"):
        read_results(tmp_path / "none.csv", "overall")


def test_the_documented_verdicts_follow_from_the_results():
    """docs/replication.md is what study.page makes of the results and the claims, to the digit."""
    page = (ROOT / "docs/replication.md").read_text(encoding="utf-8")
    plotted = []
    assert filled(page, read_claims(), plot=lambda *given: plotted.append(given[-1])) == page
    assert plotted and all(path.is_file() for path in plotted)


def results(gains: dict[str, tuple[float, float]], seeds: int = 5, prompts: int = 40):
    """Results of arms whose scores after 10 and 20 s are a gain above the base's, with a little noise."""
    rng = np.random.default_rng(2)
    base = rng.uniform(0.4, 0.6, prompts)
    arms = {}
    for name, points in gains.items():
        scores = np.stack([base + gain + rng.normal(0, 0.01, (seeds, prompts)) for gain in points], axis=1)
        times = np.tile([10.0, 20.0], (seeds, 1))
        arms[name] = ArmResults(
            scores, np.array([1, 2]), times, np.full(seeds, points[-1]) + rng.normal(0, 0.01, seeds)
        )
    return base, arms


def test_a_claim_is_a_weighted_sum_of_gains():
    base, arms = results({"a": (0.1, 0.2), "b": (0.1, 0.1), "c": (0.1, 0.1)})

    def claim(contrast, **more):
        return measured({"claim": "x", "plan": "p", "contrast": contrast, **more}, base, arms)

    result, conclusion = claim({"a": 1, "b": -1})
    assert conclusion == "holds" and re.match(r"gain \+0\.(09|10)\d \[.*\] at equal steps; win-rate 100%", result)
    assert claim({"b": 1, "a": -1})[1] == "does not hold"
    assert claim({"b": 1, "c": -1})[1] == "cannot be told"
    # Interaction: (a - b) - (b - c) = 0.1.
    assert re.match(r"gain \+0\.(09|10)\d \[.*\] at equal steps$", claim({"a": 1, "b": -2, "c": 1})[0])
    # b and c end at 20 s, so there is no earlier time at which a has less.
    assert claim({"a": 1, "b": -1}, at="time") == (claim({"a": 1, "b": -1}, at="time")[0], "holds")
    arms["b"].seconds[:] = [[5.0, 10.0]]
    assert claim({"a": 1, "b": -1}, at="time")[1] == "cannot be told"  # 0.1 of both at 10 s
    assert claim({"a": 1, "b": -1}, of="drift")[1] == "holds"
    with pytest.raises(UserError, match="no arm d in the results of p"):
        claim({"a": 1, "d": -1})


@pytest.mark.parametrize(
    "text, message",
    [
        ("claims: [{claim: x, paln: y}]", "unknown key 'paln'"),
        ("claims: [{claim: x, plan: y}]", "'x' needs plan and contrast, or result, verdict and command"),
    ],
)
def test_a_wrong_claim_is_refused_in_a_line(tmp_path, text, message):
    (tmp_path / "claims.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_claims(tmp_path / "claims.yaml")


@pytest.mark.parametrize("space", ["perceptual", "latent"])
def test_losses_of_the_base_model_are_those_of_training(space):
    """study.perception measures what train_ncp_sft.py minimises: the loss of several blocks is the mean of theirs."""
    models = perception.load()
    argv = ["--config", "configs/tiny_ncp_sft.yaml", "--space", space, "--loss_weight", "1"]
    config = parse(train_ncp_sft.Config, argv)
    batch = random_batch(models, config)
    rows = {k: v[:PAIRS] for k, v in batch.items()} | {"timestep": torch.full((PAIRS,), 37)}
    with torch.no_grad():
        loss, _ = train_ncp_sft.ncp_sft(models, models.unet, rows, config)
        x0, text = latents(models, rows), conditions(models, rows)["encoder_hidden_states"]
        found = perception.one_step(models, x0, rows["eps"], rows["z"], text, 37)["losses"]
    wanted = (
        found["latent"] if space == "latent" else torch.stack([found[f"block {b}"] for b in perception.BLOCKS]).mean(0)
    )
    assert torch.allclose(wanted, loss, rtol=1e-4)
