"""The encoder is the U-Net's own first half: same numbers, same storage, no gradient but to its input."""

import pytest
import torch
from peft import LoraConfig
from pipelines import unet

from ncp.encoder import Displacement, DownBlockEncoder, frozen_twin, precision_of_f

BLOCKS = [("last",), (0,), ("1",), ("mid",), (0, 1, 2), ("mid", 0), ("last", "mid"), ("sample",), ("sample", 0)]


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
    features = DownBlockEncoder.from_model(model, blocks)(**kwargs)
    features = (features,) if len(blocks) == 1 else features
    seen = hooked(model, kwargs) | {"sample": kwargs["sample"]}
    for block, feature in zip(blocks, features, strict=True):
        key = block if block in ("mid", "sample") else len(model.down_blocks) - 1 if block == "last" else int(block)
        assert torch.equal(feature, seen[key])


def test_storage_is_shared_and_up_blocks_are_gone():
    model = unet()
    encoder, twin = DownBlockEncoder.from_model(model), frozen_twin(model)
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in twin.parameters()} == own
    mine = dict(encoder.named_parameters())
    assert {p.data_ptr() for p in mine.values()} < own
    assert not any(".up_blocks" in name or ".mid_block" in name or ".conv_out" in name for name in mine)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_the_input_and_no_weight(checkpointing):
    model, kwargs = unet(), inputs(False)
    encoder = DownBlockEncoder.from_model(model, ("last", "mid"))
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
    reference, encoder = frozen_twin(model), DownBlockEncoder.from_model(model)
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
        DownBlockEncoder.from_model(unet(), blocks)


def test_features_are_float32_whatever_the_weights():
    model = unet().bfloat16()
    feature = DownBlockEncoder.from_model(model)(**inputs(False))
    assert feature.dtype == torch.float32 and torch.equal(feature, feature.bfloat16().float())


def test_bfloat16_weights_give_an_encoder_of_another_precision_with_a_copy_of_its_part():
    assert precision_of_f(torch.float16, torch.device("cuda")) == torch.float16
    assert precision_of_f(torch.bfloat16, torch.device("cuda")) == torch.float16
    assert precision_of_f(torch.bfloat16, torch.device("cpu")) == torch.float32
    model = unet().bfloat16()
    encoder = DownBlockEncoder.from_model(model, dtype=torch.float16)
    assert {p.dtype for p in encoder.parameters()} == {torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    copied, whole = (sum(p.numel() for p in module.parameters()) for module in (encoder, model))
    assert copied < whole / 2


@pytest.mark.parametrize("weight", [1e-9, 1.0, 1e9])
def test_a_float16_gradient_neither_underflows_nor_overflows(weight):
    # float16 ends at 65504 and at 6e-8; each sample has a scale of its own, so its neighbour's does not matter.
    kwargs = inputs(False)

    def gradient(dtype, weights):
        encoder = DownBlockEncoder.from_model(unet().to(dtype), ("last", 0))
        x = kwargs["sample"].clone().requires_grad_()
        last, first = encoder(**{**kwargs, "sample": x})
        loss = (last.square().flatten(1).mean(1) + first.square().flatten(1).mean(1)) * weights
        return torch.autograd.grad(loss.sum(), x)[0] / weights.view(-1, 1, 1, 1)

    weights = torch.tensor([1.0, weight, 0.5 * weight])
    expected, got = gradient(torch.float32, torch.ones(3)), gradient(torch.float16, weights)
    for a, b in zip(expected, got, strict=True):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999
        assert b.norm() / a.norm() == pytest.approx(1, abs=0.02)


class TestDisplacement:
    target = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    d = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.01
    matrix = torch.randn(5, 256, generator=torch.Generator().manual_seed(2))

    def linear(self, x):
        return x.flatten(1) @ self.matrix.T

    def curved(self, x):  # derivative along d: A d + x * d; even orders are what a one-sided secant keeps
        return self.linear(x) + 0.5 * x.flatten(1)[:, :5] ** 2

    def at(self, f, secant, **options):
        x = (self.target + self.d).requires_grad_()
        moved = Displacement(f, self.target, secant, **options)(x)
        (gradient,) = torch.autograd.grad(moved.square().sum(), x)
        return moved.detach(), gradient

    def test_secant_one_is_the_difference_itself(self):
        x = (self.target + self.d).requires_grad_()
        expected = self.curved(x) - self.curved(self.target)
        (gradient,) = torch.autograd.grad(expected.square().sum(), x)
        moved, got = self.at(self.curved, "1")
        assert torch.equal(moved, expected) and torch.equal(got, gradient)

    @pytest.mark.parametrize("secant", ["1", "16", "auto"])
    def test_any_secant_is_exact_for_linear_features(self, secant):
        moved, gradient = self.at(self.linear, secant)
        expected = self.linear(self.d)
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(gradient.flatten(1), 2 * expected @ self.matrix, rtol=1e-3, atol=1e-3)

    def test_auto_is_equation_13_of_a_quadratic_whatever_the_length(self):
        # f(T + d) - f(T) = A d + T d + d^2 / 2: a central difference about the midpoint T + d / 2 has no other term,
        # and the gradient is taken at T + d itself. One-sided, s d^2 / 2 stands for d^2 / 2.
        exact, gradient = self.at(self.curved, "1")
        for length in (1e-4, 1.0):  # no longer than d, and 100 times as long
            moved, got = self.at(self.curved, "auto", length=length)
            torch.testing.assert_close(moved, exact, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-3)
        one_sided = self.at(self.curved, "100")[0] - exact
        torch.testing.assert_close(one_sided, 49.5 * self.d.flatten(1)[:, :5] ** 2, rtol=0.05, atol=1e-3)

    def test_auto_steps_by_the_length_and_never_shortens(self):
        seen = []

        def watch(x):
            seen.append(x)
            return self.linear(x)

        scale = torch.tensor([0.01, 0.2, 0.0]).view(-1, 1, 1, 1)
        unit = self.d / self.d.square().mean((1, 2, 3), keepdim=True).sqrt()
        x = self.target + scale * unit
        moved = Displacement(watch, self.target, "auto", 0.05)(x)
        ahead, behind = seen
        assert (ahead - behind).square().mean((1, 2, 3)).sqrt().tolist() == pytest.approx([0.05, 0.2, 0], abs=1e-5)
        torch.testing.assert_close((ahead + behind) / 2, (x + self.target) / 2)
        assert moved.isfinite().all() and moved[2].abs().max() == 0  # also where the prediction is exact

    def test_a_chain_keeps_differences_that_rounding_would_drown(self):
        # Policy and reference a thousandth of d apart: in float16, two differences from the target are each rounded by
        # a hundredth of themselves, ten times what they differ by.
        near = self.target + self.d
        far = near + 1e-3 * self.d.roll(1, 0)

        def half(x):
            return torch.sin(x.half().flatten(1) @ self.matrix.half().T / 16).float()

        def exact(x):
            return torch.sin(x.double().flatten(1) @ self.matrix.half().double().T / 16)

        displacement = Displacement(half, self.target, "auto", 0.016)
        b = displacement(near)
        a = displacement(far, near=(near, b))
        truth = exact(far) - exact(near)
        assert ((a - b) - truth).norm() / truth.norm() < 0.2
        assert (displacement(far) - b - truth).norm() / truth.norm() > 1
        assert torch.equal(displacement(near.clone(), near=(near, b)), b)

    def test_several_blocks_give_several_differences(self):
        both = Displacement(lambda x: (self.linear(x), self.curved(x)), self.target)(self.target + self.d)
        assert [b.shape for b in both] == [(3, 5), (3, 5)]
        torch.testing.assert_close(both[0], self.linear(self.d), rtol=1e-3, atol=1e-4)
