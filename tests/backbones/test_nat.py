"""What NAT, DiNAT and DiNAT_s alone have: dilations, kernel sizes, initialisation, layouts."""

import logging
import re

import pytest
import timm
import torch
from mmengine.registry import MODELS
from oracles import (
    image,
    in_transformers_layout,
    load_cases,
    make_checkpoint,
    make_input,
    relative_error,
)
from torch import nn

from densezoo.backbones import NAT, DiNATS, fitting_dilations
from densezoo.layers.neighborhood_attention import NeighborhoodAttention
from densezoo.layers.rel_pos import resize_rel_pos_bias

MINI = (3, 4, 6, 5)
CASES = load_cases()


def dilations_of(name, **arguments):
    """Dilations of the blocks that a model is made of, by stage."""
    model = timm.create_model(name, device="meta", **arguments)
    built = tuple(tuple(b.attn.dilation for b in stage.blocks) for stage in model.stages)
    assert model.dilations == built
    return built


def create(path, name, **arguments):
    overlay = dict(file=str(path))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


# Dilations


def test_nat_is_not_dilated_and_the_classifiers_dilations_follow_the_depth():
    assert dilations_of("nat_mini") == ((1,) * 3, (1,) * 4, (1,) * 6, (1,) * 5)
    assert dilations_of("dinat_mini") == (
        (1, 8, 1), (1, 4, 1, 4), (1, 2, 1, 2, 1, 2), (1,) * 5,
    )  # fmt: skip
    assert dilations_of("dinat_tiny")[2] == (1, 2) * 9
    assert dilations_of("dinat_mini", depths=(1, 1, 1, 1)) == ((1,),) * 4
    assert dilations_of("dinat_s_tiny") == ((1, 8), (1, 4), (1, 2, 1, 2, 1, 2), (1, 1))
    for name in ("dinat_large_384", "dinat_s_large_384"):
        assert [stage[:2] for stage in dilations_of(name)] == [(1, 13), (1, 6), (1, 3), (1, 1)]
    assert dilations_of("dinat_large_384_11x11") == dilations_of("dinat_large")


@pytest.mark.parametrize(
    "name, preset, expected",
    [
        ("dinat_mini", "coco", ((1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3, 1, 3, 1))),
        ("dinat_mini", "ade20k", ((1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2, 1, 2, 1))),
        ("dinat_s_tiny", "coco", ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3))),
        ("dinat_s_tiny", "ade20k", ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2))),
        (
            "dinat_large",
            "ade20k_640",
            (
                (1, 20, 1), (1, 5, 1, 10),
                (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5), (1, 2, 1, 2, 1),
            ),
        ),
        (
            "dinat_large",
            "mask2former",
            (
                (1, 14, 1), (1, 4, 1, 7),
                (1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 3), (1,) * 5,
            ),
        ),
    ],
)  # fmt: skip
def test_named_dilations_are_those_of_the_published_recipes(name, preset, expected):
    assert dilations_of(name, dilations=preset) == expected
    nested = [list(stage) for stage in expected]
    assert dilations_of(name, dilations=nested) == expected


def test_fitting_dilations_are_the_largest_that_fit_the_shorter_side():
    assert fitting_dilations(224, MINI) == dilations_of("dinat_mini")
    assert fitting_dilations((384, 500), MINI)[0] == (1, 13, 1)
    assert fitting_dilations((800, 1333), MINI)[:3] == (
        (1, 28, 1), (1, 14, 1, 14), (1, 7, 1, 7, 1, 7),
    )  # fmt: skip
    assert fitting_dilations(640, MINI, 11)[0] == (1, 14, 1)
    assert fitting_dilations(32, MINI) == ((1,) * 3, (1,) * 4, (1,) * 6, (1,) * 5)
    fit = dilations_of("dinat_mini", dilations="fit:640x800", kernel_size=11)
    assert fit == fitting_dilations((640, 800), MINI, 11)
    for stage, stride in zip(fit, (4, 8, 16, 32), strict=True):
        assert max(stage) == 1 or 11 * max(stage) <= 640 // stride < 11 * (max(stage) + 1)


@pytest.mark.parametrize(
    "dilations",
    ["cityscapes", "fit:640", "fit:0x0", "", 0, -1, 1.5, True, [1, 2, 1, 2], [[1, 0, 1]]],
    ids=str,
)
def test_bad_dilations_are_named(dilations):
    named = re.escape(f"dilations is {dilations!r}: a whole number")
    with pytest.raises(ValueError, match=f"{named}|image_size is 0"):
        timm.create_model("dinat_mini", device="meta", dilations=dilations)


@pytest.mark.parametrize("size", [None, 224.5, "224", (), (224,), (1, 2, 3), (224, 0)], ids=str)
def test_bad_image_sizes_to_fit_are_named(size):
    with pytest.raises(ValueError, match="image_size is"):
        fitting_dilations(size, MINI)


def test_dilations_for_another_number_of_blocks_are_named():
    with pytest.raises(ValueError, match=r"each block of depths \(1, 1, 2, 1\)"):
        timm.create_model(
            "dinat_mini", device="meta", depths=(1, 1, 2, 1), dilations=[[1], [1], [1], [1]]
        )
    with pytest.raises(ValueError, match='dilations is .mask2former.*"ade20k_640", "fit:HxW"'):
        timm.create_model("dinat_s_tiny", device="meta", dilations="mask2former")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(kernel_size=6), "kernel_size is 6: an odd"),
        (dict(head_dim=24), r"head_dim is 24: a divisor of all of dims \(64"),
        (dict(head_dim=0), "head_dim is 0"),
        (dict(mlp_ratio=0), "mlp_ratio is 0"),
        (dict(layer_scale=-1), "layer_scale is -1"),
    ],
    ids=str,
)
def test_other_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("nat_mini", device="meta", **arguments)


# What the models are made of


def test_nat_and_dinat_differ_in_dilations_alone():
    torch.manual_seed(0)
    nat = timm.create_model("nat_mini", depths=(1, 1, 2, 1)).eval()
    dinat = timm.create_model("dinat_mini", depths=(1, 1, 2, 1), dilations=1).eval()
    dinat.load_state_dict(nat.state_dict())
    x = image(64, 96)
    with torch.no_grad():
        assert torch.equal(dinat(x), nat(x))


def test_parts_start_as_published():
    torch.manual_seed(0)
    model = timm.create_model("nat_small", depths=(1, 1, 1, 1), dilations=1)
    block = model.stages[2].blocks[0]
    assert all((gamma == 1e-5).all() for gamma in (block.gamma1, block.gamma2))
    table = block.attn.rel_pos_bias
    assert table.shape == (12, 13, 13)
    for weight in (table, block.attn.qkv.weight, block.mlp.fc1.weight, model.head.fc.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not block.attn.qkv.bias.any() and not model.head.fc.bias.any()
    conv = model.stages[1].downsample.reduction
    bound = (9 * conv.in_channels) ** -0.5  # of kaiming_uniform_(a=sqrt(5))
    assert conv.bias is None
    assert conv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 1 + 3 + 1 + 2 * 4 and {m.eps for m in norms} == {1e-5}


@pytest.mark.parametrize("name, has_scale", [("nat_small", True), ("dinat_small", False)])
def test_small_has_layer_scale_in_nat_alone(name, has_scale):
    model = timm.create_model(name, device="meta")
    assert any("gamma" in n for n, _ in model.named_parameters()) is has_scale


def test_layer_scale_multiplies_both_branches():
    torch.manual_seed(0)
    model = timm.create_model("nat_small", depths=(1, 1, 1, 1)).eval()
    block = model.stages[3].blocks[0]
    x = image(5, 7, chans=768).permute(0, 2, 3, 1)
    nn.init.uniform_(block.gamma1)
    nn.init.uniform_(block.gamma2)
    with torch.no_grad():
        middle = x + block.gamma1 * block.attn(block.norm1(x))
        expected = middle + block.gamma2 * block.mlp(block.norm2(middle))
        assert relative_error(block(x), expected) < 1e-5


def test_maps_keep_channels_last_memory_between_stages():
    model = timm.create_model("dinat_mini", depths=(1, 1, 1, 1)).eval()
    seen = []
    for part in (model.stem, *model.stages):
        part.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(image(64, 96))
    model(image(64, 96))
    assert len(seen) == 10
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in seen)


# Checkpoints


@pytest.mark.parametrize("kernel_size", [5, 11])
def test_tables_of_another_kernel_size_are_resized_and_said_to_be(kernel_size, tmp_path, caplog):
    torch.manual_seed(0)
    small = dict(depths=(1, 1, 2, 1))
    given = timm.create_model("dinat_mini", **small)
    torch.save(given.state_dict(), tmp_path / "weights.pth")
    with caplog.at_level(logging.INFO, "densezoo"):
        model = create(tmp_path / "weights.pth", "dinat_mini", kernel_size=kernel_size, **small)
    (message,) = [r for r in caplog.records if r.name.startswith("densezoo")]
    assert message.levelno == logging.WARNING
    assert (
        "5 tables of relative position bias from kernel_size 7 to "
        f"{kernel_size} by bicubic interpolation" in message.getMessage()
    )
    size = (2 * kernel_size - 1,) * 2
    for key, value in model.state_dict().items():
        expected = given.state_dict()[key]
        if key.endswith("rel_pos_bias"):
            centre = value[:, kernel_size - 1, kernel_size - 1]
            assert torch.allclose(centre, expected[:, 6, 6], atol=1e-6)
            expected = resize_rel_pos_bias(expected, size)
        assert torch.equal(value, expected), key
    assert {m.kernel_size for m in model.modules() if isinstance(m, NeighborhoodAttention)} == {
        kernel_size
    }


@pytest.mark.parametrize("name", ["nat_mini", "dinat_mini"])
def test_files_of_transformers_give_the_outputs_of_official_ones(name, tmp_path, caplog):
    case_file, case = CASES[f"{name}-classification-224x224-0"]
    official = make_checkpoint(case_file, case)
    prefix = "nat." if name == "nat_mini" else "dinat."
    torch.save(official, tmp_path / "official.pth")
    torch.save(in_transformers_layout(official, MINI, prefix), tmp_path / "transformers.pth")
    expected = create(tmp_path / "official.pth", name).eval()
    with caplog.at_level(logging.INFO, "densezoo"):
        model = create(tmp_path / "transformers.pth", name).eval()
    assert "253 entries loaded (transformers keys); 0 missing; 0 unexpected" in caplog.text
    x = make_input([1, 3, 64, 96])
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))


def test_layer_scales_of_transformers_are_attentions_then_the_mlps(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("nat_small", depths=(1, 1, 1, 1))
    generator = torch.Generator().manual_seed(0)
    official = {}
    for key, value in model.state_dict().items():
        if "gamma" in key:
            value = torch.rand(value.shape, generator=generator)
        key = key.replace("stem.conv1", "patch_embed.proj.0")
        key = key.replace("stem.conv2", "patch_embed.proj.1").replace("stem.", "patch_embed.")
        key = key.replace("rel_pos_bias", "rpb").replace("head.fc.", "head.")
        for i in (1, 2, 3):
            key = key.replace(f"stages.{i}.downsample", f"levels.{i - 1}.downsample")
        official[key.replace("stages.", "levels.")] = value
    layout = in_transformers_layout(official, (1, 1, 1, 1))
    assert layout["nat.encoder.levels.0.layers.0.layer_scale_parameters"].shape == (2, 96)
    torch.save(layout, tmp_path / "transformers.pth")
    loaded = create(tmp_path / "transformers.pth", "nat_small", depths=(1, 1, 1, 1))
    for i in range(4):
        for gamma in ("gamma1", "gamma2"):
            value = loaded.get_parameter(f"stages.{i}.blocks.0.{gamma}")
            assert torch.equal(value, official[f"levels.{i}.blocks.0.{gamma}"])


@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_dense_backbones_of_both_layouts_load_with_their_norms(layout, tmp_path):
    case_file, case = CASES["dinat_mini-dense-160x224-0"]
    official = make_checkpoint(case_file, case)
    generator = torch.Generator().manual_seed(0)
    norms = {
        f"{i}.{kind}": torch.rand(64 * 2**i, generator=generator)
        for i in range(4)
        for kind in ("weight", "bias")
    }
    dense = {k: v for k, v in official.items() if not k.startswith(("norm.", "head."))}
    if layout == "official":
        state = {**dense, **{f"norm{name}": value for name, value in norms.items()}}
    else:
        state = in_transformers_layout(dense, MINI, prefix="")
        for name, value in norms.items():
            state[f"hidden_states_norms.stage{int(name[0]) + 1}{name[1:]}"] = value
    torch.save(state, tmp_path / "weights.pth")
    backbone = MODELS.build(
        dict(
            type="DenseBackbone",
            model_name="dinat_mini",
            out_norms=True,
            pretrained=str(tmp_path / "weights.pth"),
        )
    ).eval()
    torch.save(official, tmp_path / "official.pth")
    plain = create(tmp_path / "official.pth", "dinat_mini", features_only=True).eval()
    x = make_input([1, 3, 64, 96])
    with torch.no_grad():
        for i, (m, e) in enumerate(zip(backbone(x), plain(x), strict=True)):
            assert m.is_contiguous()
            e = nn.functional.layer_norm(
                e.permute(0, 2, 3, 1), e.shape[1:2], norms[f"{i}.weight"], norms[f"{i}.bias"]
            )
            assert relative_error(m, e.permute(0, 3, 1, 2)) < 1e-5


def test_a_checkpoint_of_the_other_design_is_refused(tmp_path):
    state = timm.create_model("dinat_s_tiny", depths=(1, 1, 1, 1)).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="another"):
        create(tmp_path / "weights.pth", "dinat_small", depths=(1, 1, 1, 1))


# DiNAT_s


@pytest.mark.parametrize("size", [(8, 6), (7, 6), (8, 5), (1, 1), (3, 1)], ids=str)
def test_patch_merging_takes_corners_down_first_and_zeros_beyond_the_map(size):
    torch.manual_seed(0)
    merging = timm.create_model("dinat_s_tiny", depths=(1, 1, 1, 1)).stages[1].downsample
    x = image(*size, chans=96, batch=2)
    rows, columns = (-(-n // 2) for n in size)
    corners = torch.zeros(2, rows, columns, 384)
    for y in range(rows):
        for x_ in range(columns):
            for i, (dy, dx) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
                if 2 * y + dy < size[0] and 2 * x_ + dx < size[1]:
                    corner = x[:, :, 2 * y + dy, 2 * x_ + dx]
                    corners[:, y, x_, 96 * i : 96 * (i + 1)] = corner
    with torch.no_grad():
        expected = merging.reduction(merging.norm(corners)).permute(0, 3, 1, 2)
        assert relative_error(merging(x), expected) < 1e-5


def test_the_classes_are_those_of_the_designs():
    assert type(timm.create_model("dinat_large_384_11x11", device="meta")) is NAT
    assert type(timm.create_model("dinat_s_large", device="meta")) is DiNATS
