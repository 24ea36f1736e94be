"""The transcription is the official BiFormer, and spends what the official code spends."""

import torch
from oracles import error, load_cases, make_checkpoint, make_input

from densezoo.tools.biformer_transcription import (
    VARIANTS,
    BiFormerTranscription,
    GatheredAttention,
)
from densezoo.tools.step_memory import measure_peak


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
        maps = model.forward_features(make_input(case["input"], case["seed"]).double())
        logits = model.head(model.norm(maps[-1]).mean((2, 3)))
    assert error(case["outputs"]["logits"], logits) < 1e-9
    assert max(map(error, case["outputs"]["stages"], maps)) < 1e-9


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
