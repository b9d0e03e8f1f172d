"""The encoder is the U-Net's own first half: same numbers, same storage, no gradient but to its input."""

import pytest
import torch
from peft import LoraConfig
from pipelines import unet

from ncp.encoder import DownBlockEncoder, frozen_twin, lengthen

BLOCKS = [("last",), (0,), ("1",), ("mid",), (0, 1, 2), ("mid", 0), ("last", "mid")]


def inputs(xl: bool, n: int = 3) -> dict:
    generator = torch.Generator().manual_seed(0)
    kwargs = {
        "sample": torch.randn(n, 4, 16, 16, generator=generator),
        "timestep": torch.tensor([0, 500, 999])[:n],
        "encoder_hidden_states": torch.randn(n, 7, 64 if xl else 32, generator=generator),
    }
    if xl:
        ids = torch.tensor([[64.0, 48, 0, 8, 32, 32]]).repeat(n, 1)
        kwargs["added_cond_kwargs"] = {"text_embeds": torch.randn(n, 24, generator=generator), "time_ids": ids}
    return kwargs


def hooked(model, kwargs: dict) -> dict:
    """Activations of a full U-Net pass, by block name."""
    seen, handles = {}, []
    for name, block in [*enumerate(model.down_blocks), ("mid", model.mid_block)]:
        keep = lambda _, __, out, name=name: seen.__setitem__(name, out[0] if isinstance(out, tuple) else out)  # noqa: E731
        handles.append(block.register_forward_hook(keep))
    model(**kwargs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_output_is_the_unets_own_activation(xl, blocks):
    model, kwargs = unet(xl), inputs(xl)
    features = DownBlockEncoder.from_unet(model, blocks)(**kwargs)
    features = (features,) if len(blocks) == 1 else features
    seen = hooked(model, kwargs)
    for block, feature in zip(blocks, features, strict=True):
        key = block if block == "mid" else len(model.down_blocks) - 1 if block == "last" else int(block)
        assert torch.equal(feature, seen[key])


def test_storage_is_shared_and_up_blocks_are_gone():
    model = unet()
    encoder, twin = DownBlockEncoder.from_unet(model), frozen_twin(model)
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in twin.parameters()} == own
    mine = dict(encoder.named_parameters())
    assert {p.data_ptr() for p in mine.values()} < own
    assert not any(".up_blocks" in name or ".mid_block" in name or ".conv_out" in name for name in mine)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_the_input_and_no_weight(checkpointing):
    model, kwargs = unet(), inputs(False)
    encoder = DownBlockEncoder.from_unet(model, ("last", "mid"))
    plain = kwargs["sample"].clone().requires_grad_()
    sum(f.square().sum() for f in encoder(**{**kwargs, "sample": plain})).backward()
    if checkpointing:
        encoder.enable_gradient_checkpointing()
        again = kwargs["sample"].clone().requires_grad_()
        sum(f.square().sum() for f in encoder(**{**kwargs, "sample": again})).backward()
        torch.testing.assert_close(again.grad, plain.grad)
    assert plain.grad.abs().min(dim=0).values.sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())


def test_adapters_change_the_policy_only():
    model, kwargs = unet(), inputs(False)
    before = model(**kwargs).sample
    reference, encoder = frozen_twin(model), DownBlockEncoder.from_unet(model)
    feature = encoder(**kwargs)
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    assert not torch.allclose(model(**kwargs).sample, before)
    assert torch.equal(reference(**kwargs).sample, before)
    assert torch.equal(encoder(**kwargs), feature)
    with pytest.raises(ValueError, match="before add_adapter"):
        frozen_twin(model)


@pytest.mark.parametrize("blocks", [(), (3,), ("early",), (-1,), (2, "last")])
def test_wrong_blocks_are_refused(blocks):
    with pytest.raises(ValueError, match="block"):
        DownBlockEncoder.from_unet(unet(), blocks)


def test_half_precision_weights_take_float32_input():
    model = unet().bfloat16()
    feature = DownBlockEncoder.from_unet(model)(**inputs(False))
    assert feature.dtype == torch.bfloat16 and feature.isfinite().all()


class TestLengthen:
    target = torch.zeros(3, 4, 8, 8)
    # Root mean squares 0.01, 0.1 and 0.
    x = torch.stack([torch.full((4, 8, 8), v) for v in (0.01, 0.1, 0.0)])

    def test_auto_reaches_the_step_length_and_never_shortens(self):
        far, s = lengthen(self.x, self.target, "auto", 0.05)
        assert s.tolist()[:2] == pytest.approx([5, 1])  # 0.05 / 0.01; max(1, 0.05 / 0.1)
        assert far[:, 0, 0, 0].tolist() == pytest.approx([0.05, 0.1, 0])
        assert far.isfinite().all() and s.isfinite().all()  # also where the prediction is exact

    def test_secant_one_is_the_point_itself(self):
        far, s = lengthen(self.x, self.target, "1")
        assert far is self.x and s.tolist() == [1, 1, 1]

    def test_any_secant_leaves_a_linear_features_distance_and_gradient_alone(self):
        # || A (target + s d) - A target ||^2 / s^2 = || A d ||^2 whatever s is.
        matrix = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
        gradients = []
        for secant in ("1", "16", "auto"):
            x = (torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.01).requires_grad_()
            far, s = lengthen(x, self.target, secant)
            assert not s.requires_grad
            loss = ((far.flatten(1) @ matrix.T).square().mean(1) / s**2).sum()
            loss.backward()
            gradients.append((loss.detach(), x.grad))
        for loss, gradient in gradients[1:]:
            torch.testing.assert_close(loss, gradients[0][0])
            torch.testing.assert_close(gradient, gradients[0][1])
