"""The checkpoint that benchmarks/sd_cpp.py makes is of the original layout: diffusers' converter reads it back."""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


def test_each_weight_gets_the_name_that_diffusers_reads_it_from():
    import architectures
    import sd_cpp

    with torch.device("meta"):
        vae = AutoencoderKL(**architectures.description("sd15").vae)
    unet = architectures.unet("sd15", torch.float32, torch.device("meta"))
    for module, original_name, convert in (
        (unet, sd_cpp.original_unet_name, convert_ldm_unet_checkpoint),
        (vae, sd_cpp.original_vae_name, convert_ldm_vae_checkpoint),
    ):
        names = list(module.state_dict())
        # In place of the weights, their numbers; four dimensions, as the VAE's projections have there.
        file = {original_name(name): torch.tensor([[[[float(i)]]]]) for i, name in enumerate(names)}
        back = convert(file, dict(module.config))
        assert {name: names[int(number)] for name, number in back.items()} == {name: name for name in names}
