"""The transcription is the official BiFormer, and spends what the official code spends."""

import pytest
import timm
import torch
from oracles import error, load_cases, make_checkpoint, make_input, relative_error

from densezoo.tools.biformer_transcription import (
    VARIANTS,
    BiFormerTranscription,
    GatheredAttention,
    StageMaps,
    transcribe,
)
from densezoo.tools.step_memory import measure_peak

SMALL = dict(depths=(1, 1, 1, 1), dims=(32, 64, 96, 128), num_regions=5, topk=(1, 4, 16))


def test_official_weights_give_the_official_outputs_on_a_padded_image():
    cases = load_cases().values()
    case_file, case = next(
        (case_file, case)
        for case_file, case in cases
        if case_file["variant"] == "biformer_tiny" and case["input"] == [1, 3, 232, 264]
    )
    model = BiFormerTranscription(**VARIANTS["biformer_tiny"]).double().eval()
    model.load_state_dict(make_checkpoint(case_file, case)["model"])
    with torch.no_grad():
        maps = StageMaps(model)(make_input(case["input"], case["seed"]).double())
        logits = model.head(model.norm(maps[-1]).mean((2, 3)))
    assert error(case["outputs"]["logits"], logits) < 1e-9
    assert max(map(error, case["outputs"]["stages"], maps)) < 1e-9


def test_a_transcribed_model_has_its_models_outputs_and_gradients():
    torch.manual_seed(0)
    model = timm.create_model("biformer_small", **SMALL).double().eval()
    transcription = transcribe("biformer_small", model, SMALL).double().eval()
    images = torch.randn(2, 3, 70, 100, dtype=torch.float64, requires_grad=True)
    found, wanted = transcription(images), model(images)
    assert relative_error(found, wanted) < 1e-12
    grads = [torch.autograd.grad(out.square().sum(), images)[0] for out in (found, wanted)]
    assert relative_error(*grads) < 1e-12
    assert sum(p.numel() for p in transcription.parameters()) == sum(
        p.numel() for p in model.parameters()
    )


def test_the_gradient_of_keys_and_values_is_allocated_for_every_region():
    attend = GatheredAttention(2, 0.1)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 64, 4, 32, generator=generator, requires_grad=True)
    key_value = torch.randn(1, 64, 4, 64, generator=generator, requires_grad=True)
    routes = torch.randint(64, (1, 64, 2), generator=generator)
    out = attend(query, key_value, routes)
    memory = measure_peak(lambda: out.sum().backward(retain_graph=True), out.device)
    expanded = 64 * key_value.nbytes / 2**20
    assert expanded < memory < 1.5 * expanded


def test_arguments_that_a_transcription_has_not_are_named():
    with pytest.raises(ValueError, match="biformer_tiny cannot be built with .*mlp_ratio"):
        transcribe("biformer_tiny", timm.create_model("biformer_tiny"), dict(mlp_ratio=2))
