"""NCP-DPO: direct preference optimization of a diffusion model in the feature space of its U-Net (paper eq. 14).

Winner and loser of one prompt get the same noise at timestep t. The DDPM step to t-1 is taken three times: with
the noise predicted by the policy, with that of the frozen reference, and with the true noise. The frozen down blocks
of the U-Net embed the results. The diffusion loss is the squared distance to the embedding of the true step. DPO
trains the policy to lower this loss, relative to the reference, more on winners than on losers.

    accelerate launch train_ncp_dpo.py --config configs/sd15_ncp_dpo.yaml [--any_key value ...]

`space: latent` is plain Diffusion-DPO. For SD3 the first blocks of its transformer take the place of the down blocks,
and flow matching that of DDPM. Differences from the printed equations: the mean instead of the sum over features,
1 - abar_t in eq. 12, t from 1 to T-1, and in half precision a derivative instead of the small difference of eq. 13
(`secant`, docs/precision.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ncp.common.config import option, parse
from ncp.common.errors import UserError, run_program
from ncp.encoder import Displacement
from ncp.losses import Metrics, dpo_loss, latent_distance, mean_square, preserve_winners
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
    utility: str = option(
        "logistic",
        group="against collapse",
        choices=("logistic", "linear"),
        doc="how a pair's weight in the gradient depends on its margin. logistic: as sigmoid(-margin). linear: as the "
        "line 0.5 - 0.4 margin, from eta to 1 - eta (Linear-DPO)",
    )
    eta: float = option(
        0.001, low=0, high=0.5, doc="smallest weight of a pair with the linear utility; 1 - eta is the largest"
    )
    reference_decay: float | None = option(
        None,
        low=0,
        high=0.999999,
        doc="let the reference follow the policy, as its exponential average: share of the old reference that is kept "
        "at each optimizer step (Linear-DPO). null: the reference stays the original model",
    )

    def check(self) -> None:
        """Raises UserError for keys that contradict each other."""
        super().check()
        if self.soft_labels and self.utility == "linear":
            raise UserError("soft_labels needs utility: logistic; the linear one has no target")


def ncp_dpo(
    models: Models, unet: torch.nn.Module, batch: dict[str, Any], config: Config
) -> tuple[torch.Tensor, Metrics]:
    """Algorithm 1, lines 4 to 18: losses (B,) of B pairs, and metrics. 2B rows hold the winners, then the losers."""
    x0 = latents(models, batch)  # (2B, C, h, w)
    c = conditions(models, batch)
    t, eps, z = batch["timestep"].repeat(2), batch["eps"].repeat(2, 1, 1, 1), batch["z"]
    d, s = models.diffusion, models.scheduler  # ncp/ddpm.py, or ncp/flow.py for SD3

    x_t = d.add_noise(s, x0, eps, t)  # eq. 1
    out_theta = unet(x_t, timestep=t, **c).sample
    with torch.no_grad():
        out_ref = models.reference(x_t, timestep=t, **c).sample

    if config.space == "latent":
        loss_theta = latent_distance(d.to_target(s, out_theta, t, x_t), d.target(x0, eps))  # eq. 3
        loss_ref = latent_distance(d.to_target(s, out_ref, t, x_t), d.target(x0, eps))
    else:
        t_prev = d.previous(t, config.k)  # t'
        x_target = d.reverse_step(s, x0, t, t_prev, x_t, z)  # eq. 2
        x_theta = d.reverse_step(s, d.to_x0(s, out_theta, t, x_t), t, t_prev, x_t, z)  # eq. 12
        x_ref = d.reverse_step(s, d.to_x0(s, out_ref, t, x_t), t, t_prev, x_t, z)
        f = partial(models.encoder, timestep=t_prev.clamp_min(0), **c)
        displacement = Displacement(f, x_target, models.secant, config.secant_length)  # x -> f(x) - f(x_target)
        d_ref = displacement(x_ref)
        d_theta = displacement(x_theta, near=(x_ref, d_ref))
        loss_theta, loss_ref = mean_square(d_theta), mean_square(d_ref)  # eq. 13

    loss_theta = preserve_winners(loss_theta, out_theta, config.winner_preserving_mu)
    (theta_w, theta_l), (ref_w, ref_l) = loss_theta.chunk(2), loss_ref.chunk(2)
    share, utility = batch.get("share_w"), config.utility
    return dpo_loss(theta_w, theta_l, ref_w, ref_l, config.beta, share, utility, config.eta)  # eq. 14


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(Config, argv, description=__doc__)
    run = start(config, "DPO", ncp_dpo, images_per_sample=2, shown=("loss", "accuracy", "margin", "winner_drift"))
    for step in run.steps():
        for batch in run.micro_batches():
            with run.accelerator.accumulate(run.unet):
                losses, metrics = ncp_dpo(run.models, run.unet, batch, config)
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
