"""The isotropic models: their maps, their weights, and outputs by the official definition."""

import copy

import pytest
import timm
import torch
from oracles import (
    FEATURE_CLASSES,
    dense,
    image,
    isotropic_keys,
    make_state_dict,
    relative_error,
    without_gradient,
)
from timm.models._manipulate import group_parameters
from torch.nn import functional as F

from densezoo.backbones.registry import BACKBONES
from densezoo.tools import export_files
from densezoo.tools.cli import main
from densezoo.tools.count_macs import count_macs

NAMES = [
    f"{kind}_{size}"
    for kind in ("nat_isotropic", "dinat_isotropic", "vitrpb")
    for size in ("small", "base")
]
SMALL = ["nat_isotropic_small", "dinat_isotropic_small", "vitrpb_small"]
DIM, HEADS = 64, 2


def axis_offsets(length, kernel_size, dilation):
    """(L, L): offset of every key that a query sees, plus kernel_size - 1; else -1."""
    offsets = torch.full((length, length), -1)
    for query in range(length):
        group, index = query % dilation, query // dilation
        members = range(group, length, dilation)
        start = min(max(index - kernel_size // 2, 0), len(members) - kernel_size)
        for i in range(start, start + kernel_size):
            offsets[query, members[i]] = i - index + kernel_size - 1
    return offsets


def attention(state, prefix, x, kernel_size, dilation):
    """The official attention on (1, H, W, C) as masked dense attention."""
    height, width = x.shape[1:3]
    if kernel_size is None:
        kernels = padded = height, width
        tables = [n - 1 + torch.arange(n)[None] - torch.arange(n)[:, None] for n in padded]
    else:
        least = kernel_size * dilation
        padded = max(height, least), max(width, least)
        kernels = kernel_size, kernel_size
        tables = [axis_offsets(n, kernel_size, dilation) for n in padded]
    x = F.pad(x, (0, 0, 0, padded[1] - width, 0, padded[0] - height))
    qkv = F.linear(x, state[f"{prefix}.qkv.weight"], state[f"{prefix}.qkv.bias"])
    query, key, value = qkv.reshape(-1, 3, HEADS, DIM // HEADS).permute(1, 2, 0, 3)
    dy, dx = tables[0][:, None, :, None], tables[1][None, :, None, :]
    bias = state[f"{prefix}.rpb"][:, dy, dx].masked_fill((dy < 0) | (dx < 0), float("-inf"))
    assert bias.isfinite()[0].sum((2, 3)).unique().tolist() == [kernels[0] * kernels[1]]
    logits = query @ key.transpose(1, 2) / (DIM // HEADS) ** 0.5 + bias.reshape(
        HEADS, len(query[0]), -1
    )
    out = (logits.softmax(-1) @ value).transpose(0, 1).reshape(1, *padded, DIM)
    out = out[:, :height, :width]
    return F.linear(out, state[f"{prefix}.proj.weight"], state[f"{prefix}.proj.bias"])


def official(state, x, depth, kernel_size, dilations):
    """Last map, NCHW before the norm, and logits of the official model."""

    def norm(x, name):
        return F.layer_norm(x, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"])

    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % 16, 0, -height % 16))
    weight, bias = (state[f"patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
    x = norm(F.conv2d(x, weight, bias, stride=16).permute(0, 2, 3, 1), "patch_embed.norm")
    for i in range(depth):
        name = f"layers.{i}"
        attended = norm(x, f"{name}.norm1")
        x = x + attention(state, f"{name}.attn", attended, kernel_size, dilations[i])
        hidden = norm(x, f"{name}.norm2")
        for layer in ("fc1", "fc2"):
            weight, bias = (state[f"{name}.mlp.{layer}.{kind}"] for kind in ("weight", "bias"))
            hidden = F.linear(hidden, weight, bias)
            hidden = F.gelu(hidden) if layer == "fc1" else hidden
        x = x + hidden
    pooled = norm(x, "norm").mean((1, 2))
    return x.permute(0, 3, 1, 2), F.linear(pooled, state["head.weight"], state["head.bias"])


@pytest.mark.parametrize(
    "name, dilations, size",
    [
        ("nat_isotropic_small", (1, 1, 1), (224, 224)),
        ("nat_isotropic_small", (1, 1, 1), (90, 250)),
        ("dinat_isotropic_small", (1, 2, 1), (224, 224)),
        ("dinat_isotropic_small", (1, 2, 1), (190, 250)),
        ("vitrpb_small", (1, 1, 1), (224, 224)),
    ],
)
def test_outputs_are_those_of_the_official_definition(name, dilations, size, tmp_path):
    is_full = name.startswith("vitrpb")
    keys = isotropic_keys(3, DIM, HEADS, 27 if is_full else 13, is_full)
    state = make_state_dict(keys)
    torch.save(state, tmp_path / "official.pth")
    model = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / "official.pth")),
        depths=(3,),
        dims=(DIM,),
    )
    model = model.double().eval()
    x = image(*size).double()
    exact = {key: value.double() for key, value in state.items()}
    with torch.no_grad():
        expected, logits = official(exact, x, 3, None if is_full else 7, dilations)
        (result,) = model.forward_intermediates(x, intermediates_only=True)
        assert relative_error(result, expected) < 1e-6
        assert relative_error(model(x), logits) < 1e-6
        single = model.float()(x.float())
    assert relative_error(single, logits) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_shapes_are_the_published_ones(name):
    model = timm.create_model(name, device="meta", num_classes=1000)
    published = BACKBONES[name].weights.published
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == published.params
    (info,) = model.feature_info
    assert info["reduction"] == 16 and model.pretrained_cfg["pool_size"] == (14, 14)
    (result,) = model.forward_intermediates(
        torch.empty(2, 3, 224, 224, device="meta"), intermediates_only=True
    )
    assert result.shape == (2, info["num_chs"], 14, 14)
    groups = group_parameters(model, model.group_matcher())
    assert len(groups) == 2 + 12
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


@pytest.mark.parametrize("name", SMALL)
def test_macs_are_the_published_ones_to_their_last_digit(name):
    report = count_macs(name)
    assert round(report.macs / 1e9, 1) == report.published.gmacs
    assert report.uncounted == {}


@pytest.mark.parametrize("name", SMALL)
def test_every_form_gives_one_map_of_stride_16(name):
    model = timm.create_model(name, depths=(2,)).eval()
    sizes = [(224, 224)] if name.startswith("vitrpb") else [(224, 224), (97, 131), (7, 40)]
    forms = [
        timm.create_model(name, depths=(2,), features_only=True, feature_cls=cls).eval()
        for cls in FEATURE_CLASSES
    ]
    forms.append(dense(name, out_indices=(0,), model_kwargs=dict(depths=(2,))).eval())
    for size in sizes:
        x = image(*size)
        with torch.no_grad():
            for form in forms:
                maps = form(x)
                (result,) = maps.values() if isinstance(maps, dict) else maps
                assert result.shape == (1, 384, *(-(-n // 16) for n in size))
                assert result.is_contiguous() and result.isfinite().all()
            final, (last,) = model.forward_intermediates(x)
            assert relative_error(model.forward_head(final), model(x)) < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_it_trains_recomputes_copies_compiles_and_traces(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = timm.create_model(name, depths=(2,), num_classes=7)
    x = image(224, 224)
    model.train()(x).square().mean().backward()
    assert without_gradient(model) == []
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
    model.set_grad_checkpointing(False)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert relative_error(torch.jit.trace(model, x, check_trace=False)(x), expected) < 1e-5
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(x), expected) < 1e-5


@pytest.mark.parametrize(
    "name, export_format",
    [
        ("vitrpb_small", "torch_export"),
        # By default the operator and the layer are exported in the models of four stages.
        pytest.param("dinat_isotropic_small", "onnx", marks=pytest.mark.slow),
        pytest.param("dinat_isotropic_small", "torch_export", marks=pytest.mark.slow),
        pytest.param("vitrpb_small", "onnx", marks=pytest.mark.slow),
    ],
)
def test_it_is_exported_at_any_size_or_at_its_own(name, export_format, tmp_path):
    if export_format == "onnx" and not export_files.has_onnx_exporter():
        pytest.skip("ONNX export takes torch 2.7 or newer")
    model = timm.create_model(name, depths=(2,)).eval()
    export = export_files.export_onnx if export_format == "onnx" else export_files.export_program
    is_dynamic = name != "vitrpb_small"
    comparisons = export(model, tmp_path / "exported", dynamic=is_dynamic)
    assert len(comparisons) == (3 if is_dynamic else 1)
    if not is_dynamic:
        with pytest.raises(export_files.ExportError, match="Height and width are fixed"):
            export(model, tmp_path / "other", dynamic=True)


def test_the_command_exports_vitrpb_at_the_size_asked_for_alone(tmp_path, capsys):
    path = tmp_path / "vitrpb.pt2"
    words = ["export", "vitrpb_small", str(path), "--size", "32", "48"]
    assert main([*words, "--dynamic"]) == 1
    assert "Height and width are fixed" in capsys.readouterr().err and not path.exists()
    assert main(words) == 0
    (logits,) = export_files.load_program(path)(torch.zeros(1, 3, 32, 48))
    assert logits.shape == (1, 1000)


def test_vitrpb_names_images_of_another_size():
    model = timm.create_model("vitrpb_small", depths=(1,)).eval()
    for size in [(223, 224), (224, 225), (384, 384)]:
        with pytest.raises(ValueError, match=f"{size[0]}, {size[1]}.*224x224"):
            model(image(*size))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(kernel_size=7), "kernel_size is 7: full attention takes none"),
        (dict(dilations=1), "dilations is 1: full attention takes none"),
        (dict(img_size=0), "a side of img_size is 0"),
        (dict(depths=(2, 2)), r"depths is \(2, 2\): a list of 1"),
    ],
    ids=str,
)
def test_bad_arguments_of_vitrpb_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("vitrpb_small", **arguments)


def test_vitrpb_takes_no_tables_of_neighborhoods(tmp_path):
    state = timm.create_model("nat_isotropic_small", depths=(1,)).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="rel_pos_bias has shape .*another variant"):
        timm.create_model(
            "vitrpb_small",
            depths=(1,),
            pretrained=True,
            pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.pth")),
        )
