"""The transcription is the official PPMA and RMT, and spends what the official code spends."""

import pytest
import torch
from oracles import error, load_cases, make_checkpoint, make_input

from densezoo.tools.ppma_transcription import (
    VARIANTS,
    DecayedAttention,
    PPMATranscription,
    mask_lines,
    mask_paths,
)
from densezoo.tools.step_memory import measure_peak, measure_saved


@pytest.mark.parametrize("variant", ["ppma_tiny", "rmt_tiny"])
def test_official_weights_give_the_official_outputs(variant):
    case_file, case = next(
        (case_file, case)
        for case_file, case in load_cases().values()
        if case_file["variant"] == variant and case["mode"] == "classification"
    )
    model = PPMATranscription(**VARIANTS[variant]).double().eval()
    model.load_state_dict(make_checkpoint(case_file, case)[case_file["nest"]])
    with torch.no_grad():
        maps = model.forward_features(make_input(case["input"], case["seed"]).double())
        x = model.proj(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        logits = model.head(torch.nn.functional.silu(model.norm(x)).mean((2, 3)))
    assert error(case["outputs"]["logits"], logits) < 1e-9
    assert max(map(error, case["outputs"]["stages"], maps)) < 1e-9


def test_masks_walk_from_the_query_along_its_row_and_then_along_the_column():
    generator = torch.Generator().manual_seed(0)
    alpha, beta = -torch.rand(2, 3, 4, generator=generator)
    rows, columns = mask_lines(alpha[None, None]), mask_lines(beta.T[None, None])
    found = mask_paths(rows, columns)[0, 0].reshape(3, 4, 3, 4)
    for query, key in torch.cartesian_prod(torch.arange(12), torch.arange(12)).tolist():
        (i, j), (k, m) = divmod(query, 4), divmod(key, 4)
        along_row = sum(alpha[i, t] for t in range(min(j, m) + 1, max(j, m) + 1))
        along_column = sum(beta[t, m] for t in range(min(i, k) + 1, max(i, k) + 1))
        assert float(found[i, j, k, m]) == pytest.approx(float(along_row + along_column), abs=1e-6)


def make_inputs(form, size, heads=2, head_dim=8):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 1, *size, heads, head_dim, generator=generator)
    decays = -torch.rand(2, 1, *size, heads, generator=generator)
    inputs = *qkv.unbind(), *decays.unbind()
    return DecayedAttention(form, "both"), [x.requires_grad_() for x in inputs]


def test_masks_of_all_pairs_are_held_five_at_a_time():
    attend, inputs = make_inputs("full", (12, 16))
    with torch.no_grad():
        memory = measure_peak(lambda: attend(*inputs), torch.device("cpu"))
    assert 5 < memory / (2 * (12 * 16) ** 2 * 4 / 2**20) < 5.5


def test_attention_keeps_three_weights_of_all_pairs_for_backward():
    attend, inputs = make_inputs("full", (12, 16))
    attend.register_forward_pre_hook(lambda module, args: (*args[0],))
    pairs = 2 * (12 * 16) ** 2 * 4
    saved = measure_saved(attend, inputs) * 2**20
    # Both softmaxes and their mean; beside them triangles of truths, and maps.
    assert 3 * pairs < saved < 3.3 * pairs
