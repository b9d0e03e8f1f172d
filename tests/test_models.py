"""What makes a step smaller or faster leaves its result alone."""

from pathlib import Path

import pytest
import torch
from pipelines import save_dataset, save_pipeline, unet
from test_scripts import arguments, loaded

import train_ncp_sft
from ncp import models
from ncp.config import UserError, parse


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    save_pipeline(folder / "sd")
    save_dataset(folder / "data" / "train.parquet")
    return folder


def gradients(assets, tmp_path, *extra: str) -> dict[str, torch.Tensor]:
    """d loss / d LoRA of the first batch of an SFT run, with B set to noise (A's gradient would be 0 at the start)."""
    config = parse(train_ncp_sft.Config, arguments(assets, tmp_path, *extra))
    m, batch = loaded(config, losers=False)
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
    m, batch = loaded(config, losers=False)
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
    models.compile_blocks([model], Printer())
    assert capsys.readouterr().out == (
        "torch_compile: no working compiler here, going on without (no C++ compiler found)\n"
    )
    assert all(m._compiled_call_impl is None for m in model.modules())


def test_checkpointed_blocks_are_the_named_ones():
    model = unet()
    models.checkpoint_blocks(model, ["down0", "mid", "encoder"])
    flags = {n: m.gradient_checkpointing for n, m in model.named_modules() if hasattr(m, "gradient_checkpointing")}
    chosen = {n for n, flag in flags.items() if flag}
    assert chosen == {n for n in flags if n.startswith(("down_blocks.0", "mid_block"))} and len(chosen) >= 4
    models.checkpoint_blocks(model, ["all"])
    assert all(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing"))


def test_an_unknown_block_is_refused(assets, tmp_path):
    config = parse(train_ncp_sft.Config, arguments(assets, tmp_path, "--checkpointed_blocks", "up9"))
    with pytest.raises(UserError, match="checkpointed_blocks: 'up9' is none of all, down0, down1, down2, encoder"):
        models.describe(config)
