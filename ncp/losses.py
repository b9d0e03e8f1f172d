"""Distances and objectives: tensors in, per-sample values out (paper eq. 3, 13, 14, 15). The caller takes the mean.

`policy_w`, `policy_l`, `ref_w` and `ref_l` are per-sample diffusion losses (B,), float32, of winner and loser, under
the policy and the reference: perceptual (PL, eq. 13) or latent (L, eq. 3). `beta` is the paper's beta times T, and
there is no factor 0.5. Metrics are detached (B,) tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ncp.encoder import Features

Metrics = dict[str, torch.Tensor]
SATURATED = 5.0  # a logit beyond which the sigmoid's slope is below 3% of its largest


def mean_square(displacement: Features) -> torch.Tensor:
    """|| f(x) - f(target) ||^2 of eq. 13 as the mean over a block's elements, (B,) float32: the perceptual loss.

    displacement: f(x) - f(target), one (B, ...) tensor or several, one per block. The result is the mean of the blocks'
    means. The published beta of 2500 belongs to this mean, not to the printed sum.
    """
    blocks = (displacement,) if isinstance(displacement, torch.Tensor) else displacement
    return torch.stack([block.float().square().flatten(1).mean(1) for block in blocks]).mean(0)


def latent_distance(eps_pred: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """|| eps - eps_pred ||^2 of eq. 3 as the mean over (C, H, W), (B,) float32: the baselines' loss."""
    return (eps_pred.float() - eps.float()).square().mean(dim=(1, 2, 3))


def preserve_winners(loss: torch.Tensor, output: torch.Tensor, mu: float | None) -> torch.Tensor:
    """`loss` (2B,), winners first, with the losers' gradients scaled down, as in Diffusion-SDPO (2511.03317).

    output: the policy's output (2B, C, H, W) float32, of which a row decides the loss of that row alone. With g_w, g_l
    the gradients of a pair's two losses with respect to their rows, the loser's becomes lambda g_l:

        lambda = min(1, (1 - mu) ||g_w||^2 / <g_l, g_w>)  if <g_l, g_w> > 0, else 1

    Then <g_w, -g_w + lambda g_l> <= -mu ||g_w||^2: to first order a step on the outputs does not raise the winner's
    loss. Values stay as they are. What lies between output and loss (f) is differentiated once, here; the backward
    pass starts at `output`. mu None, or without a gradient: `loss` itself.
    """
    if mu is None or not loss.requires_grad:
        return loss
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    g_w, g_l = gradient.flatten(1).chunk(2)
    along = (g_l * g_w).sum(1)
    scale = torch.where(along > 0, ((1 - mu) * g_w.square().sum(1) / along).clamp_max(1), 1.0)
    scaled = torch.cat([g_w, scale[:, None] * g_l])
    return loss.detach() + ((output - output.detach()).flatten(1) * scaled).sum(1)


def dpo_loss(
    policy_w: torch.Tensor,
    policy_l: torch.Tensor,
    ref_w: torch.Tensor,
    ref_l: torch.Tensor,
    beta: float,
    share: torch.Tensor | None = None,
    utility: str = "logistic",
    eta: float = 0.001,
) -> tuple[torch.Tensor, Metrics]:
    """Diffusion-DPO, eq. 14: -logsigmoid(-beta d), (B,), with d = (policy_w - ref_w) - (policy_l - ref_l).

    share: see `logistic_loss`. The gradient in d is beta sigmoid(beta d). utility "linear" puts a clipped line in place
    of the sigmoid, as in Linear-DPO (2605.21123): beta w (policy_w - policy_l), with w = clip(0.5 + 0.4 beta d, eta,
    1 - eta) constant.
    """
    drift_w, drift_l = policy_w - ref_w, policy_l - ref_l
    logit = -beta * (drift_w - drift_l)
    metrics = {
        "reward_w": -beta * drift_w,
        "reward_l": -beta * drift_l,
        # The winner's loss relative to the reference. Above 0, winners are less likely under the policy than before.
        "winner_drift": drift_w / ref_w.clamp_min(torch.finfo(ref_w.dtype).tiny),
        **_preference(logit, policy_w, policy_l),
    }
    if utility == "linear":
        # Published without beta. AdamW divides a constant factor out, but for its epsilon: at PL near 1e-5, 95% of the
        # gradient's elements would be below it.
        losses = beta * (0.5 - 0.4 * logit).clamp(eta, 1 - eta).detach() * (policy_w - policy_l)
    else:
        losses = logistic_loss(logit, share)
    return losses, _detached(metrics)


def cpo_loss(
    policy_w: torch.Tensor, policy_l: torch.Tensor, beta: float, lam: float, share: torch.Tensor | None = None
) -> tuple[torch.Tensor, Metrics]:
    """Diffusion-CPO, eq. 15: -logsigmoid(-beta (policy_w - policy_l)) + lam policy_w, (B,). No reference model.

    share: see `logistic_loss`.
    """
    logit = -beta * (policy_w - policy_l)
    metrics = {"reward_w": -beta * policy_w, "reward_l": -beta * policy_l, **_preference(logit, policy_w, policy_l)}
    return logistic_loss(logit, share) + lam * policy_w, _detached(metrics)


def logistic_loss(logit: torch.Tensor, share: torch.Tensor | None) -> torch.Tensor:
    """-logsigmoid(logit), (B,); with soft labels -(p logsigmoid(logit) + (1 - p) logsigmoid(-logit)).

    share: p (B,), the share of the annotators who prefer the winner. The loss is smallest at sigmoid(logit) = p.
    """
    if share is None:
        return -F.logsigmoid(logit)
    return -(share * F.logsigmoid(logit) + (1 - share) * F.logsigmoid(-logit))


def sft_loss(policy_w: torch.Tensor, weight: float) -> tuple[torch.Tensor, Metrics]:
    """Supervised fine-tuning on winners: their diffusion loss times `weight`, (B,)."""
    return weight * policy_w, _detached({"policy_w": policy_w})


def _preference(logit: torch.Tensor, policy_w: torch.Tensor, policy_l: torch.Tensor) -> Metrics:
    return {
        "margin": logit,
        "accuracy": (logit > 0).float(),
        "abs_logit": logit.abs(),
        "saturated": (logit.abs() > SATURATED).float(),
        "policy_w": policy_w,
        "policy_l": policy_l,
    }


def _detached(metrics: Metrics) -> Metrics:
    return {name: value.detach() for name, value in metrics.items()}
