"""NCP-CPO: contrastive preference optimization of a diffusion model, without a reference model (paper eq. 15).

This file follows train_ncp_dpo.py (NCP-DPO) line by line. The differences: the policy's own losses on winner
and loser are compared, and a multiple of the winner's loss is added, which keeps the policy near the data.
The frozen encoder is the only copy of the original model.

    accelerate launch train_ncp_cpo.py --config configs/sd15_ncp_cpo.yaml [--any_key value ...]

`space: latent` is Diffusion-CPO. The paper gives no lambda. Near the centre of the sigmoid the first term
acts on the winner's loss with weight beta / 2, so a lambda far below beta has no effect (docs/settings.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ncp.common.config import option, parse
from ncp.common.errors import run_program
from ncp.encoder import Displacement
from ncp.losses import Metrics, cpo_loss, latent_distance, mean_square, preserve_winners
from ncp.training.inputs import conditions, latents
from ncp.training.models import Models
from ncp.training.pair_settings import PairConfig
from ncp.training.run import start


@dataclass(kw_only=True)
class Config(PairConfig):
    beta: float = option(
        2500.0,
        above=0,
        group="objective",
        doc="strength of the preference: the paper's beta times T. Diffusion-DPO's code writes 5000 for the same as "
        "2500",
    )
    lam: float = option(
        2500.0,
        low=0,
        doc="lambda, the weight of the winner's own loss beside the preference. The paper gives no value; far below "
        "beta it has no effect",
    )


def ncp_cpo(
    models: Models, unet: torch.nn.Module, batch: dict[str, Any], config: Config
) -> tuple[torch.Tensor, Metrics]:
    """Algorithm 1 without the reference: losses (B,) of B pairs, and metrics. 2B rows: the winners, then the losers."""
    x0 = latents(models, batch)  # (2B, C, h, w)
    c = conditions(models, batch)
    t, eps, z = batch["timestep"].repeat(2), batch["eps"].repeat(2, 1, 1, 1), batch["z"]
    d, s = models.diffusion, models.scheduler  # ncp/ddpm.py, or ncp/flow.py for SD3

    x_t = d.add_noise(s, x0, eps, t)  # eq. 1
    out_theta = unet(x_t, timestep=t, **c).sample

    if config.space == "latent":
        loss_theta = latent_distance(d.to_target(s, out_theta, t, x_t), d.target(x0, eps))  # eq. 3
    else:
        t_prev = d.previous(t, config.k)  # t'
        x_target = d.reverse_step(s, x0, t, t_prev, x_t, z)  # eq. 2
        x_theta = d.reverse_step(s, d.to_x0(s, out_theta, t, x_t), t, t_prev, x_t, z)  # eq. 12
        f = partial(models.encoder, timestep=t_prev.clamp_min(0), **c)
        displacement = Displacement(f, x_target, models.secant, config.secant_length)  # x -> f(x) - f(x_target)
        d_theta = displacement(x_theta)
        loss_theta = mean_square(d_theta)  # eq. 13

    loss_theta = preserve_winners(loss_theta, out_theta, config.winner_preserving_mu)
    theta_w, theta_l = loss_theta.chunk(2)
    return cpo_loss(theta_w, theta_l, config.beta, config.lam, batch.get("share_w"))  # eq. 15


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(Config, argv, description=__doc__)
    run = start(config, "CPO", ncp_cpo, images_per_sample=2, shown=("loss", "accuracy", "margin", "policy_w"))
    for step in run.steps():
        for batch in run.micro_batches():
            with run.accelerator.accumulate(run.unet):
                losses, metrics = ncp_cpo(run.models, run.unet, batch, config)
                run.accelerator.backward(losses.mean())
            run.record(batch, losses, metrics)
        grad_norm = run.accelerator.clip_grad_norm_(run.models.lora_parameters, config.max_grad_norm)
        if run.check_step(grad_norm):
            run.optimizer.step()
            run.update_average()
        run.optimizer.zero_grad()
        run.log(step)
        run.check_heldout(step)
        run.save_checkpoint(step)
        run.draw_validation(step)
    run.finish()


if __name__ == "__main__":
    run_program(main)
