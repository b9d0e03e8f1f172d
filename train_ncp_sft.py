"""NCP-SFT: supervised fine-tuning on preferred images with the perceptual loss (paper eq. 13).

This file follows train_ncp_dpo.py (NCP-DPO) line by line. The difference: only the winners of the pairs are used,
and their perceptual diffusion loss is minimised directly.

    accelerate launch train_ncp_sft.py --config configs/sd15_ncp_sft.yaml [--any_key value ...]

`space: latent` is ordinary fine-tuning with the noise prediction error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ncp.common.config import option, parse
from ncp.common.errors import run_program
from ncp.encoder import Displacement
from ncp.losses import Metrics, latent_distance, mean_square, sft_loss
from ncp.training.inputs import conditions, latents
from ncp.training.models import Models
from ncp.training.run import start
from ncp.training.settings import TrainingConfig


@dataclass(kw_only=True)
class Config(TrainingConfig):
    loss_weight: float | None = option(
        None,
        above=0,
        group="objective",
        doc="factor of the loss, so that gradients neither underflow in float16 nor fall below AdamW's epsilon. null: "
        "1250 in perceptual space, where losses are near 1e-5 (DPO's pull on a winner at beta 2500), and 1 in latent "
        "space",
    )

    @property
    def weight(self) -> float:
        """The weight of the loss."""
        return self.loss_weight or (1250.0 if self.space == "perceptual" else 1.0)


def ncp_sft(
    models: Models, unet: torch.nn.Module, batch: dict[str, Any], config: Config
) -> tuple[torch.Tensor, Metrics]:
    """Algorithm 1 on winners alone: losses (B,) of B winners, and metrics."""
    x0 = latents(models, batch)  # (B, C, h, w)
    c = conditions(models, batch)
    t, eps, z = batch["timestep"], batch["eps"], batch["z"]
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

    return sft_loss(loss_theta, config.weight)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(Config, argv, description=__doc__)
    run = start(config, "SFT", ncp_sft, images_per_sample=1, shown=("loss", "grad_norm"))
    for step in run.steps():
        for batch in run.micro_batches():
            with run.accelerator.accumulate(run.unet):
                losses, metrics = ncp_sft(run.models, run.unet, batch, config)
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
