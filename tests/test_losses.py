"""Each objective against values worked by hand, its gradient's signs, and its behaviour at the ends."""

import math

import pytest
import torch

from ncp.losses import cpo_loss, dpo_loss, latent_distance, mean_square, sft_loss


def tensors(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in values]


def test_dpo_by_hand():
    # logit = -2 ((0.1 - 0.3) - (0.5 - 0.2)) = -2 (-0.2 - 0.3) = 1;  -log sigmoid(1) = log(1 + 1/e) = 0.3132617
    losses, metrics = dpo_loss(*tensors(0.1, 0.5, 0.3, 0.2), beta=2.0)
    assert losses.item() == pytest.approx(0.3132617, abs=1e-6)
    assert metrics["reward_w"].item() == pytest.approx(0.4)  # -2 (0.1 - 0.3)
    assert metrics["reward_l"].item() == pytest.approx(-0.6)  # -2 (0.5 - 0.2)
    assert metrics["margin"].item() == pytest.approx(1.0)
    assert metrics["abs_logit"].item() == pytest.approx(1.0)
    assert metrics["accuracy"].item() == 1
    assert metrics["winner_drift"].item() == pytest.approx(-2 / 3)  # (0.1 - 0.3) / 0.3: winners became likelier


def test_beta_is_the_papers_and_half_of_the_other_convention():
    # Diffusion-DPO's code: -log sigmoid(-0.5 * 5000 * difference).
    policy_w, policy_l, ref_w, ref_l = tensors(1.0e-3, 1.2e-3, 1.1e-3, 1.15e-3)
    difference = (policy_w - ref_w) - (policy_l - ref_l)
    losses, _ = dpo_loss(policy_w, policy_l, ref_w, ref_l, beta=2500)
    torch.testing.assert_close(losses, -torch.nn.functional.logsigmoid(-0.5 * 5000 * difference))


def test_cpo_by_hand():
    # logit = -2 (0.1 - 0.5) = 0.8;  log(1 + exp(-0.8)) = 0.3711007;  + 3 * 0.1
    losses, metrics = cpo_loss(*tensors(0.1, 0.5), beta=2.0, lam=3.0)
    assert losses.item() == pytest.approx(0.6711007, abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(0.8)
    assert metrics["accuracy"].item() == 1


def test_sft_is_the_winners_weighted_loss():
    losses, metrics = sft_loss(torch.tensor([0.25, 0.5]), weight=3.0)
    assert losses.tolist() == [0.75, 1.5]
    assert metrics["policy_w"].tolist() == [0.25, 0.5]


def test_policy_equal_to_reference_gives_log_2_and_no_margin():
    w, l = torch.tensor([0.3, 7.0]), torch.tensor([0.1, 9.0])  # noqa: E741
    losses, metrics = dpo_loss(w, l, w.clone(), l.clone(), beta=2500)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert metrics["margin"].abs().max() == 0
    assert metrics["accuracy"].max() == 0  # no margin is no success


@pytest.mark.parametrize("beta", [1.0, 2500.0])
def test_gradient_lowers_the_winners_loss_and_raises_the_losers(beta):
    values = tensors(1e-4, 2e-4, 1.1e-4, 1.9e-4)
    losses, _ = dpo_loss(*values, beta=beta)
    losses.sum().backward()
    # d loss / d policy_w = beta sigmoid(-logit), and the opposite for the loser.
    logit = -beta * ((1e-4 - 1.1e-4) - (2e-4 - 1.9e-4))
    expected = beta / (1 + math.exp(logit))
    assert [v.grad.item() for v in values] == pytest.approx([expected, -expected, -expected, expected])

    policy = tensors(1e-4, 2e-4)
    cpo_loss(*policy, beta=beta, lam=7.0)[0].sum().backward()
    pull = beta / (1 + math.exp(beta * 1e-4))
    assert [v.grad.item() for v in policy] == pytest.approx([pull + 7, -pull])


def test_extreme_logits_stay_finite():
    losses, _ = dpo_loss(*(torch.tensor([v]) for v in (100.0, 0.0, 0.0, 100.0)), beta=1e6)
    assert losses.item() == pytest.approx(2e8)  # -log sigmoid(-x) -> x
    assert dpo_loss(*(torch.tensor([v]) for v in (0.0, 100.0, 100.0, 0.0)), beta=1e6)[0].item() == 0


def test_metrics_carry_no_gradient():
    for _, metrics in (
        dpo_loss(*tensors(1, 2, 3, 4), beta=1),
        cpo_loss(*tensors(1, 2), beta=1, lam=1),
        sft_loss(*tensors(1), weight=2.0),
    ):
        assert not any(v.requires_grad for v in metrics.values())


def test_the_perceptual_loss_is_the_mean_per_sample_and_block():
    # Sample 0: differences 1, 1, 3, 1 -> (1 + 1 + 9 + 1) / 4 = 3. Sample 1: none.
    p = torch.tensor([[[[1.0, 2], [3, 4]]], [[[5.0, 5], [5, 5]]]])
    q = torch.tensor([[[[0.0, 1], [0, 3]]], [[[5.0, 5], [5, 5]]]])
    assert mean_square(p - q).tolist() == [3, 0]
    # A second block of another size counts as much: (3 + 0.5) / 2; (0 + 8) / 2.
    r, s = torch.tensor([[1.0, 0.0], [4.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    assert mean_square((p - q, r - s)).tolist() == [1.75, 4]


def test_distances_are_taken_in_float32():
    p, q = torch.full((1, 3), 1.0, dtype=torch.bfloat16), torch.full((1, 3), 1.0078125, dtype=torch.bfloat16)
    assert mean_square(p - q).dtype == torch.float32
    assert mean_square(p - q).item() == 2.0**-14  # one bfloat16 step, 2^-7, squared
    assert latent_distance(p.view(1, 3, 1, 1), q.view(1, 3, 1, 1)).item() == 2.0**-14
