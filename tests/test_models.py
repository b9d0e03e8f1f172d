"""What makes a step smaller or faster leaves its result alone; and what is loaded is what the files say."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from pipelines import SIDE, unet
from runs import arguments, as_a_process, assert_same_weights, call, loaded, run_here, timesteps
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cache_latents
import train_ncp_dpo
import train_ncp_sft
from ncp.common.config import parse
from ncp.common.errors import UserError
from ncp.training import cache, inputs, memory
from ncp.training.drawing import decode_latents, draw
from ncp.training.inputs import VAE_ELEMENTS, conditions, embed_prompts, images_per_pass, vae_moments
from ncp.training.models import compile_blocks, load_pipe
from ncp.training.pairs import open_pairs
from ncp.training.pipeline import describe
from ncp.training.samples import PairDataset
from ncp.training.schedules import scheduler_like
from ncp.training.unets import REPEATED, checkpoint_blocks


def gradients(assets, tmp_path, *extra: str) -> dict[str, torch.Tensor]:
    """d loss / d LoRA of the first batch of an SFT run, with B set to noise (A's gradient would be 0 at the start)."""
    config = parse(train_ncp_sft.Config, arguments(assets, tmp_path, *extra))
    m, batch = loaded(config, images=1)
    for name, p in m.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    losses, _ = train_ncp_sft.ncp_sft(m, m.unet, batch, config)
    losses.mean().backward()
    return {n: p.grad for n, p in m.unet.named_parameters() if p.requires_grad}


OPTIONS = {
    "checkpointing some blocks": ["--gradient_checkpointing", "true", "--checkpointed_blocks", "[encoder, up2, mid]"],
    "channels last": ["--channels_last", "true"],
    "compiled": ["--torch_compile", "true"],
}


@pytest.fixture
def quick_compiler(monkeypatch):
    """torch.compile captures and differentiates the blocks as always, but saves the minute of C++ compilation."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_module(self, backend="aot_eager", **kw))


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.usefixtures("quick_compiler")
def test_gradients_are_those_of_the_plain_path(assets, tmp_path, case):
    plain = gradients(assets, tmp_path)
    other = gradients(assets, tmp_path, *OPTIONS[case])
    assert plain.keys() == {n.replace("_orig_mod.", "") for n in other}
    for name, expected in plain.items():
        torch.testing.assert_close(other[name], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.usefixtures("quick_compiler")
def test_compiled_blocks_are_not_compiled_again_from_step_to_step(assets, tmp_path):
    from torch._dynamo.utils import counters

    config = parse(train_ncp_sft.Config, arguments(assets, tmp_path, "--torch_compile", "true"))
    m, batch = loaded(config, images=1)
    counts = []
    for _ in range(3):
        losses, _ = train_ncp_sft.ncp_sft(m, m.unet, batch, config)
        losses.mean().backward()
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[0] > 0 and counts[1] == counts[2] == counts[0]


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch, capsys):
    def broken(*_args, **_kwargs):
        raise RuntimeError("no C++ compiler found\nsecond line")

    class Printer:
        device = torch.device("cpu")
        print = staticmethod(print)

    monkeypatch.setattr(torch, "compile", broken)
    model = unet()
    compile_blocks([model], REPEATED, Printer())
    assert capsys.readouterr().out == (
        "torch_compile: no working compiler here, going on without (no C++ compiler found)\n"
    )
    assert all(m._compiled_call_impl is None for m in model.modules())


def test_checkpointed_blocks_are_the_named_ones():
    model = unet()
    checkpoint_blocks(model, ["down0", "mid", "encoder"])
    flags = {n: m.gradient_checkpointing for n, m in model.named_modules() if hasattr(m, "gradient_checkpointing")}
    chosen = {n for n, flag in flags.items() if flag}
    assert chosen == {n for n in flags if n.startswith(("down_blocks.0", "mid_block"))} and len(chosen) >= 4
    checkpoint_blocks(model, ["all"])
    assert all(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing"))


def test_an_unknown_block_is_refused(assets, tmp_path):
    config = parse(train_ncp_sft.Config, arguments(assets, tmp_path, "--checkpointed_blocks", "up9"))
    with pytest.raises(UserError, match="checkpointed_blocks: 'up9' is none of all, down0, down1, down2, encoder"):
        describe(config)


# ---------------------------------------------------------------- schedulers


SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
# As diffusers saves them with SD 1.5's settings: keys that a class does not have are not in its file.
SAVED = {
    "PNDM": lambda: PNDMScheduler(**SD15, skip_prk_steps=True),
    "DPM-Solver++": lambda: DPMSolverMultistepScheduler(**SD15),
    "DPM-Solver++ without an offset": lambda: DPMSolverMultistepScheduler(**{**SD15, "steps_offset": 0}),
    "Euler": lambda: EulerDiscreteScheduler(**SD15),
    "DDPM": lambda: DDPMScheduler(**SD15),  # which says clip_sample: true, its class's default
}


def with_scheduler(source: Path, folder: Path, scheduler, **changes) -> Path:
    """A copy of a pipeline with this scheduler in its files, keys changed, or left out if they are `...`."""
    shutil.copytree(source, folder)
    scheduler.save_pretrained(folder / "scheduler")
    file = folder / "scheduler" / "scheduler_config.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("case", SAVED)
def test_schedulers_take_no_default_that_is_not_stable_diffusions(tmp_path, case):
    SAVED[case]().save_pretrained(tmp_path)
    source = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert ("clip_sample" in source) == (case == "DDPM") and ("set_alpha_to_one" in source) == (case == "PNDM")
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, sample = (scheduler_like(kind, source) for kind in (DDPMScheduler, DDIMScheduler))
    for s in (train, sample):
        torch.testing.assert_close(s.alphas_cumprod.double(), abar, rtol=1e-5, atol=0)
        assert (s.config.clip_sample, s.config.thresholding, s.config.steps_offset) == (False, False, 1)
        assert s.config.prediction_type == "epsilon" and s.config.rescale_betas_zero_snr is False
        # Stated in the files of all classes; both kinds know all three ways.
        assert s.config.timestep_spacing == source["timestep_spacing"]
    assert train.config.variance_type == "fixed_small"  # null in DPM-Solver's file, absent from the others'
    assert sample.config.set_alpha_to_one is False and sample.final_alpha_cumprod == sample.alphas_cumprod[0]


def test_what_a_scheduler_config_states_is_kept():
    stated = {**SD15, "timestep_spacing": "trailing", "prediction_type": "v_prediction", "thresholding": True}
    stated |= {"set_alpha_to_one": True, "variance_type": "fixed_large", "rescale_betas_zero_snr": True}
    sample, train = (scheduler_like(kind, stated) for kind in (DDIMScheduler, DDPMScheduler))
    for key in ("timestep_spacing", "prediction_type", "thresholding", "rescale_betas_zero_snr"):
        assert sample.config[key] == train.config[key] == stated[key]
    assert sample.config.set_alpha_to_one is True and train.config.variance_type == "fixed_large"
    with pytest.raises(UserError, match="zero terminal SNR, which PNDMScheduler cannot sample"):
        scheduler_like(PNDMScheduler, stated)


@pytest.mark.parametrize(("model", "case"), [("xl", "PNDM"), ("sd", "DPM-Solver++ without an offset")])
def test_validation_pictures_are_stable_diffusions_ddim_without_a_warning(assets, tmp_path, model, case):
    """Against a pipeline put together by hand; latents of noise of variance 1 exceed 1, where clipping would show."""
    folder = with_scheduler(assets / model, tmp_path / "m", SAVED[case]())
    config = parse(train_ncp_sft.Config, arguments(assets, tmp_path / "o", model=str(folder)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        m, _ = loaded(config, images=1)
        settings = {"resolution": SIDE, "num_inference_steps": 4, "guidance_scale": 3.0, "accelerator": Accelerator()}
        (picture,) = draw(m, m.pipe, m.reference, ["a cat"], [7], **settings)
    pipe = DiffusionPipeline.from_pretrained(assets / model)
    spacing = "leading" if case == "PNDM" else "linspace"
    pipe.scheduler = DDIMScheduler(**SD15, clip_sample=False, set_alpha_to_one=False, timestep_spacing=spacing)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe("a cat", height=SIDE, width=SIDE, num_inference_steps=4, guidance_scale=3.0,
                    generator=torch.Generator().manual_seed(7)).images[0]  # fmt: skip
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected)).max() <= 1
    clipped = DDIMScheduler(**SD15, clip_sample=True, set_alpha_to_one=False, timestep_spacing=spacing)
    pipe.scheduler = clipped
    other = pipe("a cat", height=SIDE, width=SIDE, num_inference_steps=4, guidance_scale=3.0,
                 generator=torch.Generator().manual_seed(7)).images[0]  # fmt: skip
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(other)).max() > 8


def test_no_variance_type_is_fixed_small_in_a_run(assets, tmp_path):
    """DPM-Solver's files say null: the same weights come out as with the word."""
    for name, value in {"word": "fixed_small", "null": None}.items():
        scheduler = DDPMScheduler(**SD15, clip_sample=False)
        folder = with_scheduler(assets / "sd", tmp_path / name, scheduler, variance_type=value)
        # Timesteps far apart, where the noise of the variance counts.
        extra = ["--timestep_offset", "400", "--max_train_steps", "1"]
        argv = arguments(assets, tmp_path / f"out-{name}", *extra, model=str(folder))
        run_here("sft", argv)
    assert_same_weights(tmp_path / "out-word", tmp_path / "out-null")


# ---------------------------------------------------------------- VAE and text encoders


class Largest(TorchDispatchMode):
    """The most elements that a tensor made inside the block had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


@pytest.fixture(scope="module")
def sd_vae() -> AutoencoderKL:
    """SD's and SDXL's VAE, in shapes only."""
    with torch.device("meta"):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        )  # fmt: skip


@pytest.mark.parametrize(("side", "images"), [(512, 4), (1024, 1)])
def test_a_vae_pass_stays_far_below_two_to_the_31_elements(sd_vae, side, images):
    """What the maps of a real pass have, shapes only; the attention of SDXL's 16,384 tokens counted as a matrix."""
    assert images_per_pass(sd_vae.config, side) == images
    pixels = torch.empty(2 * images + 1, 3, side, side, dtype=torch.uint8, device="meta")
    with torch.no_grad():
        with Largest() as one:
            sd_vae.encode(pixels[:1].float())
            sd_vae.decode(torch.empty(1, 4, side // 8, side // 8, device="meta"))
        with Largest() as largest:
            moments = vae_moments(sd_vae, pixels)
    assert moments.shape == (2 * images + 1, 8, side // 8, side // 8)
    assert largest.elements <= VAE_ELEMENTS == 2**28 and images * one.elements <= VAE_ELEMENTS
    assert (images + 1) * one.elements > VAE_ELEMENTS  # none is smaller than it need be
    assert images_per_pass(sd_vae.config, 16384) == 1


def test_passes_of_bounded_size_give_what_one_by_one_gives(assets, tmp_path, monkeypatch):
    config = parse(train_ncp_sft.Config, arguments(assets, tmp_path, model="xl"))
    m, _ = loaded(config, images=1)
    vae, sizes = m.pipe.vae, []
    pixels = torch.randint(0, 256, (7, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    z = torch.randn(7, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(1))
    prompts = [f"prompt {i}" for i in range(7)]
    singly = [torch.cat([vae_moments(vae, p[None]) for p in pixels])]
    singly += [torch.cat(parts) for parts in zip(*(embed_prompts(m.pipe, [p]) for p in prompts), strict=True)]
    pictures = [decode_latents(vae, x[None])[0] for x in z]
    # The largest map of this VAE is its attention's, 16 x 16 tokens squared: room for three images.
    monkeypatch.setattr(inputs, "VAE_ELEMENTS", 3 * (SIDE // 2) ** 4)
    monkeypatch.setattr(inputs, "PROMPTS_PER_PASS", 3)
    for module in (vae.encoder, vae.decoder, m.pipe.text_encoder, m.pipe.text_encoder_2):
        module.register_forward_hook(lambda _, args, kwargs, __: sizes.append(len([*args, *kwargs.values()][0])),
                                     with_kwargs=True)  # fmt: skip
    together = [vae_moments(vae, pixels), *embed_prompts(m.pipe, prompts)]
    for one, other in zip(together, singly, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for one, other in zip(decode_latents(vae, z), pictures, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
    assert sizes == [3, 3, 1, *[3, 3, 3, 3, 1, 1], 3, 3, 1]


def test_the_estimate_of_memory_knows_the_passes(assets, monkeypatch, tmp_path):
    def foreseen(batch: int) -> int:
        config = parse(train_ncp_dpo.Config, arguments(assets, tmp_path, "--train_batch_size", str(batch)))
        return memory.encoders(config, describe(config))

    monkeypatch.setattr(inputs, "VAE_ELEMENTS", 4 * (SIDE // 2) ** 4)
    assert foreseen(1) < foreseen(2) == foreseen(64)  # 2, 4 and 128 images, of which four at once
    monkeypatch.setattr(inputs, "VAE_ELEMENTS", 1 << 28)
    assert foreseen(64) > 2 * foreseen(2)


@pytest.mark.parametrize("model", ["sd", "xl"])
def test_a_replacement_vae_is_in_float32_if_its_config_asks_for_it(assets, tmp_path, model):
    """A config that does not say is an old one: in an SDXL pipeline it overflows in half precision, in SD's not."""
    kept = {}
    for asks, expected in ((True, torch.float32), (False, torch.bfloat16), (None, None)):
        folder = tmp_path / str(asks)
        shutil.copytree(assets / model / "vae", folder)
        content = json.loads((folder / "config.json").read_text())
        content["force_upcast"] = asks
        if asks is None:
            del content["force_upcast"]
        (folder / "config.json").write_text(json.dumps(content))
        extra = ["--pretrained_vae_model_name_or_path", str(folder), "--mixed_precision", "bf16"]
        config = parse(train_ncp_sft.Config, arguments(assets, tmp_path / "o", *extra, model=model))
        description = describe(config)
        with as_a_process():
            accelerator = Accelerator(mixed_precision="bf16")
        pipe = load_pipe(config, description, accelerator)
        expected = expected or (torch.float32 if model == "xl" else torch.bfloat16)
        assert pipe.vae.dtype == expected and next(pipe.text_encoder.parameters()).dtype == torch.bfloat16
        kept[asks] = memory.encoders(config, description)
    assert kept[True] > kept[False] and kept[None] == kept[model == "xl"]


# ---------------------------------------------------------------- SDXL's size conditions


def test_size_conditions_keep_every_pixel_in_half_precision(assets, tmp_path):
    """In bfloat16 1023 is 1024. The sinusoids of the two differ, and so do policy, reference and encoder."""
    config = parse(train_ncp_dpo.Config, arguments(assets, tmp_path, "--mixed_precision", "bf16", model="xl"))
    m, batch = loaded(config, images=2)
    assert torch.tensor(1023.0).bfloat16() == torch.tensor(1024.0).bfloat16()
    outputs = []
    for height in (1023, 1024):
        ids = torch.tensor([[height, 1024, 0, 0, 1024, 1024]] * 4)
        c = conditions(m, {**batch, "time_ids": ids})
        assert c["added_cond_kwargs"]["time_ids"].dtype == torch.float32
        assert c["added_cond_kwargs"]["time_ids"].tolist() == ids.tolist()
        x, t = torch.ones(4, 4, SIDE // 2, SIDE // 2), torch.tensor([500] * 4)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = m.encoder(x, timestep=t, **c)
            outputs.append([features, m.unet(x, t, **c).sample, m.reference(x, t, **c).sample])
    assert all(not torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_fixed_size_conditions_are_a_whole_image_of_the_resolution(assets, tmp_path):
    """From pixels and from a cache, for training and held-out pairs, winners and losers; nothing else changes."""
    cached = ["--cached_latents", str(tmp_path / "cache")]
    call(cache_latents.main, arguments(assets, tmp_path / "unused", *cached, model="xl"))
    whole = [SIDE, SIDE, 0, 0, SIDE, SIDE]
    for extra in ([], cached):
        samples = {}
        for ids in ("image", "fixed"):
            argv = arguments(assets, tmp_path / "o", "--time_ids", ids, "--heldout_pairs", "2", *extra, model="xl")
            config = parse(train_ncp_dpo.Config, argv)
            description, pairs = describe(config), open_pairs(config)
            opened = cache.open_cache(config, description, pairs)
            dataset = PairDataset(config, pairs, (4, 16, 16), timesteps(config), 2, opened)
            samples[ids] = [dataset[3], dataset.heldout(1)]
        for image, fixed in zip(*samples.values(), strict=True):
            assert fixed["time_ids"].tolist() == [whole, whole]
            assert fixed["time_ids"].dtype == image["time_ids"].dtype == torch.int64
            assert image["time_ids"][0].tolist() != image["time_ids"][1].tolist()  # the images' sizes differ
            others = [k for k, v in image.items() if torch.is_tensor(v) and k != "time_ids"]
            assert len(others) >= 5 and all(torch.equal(image[k], fixed[k]) for k in others)
