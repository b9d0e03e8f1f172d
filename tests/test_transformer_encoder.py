"""SD3's encoder is the transformer's own first blocks: same numbers, same storage, no gradient but to its input."""

import pytest
import torch
from peft import LoraConfig
from pipelines import transformer

from ncp.encoder import TransformerEncoder, frozen_twin
from ncp.training.sd3 import LORA_TARGETS, checkpoint_blocks

# Of eight blocks.
INDEX = {"last": 3, "n/4": 1, "n/2": 3, "3n/4": 5, 0: 0, "7": 7}


def inputs(n: int = 3) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(n, 8, 16, 16, generator=generator),
        "timestep": torch.tensor([0, 500, 1000])[:n],
        "encoder_hidden_states": torch.randn(n, 7, 80, generator=generator),
        "pooled_projections": torch.randn(n, 48, generator=generator),
    }


def run(model, kwargs: dict) -> torch.Tensor:
    return model(kwargs["sample"], **{k: v for k, v in kwargs.items() if k != "sample"}).sample


@pytest.mark.parametrize("blocks", [("last",), ("n/4", "3n/4"), (0, "7"), ("3n/4", "n/2", "n/4")])
def test_output_is_the_transformers_own_activation(blocks):
    model, kwargs = transformer(), inputs()
    seen = {}
    for i, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out[1]))
    run(model, kwargs)
    expected = [seen[INDEX[block]] for block in blocks]
    features = TransformerEncoder.from_model(model, blocks)(**kwargs)
    features = (features,) if len(blocks) == 1 else features
    assert len(features) == len(blocks) and features[0].shape == (3, 64, 32)  # image tokens
    assert all(torch.equal(f, e) for f, e in zip(features, expected, strict=True))


def test_storage_is_shared_and_the_later_blocks_are_gone():
    model = transformer()
    encoder = TransformerEncoder.from_model(model, ("n/2",))
    mine = dict(encoder.named_parameters())
    assert {p.data_ptr() for p in mine.values()} < {p.data_ptr() for p in model.parameters()}
    assert {int(n.split(".")[2]) for n in mine if "transformer_blocks" in n} == {0, 1, 2, 3}
    assert len(model.transformer_blocks) == 8 and model.proj_out is not None
    assert not any("_out." in name and "transformer_blocks" not in name for name in mine)


def test_conditions_repeat_where_there_are_more_samples():
    encoder, kwargs = TransformerEncoder.from_model(transformer(), ("n/4",)), inputs()
    twice = encoder(**{**kwargs, "sample": kwargs["sample"].repeat(2, 1, 1, 1)})
    torch.testing.assert_close(twice, encoder(**kwargs).repeat(2, 1, 1))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_the_input_and_no_weight(checkpointing):
    kwargs, encoder = inputs(), TransformerEncoder.from_model(transformer(), ("n/4", "n/2"))
    if checkpointing:
        encoder.enable_gradient_checkpointing()
    sample = kwargs["sample"].clone().requires_grad_()
    sum(f.square().sum() for f in encoder(**{**kwargs, "sample": sample})).backward()
    assert sample.grad.abs().min(dim=0).values.sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
    if checkpointing:
        plain, other = TransformerEncoder.from_model(transformer(), ("n/4", "n/2")), kwargs["sample"].requires_grad_()
        sum(f.square().sum() for f in plain(**kwargs)).backward()
        torch.testing.assert_close(sample.grad, other.grad)


def test_adapters_change_the_policy_only():
    model, kwargs = transformer(), inputs()
    before = run(model, kwargs)
    reference, encoder = frozen_twin(model), TransformerEncoder.from_model(model)
    feature = encoder(**kwargs)
    for other in (reference, encoder.model):  # the table of positions is large
        assert other.pos_embed.pos_embed.data_ptr() == model.pos_embed.pos_embed.data_ptr()
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=LORA_TARGETS))
    assert not torch.allclose(run(model, kwargs), before)
    assert torch.equal(run(reference, kwargs), before) and torch.equal(encoder(**kwargs), feature)


@pytest.mark.parametrize("blocks", [(), (8,), ("mid",), ("n/3",), (-1,), (3, "last")])
def test_wrong_blocks_are_refused(blocks):
    with pytest.raises(ValueError, match="block"):
        TransformerEncoder.from_model(transformer(), blocks)


@pytest.mark.parametrize(("count", "expected"), [(24, [5, 11, 17]), (38, [8, 18, 27]), (2, [0, 0, 0]), (6, [0, 2, 3])])
def test_taps_are_the_ends_of_a_share_of_the_blocks(count, expected):
    # SD3.5-medium has 24 blocks, -large 38. A share of n blocks ends with block floor(share n), counted from 1.
    assert [TransformerEncoder.tap(b, {"num_layers": count}) for b in ("n/4", "n/2", "3n/4")] == expected


def test_half_precision_gradients_are_right_at_any_scale():
    """In float16 each sample's gradient is scaled on its way, so that it neither vanishes nor overflows."""
    kwargs, model = inputs(), transformer()
    half = TransformerEncoder.from_model(model.to(torch.float16), ("n/2",))
    exact = TransformerEncoder.from_model(transformer(), ("n/2",))
    for factor in (1e-9, 1.0, 1e6):
        found = {}
        for name, encoder in {"half": half, "exact": exact}.items():
            x = kwargs["sample"].clone().requires_grad_()
            (encoder(**{**kwargs, "sample": x}).square().sum() * factor).backward()
            found[name] = x.grad / factor
        assert torch.nn.functional.cosine_similarity(*(v.flatten() for v in found.values()), dim=0) > 0.999


def test_checkpointed_blocks_are_the_named_ones():
    model, kwargs, called = transformer(), inputs(), []
    checkpoint_blocks(model, ["block1", "block6", "encoder"])
    # A block that is recomputed runs twice.
    for i, block in enumerate(model.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, i=i: called.append(i))
    run(model, {**kwargs, "sample": kwargs["sample"].requires_grad_()}).square().sum().backward()
    assert sorted(called) == [0, 1, 1, 2, 3, 4, 5, 6, 6, 7]
