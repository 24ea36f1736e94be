"""A transcription has the weights, the outputs and the gradients of its model."""

import pytest
import timm
import torch
from oracles import relative_error

from densezoo.tools.transcriptions import TRANSCRIPTIONS, StageMaps, transcribe

SHALLOW = dict(depths=(1, 1, 1, 1))
NARROW = dict(SHALLOW, dims=(32, 64, 96, 128))
SMALL = {
    "biformer_small": dict(NARROW, num_regions=5, topk=(1, 4, 16)),
    "ppma_base": dict(SHALLOW, dims=(32, 32, 64, 64), num_heads=(1, 2, 2, 4)),
    "ppma_tiny": dict(SHALLOW, dims=(16, 16, 32, 64), num_heads=(2, 2, 2, 4)),
    "rmt_tiny": dict(SHALLOW, dims=(32, 32, 64, 64), num_heads=(2, 2, 4, 4)),
}


def randomise(model):
    """Give layer scales, which start at almost 0, and all else weights that are seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or 1 in parameter.shape:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.mark.parametrize("name", SMALL)
def test_a_transcribed_model_has_its_models_outputs_and_gradients(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL[name]).eval()
    randomise(model)
    transcription = transcribe(name, model, SMALL[name]).double().eval()
    model.double()
    images = torch.randn(2, 3, 70, 100, dtype=torch.float64, requires_grad=True)
    found, wanted = transcription(images), model(images)
    assert relative_error(found, wanted) < 1e-12
    grads = [torch.autograd.grad(out.square().sum(), images)[0] for out in (found, wanted)]
    assert relative_error(*grads) < 1e-12
    assert sum(p.numel() for p in transcription.parameters()) == sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize("name", ["biformer_small", "ppma_tiny"])
def test_stage_maps_are_the_models_without_parameters_of_its_head(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL[name]).eval()
    maps = StageMaps(transcribe(name, model, SMALL[name])).eval()
    features = timm.create_model(name, features_only=True, **SMALL[name])
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        wanted = model.forward_intermediates(images, intermediates_only=True)
        for a, b in zip(maps(images), wanted, strict=True):
            assert relative_error(a, b) < 1e-4
    counts = [sum(p.numel() for p in module.parameters()) for module in (maps, features)]
    assert counts[0] == counts[1]


def test_every_size_of_the_families_is_there():
    names = [name for name in timm.list_models() if name.startswith(("ppma_", "rmt_"))]
    assert len(names) == 7 and set(names) < set(TRANSCRIPTIONS)


@pytest.mark.parametrize("name", ["biformer_tiny", "ppma_tiny"])
def test_arguments_that_a_transcription_has_not_are_named(name):
    with pytest.raises(ValueError, match=f"{name} cannot be built with .*qkv_bias"):
        transcribe(name, timm.create_model(name, depths=(1, 1, 1, 1)), dict(qkv_bias=False))
