"""What CAS-ViT alone has: its initialisation, its two heads, its exploding random weights."""

import pytest
import timm
import torch
from torch import nn

import densezoo  # noqa: F401


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("cas_vit_xs")


def test_linear_layers_start_truncated_normal_and_convolutions_as_in_pytorch(model):
    for linear in (model.head.fc.main, model.head.fc.dist):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert not linear.bias.any()
    conv = model.stages[0].blocks[0].mlp.fc1
    bound = 1 / conv.in_channels**0.5  # kaiming_uniform_(a=sqrt(5)) of a 1x1 convolution
    assert conv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert conv.bias.abs().max().item() == pytest.approx(bound, rel=0.02)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert (norm.weight == 1).all() and not norm.bias.any()
            assert (norm.eps, norm.momentum) == (1e-5, 0.1)


def test_the_pair_of_logits_comes_in_training_when_asked_for(model):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model.train()
    try:
        assert model(x).shape == (2, 1000)
        model.set_distilled_training(True)
        main, dist = model(x)
        assert main.shape == dist.shape == (2, 1000) and not torch.equal(main, dist)
        assert model.eval()(x).shape == (2, 1000)
    finally:
        model.set_distilled_training(False)


def test_one_head_cannot_give_a_pair():
    model = timm.create_model("cas_vit_xs", distillation=False)
    with pytest.raises(ValueError, match="distillation=True"):
        model.set_distilled_training()


def test_stochastic_depth_drops_mixer_and_mlp_but_never_the_local_branch():
    torch.manual_seed(0)
    block = timm.create_model("cas_vit_xs", drop_path_rate=1.0).stages[3].blocks[-1].train()
    x = torch.randn(1, 220, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x + block.local(x))


@pytest.mark.parametrize("bad", [torch.zeros(3, 64, 64), torch.zeros(1, 3, 0, 64)])
def test_bad_image_batches_are_named(model, bad):
    with pytest.raises(ValueError, match=r"image batch has shape .*\(B, 3, H, W\)"):
        model(bad)


def test_integer_images_are_named(model):
    with pytest.raises(ValueError, match="uint8"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
