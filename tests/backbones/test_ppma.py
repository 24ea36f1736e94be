"""What PPMA and RMT alone have: any size, their files, their sizes and beginnings.

Any size and gradients are those of `densezoo.tools.ppma_transcription`, which is held to the
official outputs by its own tests and shares no code of the models but the angles of the rotation.
"""

import logging

import pytest
import timm
import torch
from oracles import (
    dense,
    gradient_error,
    image,
    load_cases,
    make_checkpoint,
    make_state_dict,
    relative_error,
)
from torch import nn
from torch.nn import functional as F

from densezoo.backbones import PPMA, RMT
from densezoo.layers.depthwise import ResidualDepthwise
from densezoo.tools.ppma_transcription import PPMATranscription

# A model of one block a stage and few channels, with every form, head widths of published models
# and others, and factors in two stages.
SMALL = dict(
    depths=(1, 1, 1, 1),
    dims=(16, 32, 64, 48),
    num_heads=(2, 2, 2, 1),
    form=("axial", "axial", "full", "full"),
    mlp_ratio=(2, 3, 1, 1.5),
    layer_scale=(None, None, 1e-6, 1e-6),
)
DESIGNS = {"ppma_tiny": {}, "rmt_tiny": dict(decay_range=(4, 4, 6, 6))}
every_design = pytest.mark.parametrize("name", DESIGNS)


def transcription(name, seed=0):
    """The authors' small model of a design, every entry noise."""
    model = PPMATranscription(**SMALL, **DESIGNS[name], num_classes=10)
    keys = [
        (key, tuple(value.shape), "counter" if key.endswith("tracked") else "param")
        for key, value in model.state_dict().items()
    ]
    model.load_state_dict(make_state_dict(keys, seed))
    return model.eval()


def saved(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    return str(tmp_path / "checkpoint.pth")


def create(path, name, **arguments):
    arguments = {**SMALL, "num_classes": 10, **arguments}
    overlay = dict(file=path)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


# Any size


SIZES = [(64, 96), (97, 131), (33, 150), (15, 70), (1, 40), (1, 1)]


@every_design
def test_every_size_gives_what_the_authors_model_does(name, tmp_path):
    official = transcription(name)
    model = create(saved(tmp_path, {"models": official.state_dict()}), name).eval()
    for dtype, bound in ((torch.float32, 1e-3), (torch.float64, 1e-10)):
        official.double(), model.to(dtype)
        for i, size in enumerate(SIZES):
            x = image(*size, batch=1 + i % 2).double()
            with torch.no_grad():
                expected = [*official.forward_features(x), official(x)]
                maps = model.forward_intermediates(x.to(dtype), intermediates_only=True)
                for one, two in zip([*maps, model(x.to(dtype))], expected, strict=True):
                    assert relative_error(one, two) < bound, size


@every_design
def test_gradients_of_an_odd_map_are_those_of_the_authors_model(name, tmp_path):
    official = transcription(name).double()
    path = saved(tmp_path, {"models": official.state_dict()})
    model = create(path, name).double().eval()
    x = image(70, 41, batch=2).double()
    for one in (official, model):
        one(x).square().sum().backward()
    # A checkpoint whose weights are the gradients.
    grads = {k: p.grad for k, p in official.named_parameters()}
    file = {k: grads.get(k, v) for k, v in official.state_dict().items()}
    expected = create(saved(tmp_path, {"models": file}), name).double()
    pairs = list(zip(model.parameters(), expected.parameters(), strict=True))
    assert len(pairs) == len(grads)
    # The file's numbers are loaded in float32.
    assert gradient_error([p.grad for p, _ in pairs], [e.detach() for _, e in pairs]) < 1e-5


def test_residual_convolutions_add_their_input_whatever_runs_them():
    torch.manual_seed(0)
    conv = ResidualDepthwise(6)
    x = image(5, 7, chans=6, batch=2).permute(0, 2, 3, 1)
    expected = x + F.conv2d(
        x.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1, groups=6
    ).permute(0, 2, 3, 1)
    with torch.no_grad():
        assert relative_error(conv(x), expected) < 1e-5
    assert relative_error(conv(x), expected) < 1e-5


# Files


@every_design
def test_averaged_weights_are_taken_where_a_file_has_both_and_it_says_so(name, tmp_path, caplog):
    raw, average = (transcription(name, seed).state_dict() for seed in (0, 1))
    entry = "layers.3.blocks.0.retention.out_proj.weight"

    def loaded(checkpoint):
        path = saved(tmp_path, {"epoch": 299, "optimizer": {"state": {}}, **checkpoint})
        models = [
            create(path, name),
            dense(name, pretrained=path, model_kwargs=SMALL).model.model,
        ]
        return [model.stages[3].blocks[0].attn.proj.weight for model in models]

    for nest in ("models", "model"):
        for parts in ({nest: raw, "model_ema": average}, {"model_ema": average, nest: raw}):
            caplog.clear()
            with caplog.at_level(logging.INFO, "densezoo"):
                assert all(torch.equal(weight, average[entry]) for weight in loaded(parts))
            assert f"weights are those of 'model_ema'; the file has {nest} too" in caplog.text
    for nest in ("models", "model", "state_dict"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "densezoo"):
            assert all(torch.equal(weight, raw[entry]) for weight in loaded({nest: raw}))
        assert "the file has" not in caplog.text
    path = saved(tmp_path, raw)
    assert torch.equal(create(path, name).stages[3].blocks[0].attn.proj.weight, raw[entry])


@every_design
def test_what_files_hold_of_positions_is_ignored(name, tmp_path, caplog):
    state = transcription(name).state_dict()
    for i, (dim, heads) in enumerate(zip(SMALL["dims"], SMALL["num_heads"], strict=True)):
        state[f"layers.{i}.Relpos.angle"] = torch.ones(dim // heads)
        if name == "rmt_tiny":
            state[f"layers.{i}.Relpos.decay"] = torch.ones(heads)
    with caplog.at_level(logging.INFO, "densezoo"):
        model = create(saved(tmp_path, {"model": state}), name)
    assert "0 missing; 0 unexpected; 0 reshaped" in caplog.text
    entries = sum(".Relpos." not in key for key in state)
    assert len(model.state_dict()) == entries
    assert f"{entries} entries loaded (official keys)" in caplog.text


@pytest.mark.parametrize("name, other", [tuple(DESIGNS), tuple(DESIGNS)[::-1]], ids=str)
def test_files_of_the_two_designs_are_not_taken_for_each_other(name, other, tmp_path):
    official = {"models": transcription(other).state_dict()}
    ours = timm.create_model(other, **SMALL, num_classes=10).state_dict()
    for checkpoint in (official, ours):
        with pytest.raises(ValueError, match=f"{name}: the checkpoint is of a model with .*decays"):
            create(saved(tmp_path, checkpoint), name)


@every_design
def test_what_a_model_saves_it_loads(name, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL, num_classes=10)
    again = create(saved(tmp_path, model.state_dict()), name)
    x = image(40, 56)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))


def test_a_detectors_norms_are_loaded_beside_its_trunk(tmp_path, caplog):
    case_file, _ = next(c for c in load_cases().values() if c[0]["variant"] == "ppma_tiny")
    case = dict(seed=3)
    state = make_checkpoint(case_file, case)["models"]
    state = {k: v for k, v in state.items() if not k.startswith(("proj.", "norm.", "head."))}
    norms = {f"outnorm{i}.weight": torch.full((64 * 2**i,), i + 2.0) for i in range(4)}
    norms |= {f"outnorm{i}.bias": torch.full((64 * 2**i,), i + 0.5) for i in range(4)}
    file = {"state_dict": {f"backbone.{k}": v for k, v in (state | norms).items()}}
    with caplog.at_level(logging.INFO, "densezoo"):
        model = dense("ppma_tiny", out_norms=True, pretrained=saved(tmp_path, file))
    assert "8 of 8 entries of out_norms loaded" in caplog.text
    assert "0 unexpected; 0 reshaped" in caplog.text
    assert {norm.eps for norm in model.out_norms.values()} == {1e-5}
    x = image(40, 72)
    with torch.no_grad():
        maps, normed = model.model.eval()(x), model.eval()(x)
    for i, (before, after) in enumerate(zip(maps, normed, strict=True)):
        expected = F.layer_norm(before.permute(0, 2, 3, 1), before.shape[1:2], eps=1e-5)
        expected = (expected * (i + 2) + i + 0.5).permute(0, 3, 1, 2)
        assert relative_error(after, expected) < 1e-5


def test_without_a_file_it_says_whether_there_is_one():
    weights = timm.create_model("ppma_base", device="meta").pretrained_cfg
    assert weights["url"].endswith("classification/PPMA_B_202504101400/best.pth")
    with pytest.raises(ValueError, match="no weights of rmt_base are published: .*file='FILE'"):
        timm.create_model("rmt_base", pretrained=True)


# Sizes, beginnings, arguments


@pytest.mark.parametrize(
    "name, params, heads, ranges",
    [
        ("ppma_tiny", 14_335_272, (4, 4, 8, 16), None),
        ("ppma_small", 26_969_472, (4, 4, 8, 16), None),
        ("ppma_base", 54_158_524, (5, 5, 10, 16), None),
        ("rmt_tiny", 14_334_216, (4, 4, 8, 16), (4, 4, 6, 6)),
        ("rmt_small", 26_967_240, (4, 4, 8, 16), (4, 4, 6, 6)),
        ("rmt_base", 54_154_896, (5, 5, 10, 16), (5, 5, 6, 6)),
        ("rmt_large", 95_464_864, (7, 7, 14, 20), (6, 6, 6, 6)),
    ],
)
def test_variants_are_those_of_the_authors_models(name, params, heads, ranges):
    """What no parameter tells, too: forms, and of RMT heads and decays."""
    model = timm.create_model(name, device="meta")
    assert isinstance(model, PPMA) and isinstance(model, RMT) == name.startswith("rmt")
    assert sum(p.numel() for p in model.parameters()) == params
    forms = ["axial", "axial", "full" if "tiny" in name else "axial", "full"]
    for i, stage in enumerate(model.stages):
        for attn in (block.attn for block in stage.blocks):
            assert (attn.form, attn.num_heads) == (forms[i], heads[i])
            assert attn.paths == ("both" if ranges is None else "row_first")
            assert getattr(attn.decays, "decay_range", None) == (ranges and ranges[i])


def test_layers_begin_as_published():
    torch.manual_seed(0)
    model = timm.create_model("ppma_base", depths=(1, 1, 1, 1))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name == "norm.proj.conv":
            assert float(module.weight.std()) == pytest.approx(0.02, rel=0.15), name
            assert module.bias is None or not module.bias.any()
    for i, stage in enumerate(model.stages):
        for gamma in (stage.blocks[0].gamma1, stage.blocks[0].gamma2):
            assert gamma is None if i < 2 else (gamma == 1e-6).all()
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 8 and {norm.eps for norm in norms} == {1e-6}


def test_forms_ratios_factors_and_ranges_are_of_all_stages_or_of_each():
    arguments = dict(depths=(1, 1, 1, 1), dims=(16, 16, 16, 16), num_heads=(2, 1, 2, 1))
    with torch.device("meta"):
        model = PPMA(**arguments, form="full", mlp_ratio=2, layer_scale=0.5, decay_range=3.0)
        blocks = [stage.blocks[0] for stage in model.stages]
        assert {block.attn.form for block in blocks} == {"full"}
        assert {block.mlp.fc1.out_features for block in blocks} == {32}
        assert {block.attn.decays.decay_range for block in blocks} == {3.0}
        assert all(block.gamma1 is not None for block in blocks)
        model = PPMA(**arguments, mlp_ratio=(1, 2, 3, 4))
        hidden = [stage.blocks[0].mlp.fc1.out_features for stage in model.stages]
        assert hidden == [16, 32, 48, 64]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_heads=(4, 4, 8)), r"num_heads is \(4, 4, 8\): four whole numbers"),
        (dict(num_heads=(4, 4, 8, 0)), "num_heads is"),
        (dict(num_heads=(3, 4, 8, 16)), r"num_heads is \(3, .* divisors of dims"),
        (dict(num_heads=(64, 4, 8, 16)), "give heads even numbers of channels"),
        (dict(form=("axial", "full")), r"form is \('axial', 'full'\): one value, or four"),
        (dict(form="rows"), "form is 'rows': one of full, axial is taken"),
        (dict(paths="one"), "paths is 'one'"),
        (dict(mlp_ratio=0), "mlp_ratio is 0"),
        (dict(mlp_ratio=(3, 3, 3, "3")), "mlp_ratio is '3'"),
        (dict(layer_scale=-1), "layer_scale is -1"),
        (dict(decay_range=(1, 2, 3)), r"decay_range is \(1, 2, 3\): one value, or four"),
        (dict(decay_range=-2), "decay_range is -2"),
        (dict(dims=(1, 64, 96, 128)), r"dims\[0\] is 1"),
        (dict(drop_rate=2), "drop_rate is 2"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("ppma_tiny", device="meta", **arguments)
