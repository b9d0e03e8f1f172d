"""The LoRA in kohya's form: its names against lists made from the architecture and from ComfyUI, its alpha, its
metadata; what diffusers draws from it."""

import json

import lora_runs
import pytest
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects
from lora_runs import draw
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pipelines import SIDE
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.architectures import description
from ncp.common.errors import UserError
from ncp.training.checkpoints import read_manifest
from ncp.training.kohya import base_model, file_name, kohya_state
from ncp.training.unets import LORA_TARGETS
from ncp.training.weights import WEIGHTS, read_lora

runs = lora_runs.runs
# Of the published models, by hand: how many transformer blocks each attention of each block has.
ATTENTIONS = {
    "sd15": {
        "down_blocks_0": [1, 1],
        "down_blocks_1": [1, 1],
        "down_blocks_2": [1, 1],
        "mid_block": [1],
        "up_blocks_1": [1, 1, 1],
        "up_blocks_2": [1, 1, 1],
        "up_blocks_3": [1, 1, 1],
    },
    "sdxl": {
        "down_blocks_1": [2, 2],
        "down_blocks_2": [10, 10],
        "mid_block": [10],
        "up_blocks_0": [10, 10, 10],
        "up_blocks_1": [2, 2, 2],
    },
}
# ComfyUI's settings of the two (comfy/supported_models.py, model_detection.py): of each of its levels the depths of the
# transformers in the encoder and the decoder, 0 where there is none; and the channels, in units of 320.
COMFY = {
    "sd15": ([[1, 1], [1, 1], [1, 1], [0, 0]], 1, [[0, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]], [1, 2, 4, 4]),
    "sdxl": ([[0, 0], [2, 2], [10, 10]], 10, [[10, 10, 10], [2, 2, 2], [0, 0, 0]], [1, 2, 4]),
}
TEXT_WIDTH = {"sd15": 768, "sdxl": 2048}
COUNTS = {"sd15": 128, "sdxl": 560}
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out_0"]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def full_size(request) -> tuple[str, dict[str, torch.Tensor]]:
    """The published U-Net's name, and the weights of a LoRA of rank 3 on it; it has its size, and no storage."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(description(request.param).denoiser)
        unet.add_adapter(LoraConfig(r=3, target_modules=LORA_TARGETS))
    return request.param, {k: torch.ones(v.shape) for k, v in get_peft_model_state_dict(unet).items()}


def test_the_names_are_those_of_the_architecture(full_size):
    name, state = full_size
    literal = {
        f"lora_unet_{block}_attentions_{i}_transformer_blocks_{j}_{attention}_{projection}"
        for block, depths in ATTENTIONS[name].items()
        for i, depth in enumerate(depths)
        for j in range(depth)
        for attention in ("attn1", "attn2")
        for projection in PROJECTIONS
    }
    found = kohya_state(state, 3, torch.float32)
    assert len(literal) == COUNTS[name]
    assert found.keys() == {f"{n}.{part}" for n in literal for part in ("lora_up.weight", "lora_down.weight", "alpha")}
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight" in found


def comfy_key_map(name: str) -> dict[str, tuple[str, tuple[int, int]]]:
    """What ComfyUI looks for: a LoRA's name to the attention weight of its U-Net, and its shape (out, in).

    ComfyUI (comfy/lora.py, model_lora_keys_unet; comfy/utils.py, unet_to_diffusers) names its weights as the original
    checkpoints do, input_blocks.1.1 and so on, and finds a layer under that name and under diffusers', both with `_`
    for `.`. In the encoder, each level has two blocks and a third that halves the size; in the decoder, three blocks.
    """
    encoder, middle, decoder, widths = COMFY[name]
    places = [  # (diffusers' name, the original's, depth, channels)
        *(
            (f"down_blocks.{level}.attentions.{i}", f"input_blocks.{1 + 3 * level + i}.1", depth, 320 * widths[level])
            for level, depths in enumerate(encoder)
            for i, depth in enumerate(depths)
        ),
        ("mid_block.attentions.0", "middle_block.1", middle, 320 * widths[-1]),
        *(
            (f"up_blocks.{level}.attentions.{i}", f"output_blocks.{3 * level + i}.1", depth, 320 * widths[-1 - level])
            for level, depths in enumerate(decoder)
            for i, depth in enumerate(depths)
        ),
    ]
    found = {}
    for diffusers_name, original, depth, channels in places:
        for block in range(depth):
            for attention, width in (("attn1", channels), ("attn2", TEXT_WIDTH[name])):
                for projection in ("to_q", "to_k", "to_v", "to_out.0"):
                    tail = f"transformer_blocks.{block}.{attention}.{projection}"
                    reads_text = projection in ("to_k", "to_v")
                    target = (f"{original}.{tail}.weight", (channels, width if reads_text else channels))
                    for spelling in (diffusers_name, original):
                        found["lora_unet_" + f"{spelling}.{tail}".replace(".", "_")] = target
                    # Of diffusers' spellings it has only the one of diffusers' old attention processors.
                    old = tail.replace(".to_", ".processor.to_").removesuffix(".0")
                    found |= {f"{prefix}{diffusers_name}.{old}": target for prefix in ("", "unet.")}
    return found


def test_comfyui_finds_every_layer_and_each_weight_of_its_own_once(full_size):
    name, state = full_size
    looked_for, file = comfy_key_map(name), kohya_state(state, 3, torch.float32)
    hits = {layer: target for layer, target in looked_for.items() if f"{layer}.lora_up.weight" in file}
    weights = [weight for weight, _ in hits.values()]
    assert len(hits) == len(set(weights)) == COUNTS[name]  # all of them, no two for one weight
    assert set(weights) == {weight for weight, _ in looked_for.values()}
    for layer, (_, shape) in hits.items():
        down, up = file[f"{layer}.lora_down.weight"], file[f"{layer}.lora_up.weight"]
        assert (len(up), down.shape[1]) == shape and file[f"{layer}.alpha"].item() == 3
    # And of the same LoRA in diffusers' form none, in any of the spellings of the factors that ComfyUI knows.
    theirs = {"unet." + key.replace("lora_A", "lora.down").replace("lora_B", "lora.up") for key in state}
    ups = ("_lora.up.weight", ".lora.up.weight", ".lora_B.weight", ".lora_linear_layer.up.weight")
    assert not [layer for layer in looked_for for up in ups if layer + up in theirs]


def test_the_base_model_is_told_by_the_text_that_the_attention_reads(full_size):
    name, state = full_size
    known = {"sd15": ("sd_v1", False, "stable-diffusion-v1"), "sdxl": ("sdxl_base_v1-0", False, None)}[name]
    assert base_model(state, None, None)[:2] == known[:2]
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
    wide = {key: torch.ones(3, 1024)}
    assert base_model(wide, None, "epsilon") == ("sd_v2", True, "stable-diffusion-v2-512")
    assert base_model(wide, False, "v_prediction") == ("sd_v2_v", True, "stable-diffusion-v2-768-v")
    assert base_model(wide, True, "v_prediction")[0] == "sdxl_base_v1-0"  # a small one of SDXL's kind


def test_the_precision_is_that_of_the_factors_alone():
    state = {"a.to_q.lora_A.weight": torch.full((2, 3), 1 / 3), "a.to_q.lora_B.weight": torch.full((4, 2), 7e-5)}
    half = kohya_state(state, 1 / 3, torch.float16)
    assert half["lora_unet_a_to_q.lora_up.weight"].dtype == torch.float16
    assert half["lora_unet_a_to_q.alpha"].dtype == torch.float32
    torch.testing.assert_close(half["lora_unet_a_to_q.alpha"].item(), 1 / 3)
    with pytest.raises(UserError, match=r"lora_B.weight: not finite in torch.float16"):
        kohya_state({"a.to_q.lora_B.weight": torch.full((4, 2), 7e4)}, 1, torch.float16)
    with pytest.raises(UserError, match="magnitude"):
        kohya_state({"a.to_q.lora_magnitude_vector.weight": torch.ones(4)}, 1, torch.float32)


@pytest.mark.parametrize(
    "folder, name",
    [
        ("output/sdxl-ncp-dpo", "sdxl-ncp-dpo"),
        ("output/sd1.5 run", "sd1.5 run"),
        ("output/run/checkpoint-24", "run-step00000024"),
        ("output/24", "24"),
        ("output/my-checkpoint-24", "my-checkpoint-24"),
        ("pytorch_lora_weights", "pytorch_lora_weights-kohya"),  # would replace diffusers' own file
        ("my_pytorch_lora_weights", "my_pytorch_lora_weights-kohya"),  # would be taken for it
        (".", None),
    ],
)
def test_the_file_is_called_as_its_folder(tmp_path, monkeypatch, folder, name):
    monkeypatch.chdir(tmp_path)
    assert file_name(tmp_path / folder) == f"{name or tmp_path.name}.safetensors"


# ---------------------------------------------------------------- what a run writes


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_diffusers_draws_the_same_from_both_forms(runs, kind):
    out, base, _, _ = runs[kind]
    own, kohya, without = draw(base, out / WEIGHTS), draw(base, out / f"{out.name}.safetensors"), draw(base)
    torch.testing.assert_close(kohya, own, atol=1e-6, rtol=0)
    assert (own - without).abs().max() > 1e-2
    torch.testing.assert_close(draw(base, out), own, atol=1e-6, rtol=0)  # the folder now holds two files


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_the_file_holds_the_run_s_numbers_and_alpha(runs, kind):
    out, _, rank, alpha = runs[kind]
    file, own = load_file(out / f"{out.name}.safetensors"), load_file(out / WEIGHTS)
    layers = {key.removesuffix(".alpha") for key in file if key.endswith(".alpha")}
    assert len(file) == 3 * len(layers) and len(own) == 2 * len(layers)
    assert {file[f"{layer}.alpha"].item() for layer in layers} == {alpha}
    for key, value in own.items():
        layer = key.removeprefix("unet.").partition(".lora.")[0].replace(".", "_")
        part = "lora_down" if ".lora.down." in key else "lora_up"
        assert torch.equal(file[f"lora_unet_{layer}.{part}.weight"], value)
    state, found = read_lora(out / WEIGHTS)
    assert found == alpha and {len(v) for k, v in state.items() if "lora_A" in k} == {rank}


def test_the_metadata_says_what_programs_show(runs):
    for kind, method, images, version, architecture in (
        ("sd", "NCP-SFT", 1, "sd_v1", "stable-diffusion-v1/lora"),
        ("xl", "NCP-DPO", 2, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ):
        out, _, rank, alpha = runs[kind]
        with safe_open(out / f"{out.name}.safetensors", "pt") as content:
            told = content.metadata()
        # Ten rows of five prompts; one prompt's pair is held out, and its other pair is set aside.
        expected = {
            "ss_output_name": out.name,
            "ss_sd_model_name": kind,  # its folder's path stays here
            "ss_base_model_version": version,
            "ss_v2": "False",
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(alpha),
            "ss_resolution": f"({SIDE}, {SIDE})",
            "ss_num_train_images": str(8 * images),
            "ss_steps": "2",
            "ss_seed": "0",
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": architecture,
            "modelspec.title": out.name,
            "modelspec.prediction_type": "epsilon",
            "modelspec.resolution": f"{SIDE}x{SIDE}",
        }
        assert told.items() >= expected.items()
        assert json.loads(told["ss_dataset_dirs"]) == {"data": {"n_repeats": 1, "img_count": 8 * images}}
        for text in (method, "version 0.1.0", "8 pairs of 4 prompts", "2406.17636"):
            assert text in told["modelspec.description"] == told["ss_training_comment"]
        assert not [value for value in told.values() if str(out.parent) in value]
        facts = read_manifest(out / "checkpoint-2")["facts"]
        assert facts == {
            "method": method, "is_xl": kind == "xl", "prediction_type": "epsilon",
            "pairs": 8, "prompts": 4, "images": 8 * images,
        }  # fmt: skip
        assert f"`{out.name}.safetensors`" in (out / "README.md").read_text()


def test_the_file_is_uploaded_whatever_its_name(runs):
    out = runs["sd"][0]
    files = [f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()]
    uploaded = set(filter_repo_objects(files, allow_patterns=runs["uploaded"]))
    assert uploaded == {f"{out.name}.safetensors", WEIGHTS, "README.md", "config.yaml", "environment.yaml"}
