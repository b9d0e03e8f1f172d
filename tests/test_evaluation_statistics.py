"""Win-rates that were known beforehand, intervals that cover as often as they say, agreement worked by hand."""

import importlib
import itertools
import math

import numpy as np
import pytest

from evaluation.compare import Scores, compare_all, compare_pair, curves
from evaluation.statistics import (
    bootstrap_interval,
    fleiss_kappa,
    majority,
    prompt_wins,
    sign_test,
    win_rate_interval,
)


def pair(a, b, resamples=2000):
    return compare_pair("judge", "a", "b", "", np.array(a, float), np.array(b, float), resamples)


def test_wins_count_ties_half_and_average_over_samples():
    a = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    b = np.array([[2.0, 2.0], [2.0, 0.0], [1.0, 0.0]])
    assert prompt_wins(a, b).tolist() == [1.0, 0.5, 0.25]  # two wins; one of each; a tie and a loss


def test_a_missing_score_leaves_its_sample_out():
    nan = math.nan
    a = np.array([[1.0, nan], [nan, 1.0], [1.0, 1.0]])
    b = np.array([[2.0, 2.0], [2.0, nan], [0.0, nan]])
    wins = prompt_wins(a, b)
    assert wins[0] == 1.0 and math.isnan(wins[1]) and wins[2] == 0.0
    result = pair(a, b)
    assert (result.prompts, result.left_out, result.wins, result.losses) == (2, 1, 1, 1)
    assert (result.reference_mean, result.model_mean) == (1.0, 1.0)  # of the samples that count: 1, 1 and 2, 0
    nothing = pair([[nan]], [[1.0]])
    assert nothing.prompts == 0 and math.isnan(nothing.win_rate) and math.isnan(nothing.low)


def test_identical_models_give_half_exactly():
    same = np.random.default_rng(0).normal(size=(50, 3))
    result = pair(same, same)
    assert (result.win_rate, result.low, result.high, result.p_value) == (0.5, 0.5, 0.5, 1.0)
    assert (result.wins, result.ties, result.losses) == (0, 50, 0)


def test_a_known_win_rate_is_recovered():
    # Scores N(0, 1) and N(0.5, 1): P(b > a) = Phi(0.5 / sqrt 2) = 0.6382; means differ by 0.5, medians too.
    rng = np.random.default_rng(0)
    result = pair(rng.normal(0, 1, (4000, 1)), rng.normal(0.5, 1, (4000, 1)), resamples=500)
    assert result.win_rate == pytest.approx(0.6382, abs=0.023)  # three standard errors
    assert result.low < 0.6382 < result.high and result.high - result.low == pytest.approx(3.92 * 0.0076, rel=0.2)
    assert result.model_mean - result.reference_mean == pytest.approx(0.5, abs=0.07)
    assert result.model_median - result.reference_median == pytest.approx(0.5, abs=0.09)
    assert result.p_value < 1e-10


@pytest.mark.parametrize("samples", [1, 4])
def test_intervals_cover_as_often_as_they_say(samples):
    # 150 prompts, each with a win-rate of its own (mean 0.7, between 0.4 and 1): samples of one prompt go together,
    # and an interval that resampled images instead of prompts would be too short for 4 samples.
    rng, covered, experiments = np.random.default_rng(0), 0, 400
    for _ in range(experiments):
        chance = rng.uniform(0.4, 1.0, 150)
        wins = (rng.random((150, samples)) < chance[:, None]).mean(1)
        low, high = bootstrap_interval(wins, resamples=400)
        covered += low <= 0.7 <= high
    assert 0.92 <= covered / experiments <= 0.98  # 0.95 +- 3 standard errors of 0.011


@pytest.mark.parametrize(("prompts", "chance", "least"), [(10, 0.9, 0.97), (20, 0.9, 0.96), (50, 0.97, 0.95)])
def test_intervals_of_few_prompts_near_the_ends_are_long_enough(prompts, chance, least):
    """Percentile intervals cover these win-rates about 66, 88 and 76 times in a hundred, instead of 95."""
    rng, covered, experiments = np.random.default_rng(0), 0, 300
    for _ in range(experiments):
        low, high = win_rate_interval((rng.random(prompts) < chance).astype(float), resamples=400)
        covered += low <= chance <= high
    assert covered / experiments >= least


def test_the_benchmark_of_intervals_shows_both(capsys):
    intervals = importlib.import_module("benchmarks.intervals")
    intervals.main(["--experiments", "30"])
    rows = [line.rsplit(maxsplit=3) for line in capsys.readouterr().out.splitlines()[1:]]
    covered = {(name.strip(), int(prompts)): (float(before), float(now)) for name, prompts, before, now in rows}
    assert len(covered) == 9
    before, now = covered["win-rate 90%", 10]
    assert before < 90 and now > 90


def test_intervals_of_skewed_gains_are_longer_on_the_side_of_the_tail():
    values = np.random.default_rng(0).lognormal(0, 1, 30)
    low, high = bootstrap_interval(values, 4000)
    rng = np.random.default_rng(0)
    means = np.sort(values[rng.integers(30, size=(4000, 30))].mean(1))
    assert low > means[100] and high > means[3900]  # both ends of BCa are to the right of the percentile interval's


def test_the_interval_if_every_prompt_was_won_by_hand():
    # Clopper and Pearson: the chance p at which n of n wins have probability 0.025 is 0.025^(1/n).
    low, high = win_rate_interval(np.ones(20), 100)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 20)), 1.0)
    assert win_rate_interval(np.zeros(20), 100) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert win_rate_interval(np.full(20, 0.5), 100) == (0.5, 0.5)  # nothing but ties: the same model
    assert all(map(math.isnan, win_rate_interval(np.array([]), 100)))
    assert pair([[0.0]] * 20, [[1.0]] * 20).low == low  # as the tables have it


def test_every_small_sample_has_an_interval_around_its_mean():
    for n in range(1, 5):
        for values in itertools.product([0.0, 0.5, 1.0], repeat=n):
            low, high = bootstrap_interval(np.array(values), 100)
            assert low <= np.mean(values) + 1e-12 and np.mean(values) <= high + 1e-12
    assert bootstrap_interval(np.array([3.0, 3.0 + 1e-95]), 100) == (3.0, 3.0)
    low, high = bootstrap_interval(np.array([1e-80, 2e-80, 4e-80]), 100)
    assert 1e-80 <= low < high <= 4e-80


def test_the_interval_is_the_same_every_time_and_knows_other_statistics():
    values = np.random.default_rng(1).normal(size=400)
    assert bootstrap_interval(values, 1500) == bootstrap_interval(values, 1500)
    low, high = bootstrap_interval(values, 1500, statistic=np.median)
    # A sample median's standard error is sqrt(pi / 2 / n) = 0.0627; its interval is about 3.92 of them.
    assert low < np.median(values) < high and high - low == pytest.approx(3.92 * 0.0627, rel=0.35)


def test_sign_test_by_hand():
    assert sign_test(0, 0) == 1.0 and sign_test(5, 5) == 1.0
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(8, 2) == sign_test(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert sign_test(3, 2) == 1.0  # 2 (1 + 5 + 10) / 32
    assert 0 < sign_test(900, 600) < 1e-13  # exact where floats of 2^1500 would overflow


def test_fleiss_kappa_of_the_published_example():
    # Fleiss's design as tabulated in the literature: 14 judges, 10 subjects, 5 answers; kappa 0.210.
    # By hand: P_i = 1.000 .253 .308 .440 .330 .462 .242 .176 .286 .286, mean .378; P_e = .213.
    counts = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    assert fleiss_kappa(np.array(counts)) == pytest.approx(0.210, abs=5e-4)


def test_fleiss_kappa_at_its_ends():
    assert fleiss_kappa(np.array([[3, 0], [0, 3]])) == 1.0
    # Three judges on two items, 2:1 and 1:2: P = 1/3 each, P_e = 1/2, so (1/3 - 1/2) / (1/2) = -1/3.
    assert fleiss_kappa(np.array([[2, 1], [1, 2]])) == pytest.approx(-1 / 3)
    assert fleiss_kappa(np.array([[2, 1], [1, 2], [1, 0], [0, 0]])) == pytest.approx(-1 / 3)  # lone votes say nothing
    assert math.isnan(fleiss_kappa(np.array([[3, 0], [3, 0]])))  # one answer only: chance explains all
    assert math.isnan(fleiss_kappa(np.array([[1, 0]])))


@pytest.mark.parametrize(
    ("votes", "outcome"),
    [
        (["win"] * 3, "win"),
        (["win", "win", "loss"], "win"),
        (["loss", "tie", "loss"], "loss"),
        (["tie", "tie", "win"], "tie"),
        (["win", "loss", "tie"], "tie"),
        (["win", "loss"], "tie"),
        (["win", "win", "loss", "tie"], "tie"),  # half is not more than half
        (["loss"], "loss"),
    ],
)
def test_majority(votes, outcome):
    assert majority(votes) == outcome


def test_pairs_judges_and_categories():
    table = np.array([[[1.0], [1.0], [1.0]], [[2.0], [2.0], [0.0]], [[3.0], [0.0], [0.0]]])
    scores = Scores(["a", "b", "c"], ["x", "y", "z"], [["red"], ["red"], ["blue"]], {"one": table, "two": -table})
    results = compare_all(scores, ["a", "b", "c"], resamples=100)
    assert len(results) == 3 * 2 * 3  # pairs, judges, and all or either category
    rates = {(r.judge, r.reference, r.model, r.category): r.win_rate for r in results}
    assert rates["one", "a", "b", ""] == pytest.approx(2 / 3) and rates["two", "a", "b", ""] == pytest.approx(1 / 3)
    assert rates["one", "a", "b", "red"] == 1.0 and rates["one", "a", "b", "blue"] == 0.0
    assert rates["one", "b", "c", ""] == pytest.approx((1 + 0 + 0.5) / 3)


def test_curves_hold_the_paired_gain():
    # Prompts differ by tens, the checkpoint by one: the interval must not see the tens.
    base = np.arange(40.0)[:, None] * 10
    noise = np.random.default_rng(0).normal(0, 0.1, (40, 1))
    scores = Scores(
        ["base", "run@5"], [str(i) for i in range(40)], [[""]] * 40, {"j": np.stack([base, base + 1 + noise])}
    )
    noted = {"base": {"run": None}, "run@5": {"run": "run", "step": 5, "seconds": 2.5}}
    (point,) = curves(scores, noted, resamples=500)
    assert (point.run, point.step, point.seconds) == ("run", 5, 2.5)
    assert point.gain == pytest.approx(1, abs=0.06) and point.low < point.gain < point.high < point.low + 0.1
    assert point.mean == pytest.approx(base.mean() + point.gain)
