"""The memory of steps, counted by hand."""

import pytest
import timm
import torch

from densezoo.tools.step_memory import measure_peak, measure_saved
from densezoo.tools.transcriptions import transcribe

# Grids of 16x16, 8x8 and 4x4 tokens, all divided by the regions.
ARGUMENTS = dict(depths=(1, 1, 1, 1), dims=(32, 64, 96, 128), num_regions=4, topk=(1, 4, 16))
STAGES = [(256, 32, 1), (64, 64, 4), (16, 96, 16)]  # tokens, channels, regions kept of 16


def test_memory_is_the_peak_of_a_step_above_what_was_there():
    kept = torch.ones(1000, 1000)

    def step():
        doubled = kept * 2
        tripled = doubled + kept
        del doubled
        return tripled * 0

    memory = measure_peak(step, torch.device("cpu"))
    assert memory == pytest.approx(2 * kept.nbytes / 2**20, rel=1e-3)


def test_operators_save_their_inputs_output_routes_and_denominators_alone():
    model = timm.create_model("biformer_tiny", **ARGUMENTS)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    num_bytes = 0
    for tokens, channels, topk in STAGES:
        heads = channels // 32
        num_bytes += 2 * (4 * tokens * (4 * channels + heads) + 8 * 16 * topk)
    assert measure_saved(model, images) == num_bytes / 2**20


def test_polyline_attention_saves_its_inputs_output_and_denominators_alone():
    arguments = dict(depths=(1, 1, 1, 1), dims=(32, 32, 64, 64), num_heads=(2, 2, 4, 4))
    model = timm.create_model("ppma_tiny", **arguments)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    num_values = 0
    for tokens, channels, heads in [(384, 32, 2), (96, 32, 2), (24, 64, 4), (6, 64, 4)]:
        # Query, key, value and output; two decays and two denominators.
        num_values += 2 * tokens * (4 * channels + 4 * heads)
    assert measure_saved(model, images) == 4 * num_values / 2**20


def test_transcriptions_save_kept_keys_and_values_and_attention_weights():
    model = timm.create_model("biformer_tiny", **ARGUMENTS)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    transcription = transcribe("biformer_tiny", model, ARGUMENTS)
    num_bytes = 0
    for tokens, channels, topk in STAGES:
        # Projections, scaled queries, kept keys and values; weights of each query's keys; routes.
        num_values = tokens * (3 + 1 + 2 * topk) * channels
        num_values += tokens * channels // 32 * topk * tokens // 16
        num_bytes += 2 * (4 * num_values + 8 * 16 * topk)
    assert measure_saved(transcription, images) == pytest.approx(num_bytes / 2**20, rel=1e-4)


def test_models_without_such_operators_save_nothing_of_the_kind():
    assert measure_saved(timm.create_model("resnet18"), torch.randn(2, 3, 32, 32)) is None
