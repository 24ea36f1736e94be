"""What FasterViT alone has: carriers at any grid, the detection code's quirks, its files."""

import argparse
import copy
import json
import math
import pickle

import pytest
import timm
import torch
from oracles import (
    DATA,
    PeakMemory,
    as_list,
    dense,
    gradient_error,
    gradients,
    image,
    make_checkpoint,
    make_input,
    make_state_dict,
    relative_error,
    saved_and_loaded,
)
from torch import nn
from torch.nn import functional as F

from densezoo.backbones import FasterViT
from densezoo.backbones.checkpoints import read_checkpoint
from densezoo.backbones.faster_vit import default_cfgs
from densezoo.backbones.faster_vit_blocks import Grid
from densezoo.backbones.registry import BACKBONES, find_backbone
from densezoo.layers.rel_pos import MlpPosEmbed, MlpRelPosBias
from densezoo.tools import export_files

SMALL = dict(depths=(1, 1, 2, 1), dims=(16, 32, 64, 128), stem_dim=8)
NO_CARRIERS = [f"faster_vit_4_21k_{size}" for size in (224, 384, 512, 768)]
PROBE = dict(negative_abs=["pos_emb_funct.cpb_mlp.2.weight"])


def small(name="faster_vit_0", seed=0, probe=True, **arguments):
    """A small model whose weights let carriers and every embedding count."""
    model = timm.create_model(name, **{**SMALL, **arguments}).eval()
    state = make_state_dict([(k, tuple(v.shape), "param") for k, v in model.state_dict().items()])
    for key in state:
        if probe and key.endswith("rel_pos_bias.fc2.weight"):
            state[key] = -state[key].abs()
    model.load_state_dict(state)
    return model


def maps_and_logits(model, x):
    with torch.no_grad():
        return [*model.forward_intermediates(x, intermediates_only=True), model(x)]


def load(path, name="faster_vit_0", **arguments):
    overlay = dict(file=str(path))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


# Carriers at any grid

# Another calculation from the definition, in float64: mean, std, l2, first and last value.
VALUES = {
    (256, 448): [
        (0.08326018, 3.17505741, 1075.622414, 5.32210254, -1.25929546),
        (0.07103762, 2.93459987, 702.942969, -2.82989807, -0.82567817),
        (0.10625085, 2.33761439, 73.998177, 0.15870838, -1.08737661),
    ],
    (112, 224): [
        (0.10243189, 3.14018792, 497.644938, 6.63791220, -2.26078937),
        (0.12256750, 2.82083870, 338.066260, -2.96687479, -2.54577989),
        (0.12500893, 2.25292581, 71.353360, 1.14934504, -1.14664682),
    ],
}


@pytest.fixture(scope="module")
def probe_model(tmp_path_factory):
    """faster_vit_0 with the weights of the reference values, in float64."""
    case_file = json.loads((DATA / "faster_vit_0.json").read_text())
    case = next(c for c in case_file["cases"] if c.get("weights") == PROBE)
    path = tmp_path_factory.mktemp("probe") / "weights.pth"
    torch.save(make_checkpoint(case_file, case), path)
    return load(path).double().eval()


@pytest.mark.parametrize("size", VALUES, ids=str)
def test_grids_that_are_not_square_give_the_reference_values(size, probe_model):
    outputs = maps_and_logits(probe_model, make_input([1, 3, *size], 0).double())[2:]
    for output, expected in zip(outputs, VALUES[size], strict=True):
        values = output.flatten()
        moments = values.mean(), values.std(correction=0), values.norm(), values[0], values[-1]
        assert [float(v) for v in moments] == pytest.approx(expected, rel=1e-7, abs=2e-8)


@pytest.mark.parametrize("name", ["faster_vit_0", "faster_vit_3"])
def test_a_transposed_image_through_transposed_weights_gives_transposed_maps(name):
    model = small(name).double()
    transposed = copy.deepcopy(model)
    state = {
        key: value.flip(1)
        if key.endswith(("pos_embed.fc1.weight", "rel_pos_bias.fc1.weight"))
        else (value.mT.contiguous() if value.ndim == 4 else value)
        for key, value in model.state_dict().items()
    }
    transposed.load_state_dict(state)
    for size in [(112, 224), (226, 226), (250, 460), (97, 131), (40, 224)]:
        x = make_input([1, 3, *size], 0).double()
        *maps, logits = maps_and_logits(model, x)
        *swapped, same = maps_and_logits(transposed, x.mT.contiguous())
        assert relative_error(same, logits) < 1e-11
        for one, other in zip(swapped, maps, strict=True):
            assert relative_error(one.mT, other) < 1e-11, size


def test_one_window_has_no_carriers_and_two_in_a_row_have():
    model = small("faster_vit_3")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for block in other.stages[2].blocks:
            for parameter in block.carriers.parameters():
                parameter.mul_(-0.5)
    for size, is_same in [((112, 112), True), ((1, 40), True), ((112, 113), False)]:
        x = image(*size)
        maps, others = (maps_and_logits(m, x)[2] for m in (model, other))
        assert torch.equal(maps, others) is is_same, size


def test_windows_drop_paths_each_by_itself_and_carriers_by_image():
    torch.manual_seed(0)
    block = small(drop_path_rate=0.9).train().stages[2].blocks[1]
    tokens, carriers = [], []
    block.windows.drop_path.register_forward_hook(lambda m, i, o: tokens.append(o))
    block.carriers.drop_path.register_forward_hook(lambda m, i, o: carriers.append(o))
    with torch.no_grad():
        block(torch.randn(8 * 6, 53, 64), Grid.of(torch.empty(8, 21, 14, 64), 3, 2))
    dropped = [o.flatten(1).abs().sum(1) == 0 for o in (*tokens, *carriers)]
    assert [len(d) for d in dropped] == [8 * 6, 8 * 6, 8, 8]
    assert all(0 < d.sum() < len(d) for d in dropped)
    assert 0 < dropped[0][:6].sum() < 6 or 0 < dropped[0][6:12].sum() < 6


# The detection code


def detection_maps(state, x, depths, windows, heads):
    """Stage maps of the official detection code without carriers, from its description.

    Window by window and pair by pair, in the dtype of `x`, with the entries of a checkpoint.
    """

    def batch_norm(x, name, eps):
        mean, var, weight, bias = (
            state[f"{name}.{k}"].to(x)[:, None, None]
            for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + eps).sqrt() * weight + bias

    def conv(x, name, stride=1):
        bias = state.get(f"{name}.bias")
        bias = None if bias is None else bias.to(x)
        return F.conv2d(x, state[f"{name}.weight"].to(x), bias, stride, 1)

    def linear(x, name):
        y = x @ state[f"{name}.weight"].to(x).T
        return y + state[f"{name}.bias"].to(x) if f"{name}.bias" in state else y

    def layer_norm(x, name, eps):
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt()
        return y * state[f"{name}.weight"].to(x) + state[f"{name}.bias"].to(x)

    def mlp_of_position(pair, name):
        pair = torch.tensor(pair, dtype=x.dtype)
        return linear(linear(pair, f"{name}.cpb_mlp.0").relu(), f"{name}.cpb_mlp.2")

    def embedding(name, w):
        middle = (w * w) // 2
        positions = [((r - middle) / middle, (s - middle) / middle) for r, s in grid(w)]
        return torch.stack([mlp_of_position(p, name) for p in positions])

    def bias(name, w):
        def coordinate(d):
            t = 8 * d / (w - 1)
            return math.copysign(math.log2(abs(t) + 1) / 3, t)

        offsets = {(a - c, b - d) for a, b in grid(w) for c, d in grid(w)}
        table = {
            (r, s): 16 * mlp_of_position((coordinate(r), coordinate(s)), name).sigmoid()
            for r, s in offsets
        }
        rows = [
            torch.stack([table[a - c, b - d] for c, d in grid(w)]) for a, b in grid(w)
        ]  # a row of keys for each query
        return torch.stack(rows).permute(2, 0, 1)

    def grid(w):
        return [(r, s) for r in range(w) for s in range(w)]

    def attention(tokens, name, w, num_heads):
        qkv = linear(tokens, f"{name}.qkv").unflatten(-1, (3, num_heads, -1))
        query, key, value = qkv.permute(1, 2, 0, 3)
        logits = query @ key.mT * query.shape[-1] ** -0.5 + bias(f"{name}.pos_emb_funct", w)
        return linear((logits.softmax(-1) @ value).transpose(0, 1).flatten(1), f"{name}.proj")

    x = F.relu(batch_norm(conv(x, "patch_embed.conv_down.0", 2), "patch_embed.conv_down.1", 1e-4))
    x = F.relu(batch_norm(conv(x, "patch_embed.conv_down.3", 2), "patch_embed.conv_down.4", 1e-4))
    maps = []
    for i in range(4):
        w = windows[i]
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % w, 0, -height % w))
        for j in range(depths[i]):
            name = f"levels.{i}.blocks.{j}"
            if i < 2:
                y = F.gelu(batch_norm(conv(x, f"{name}.conv1"), f"{name}.norm1", 1e-5))
                x = x + batch_norm(conv(y, f"{name}.conv2"), f"{name}.norm2", 1e-5)
                continue
            x = x.clone()
            position = embedding(f"{name}.pos_embed", w)
            gamma3, gamma4 = (state[f"{name}.gamma{k}"].to(x) for k in (3, 4))
            for top in range(0, x.shape[2], w):
                for left in range(0, x.shape[3], w):
                    window = x[0, :, top : top + w, left : left + w]
                    t = window.flatten(1).T + position
                    y = layer_norm(t, f"{name}.norm1", 1e-5)
                    t = t + gamma3 * attention(y, f"{name}.attn", w, heads[i])
                    y = F.gelu(linear(layer_norm(t, f"{name}.norm2", 1e-5), f"{name}.mlp.fc1"))
                    t = t + gamma4 * linear(y, f"{name}.mlp.fc2")
                    x[0, :, top : top + w, left : left + w] = t.T.unflatten(1, (w, w))
        x = x[:, :, :height, :width]
        maps.append(x)
        if i < 3:
            name = f"levels.{i}.downsample"
            y = layer_norm(x.permute(0, 2, 3, 1), f"{name}.norm", 1e-6).permute(0, 3, 1, 2)
            x = conv(y, f"{name}.reduction.0", 2)
    return maps


def official_keys(depths, dims, stem_dim, heads, has_carriers):
    """Entries of an official checkpoint with layer scale in the last two stages."""
    keys = []

    def add(name, **shapes):
        keys.extend((f"{name}.{k}", shape, "param") for k, shape in shapes.items())

    def norm(name, dim, is_batch=False):
        running = dict(running_mean=(dim,), running_var=(dim,)) if is_batch else {}
        add(name, weight=(dim,), bias=(dim,), **running)

    def attention(name, dim, num_heads):
        add(f"{name}.qkv", weight=(3 * dim, dim), bias=(3 * dim,))
        add(f"{name}.proj", weight=(dim, dim), bias=(dim,))
        position(f"{name}.pos_emb_funct", num_heads)

    def position(name, dim):
        add(f"{name}.cpb_mlp.0", weight=(512, 2), bias=(512,))
        add(f"{name}.cpb_mlp.2", weight=(dim, 512))

    def mlp(name, dim):
        add(f"{name}.fc1", weight=(4 * dim, dim), bias=(4 * dim,))
        add(f"{name}.fc2", weight=(dim, 4 * dim), bias=(dim,))

    for i, (a, b) in enumerate([(3, stem_dim), (stem_dim, dims[0])]):
        add(f"patch_embed.conv_down.{3 * i}", weight=(b, a, 3, 3))
        norm(f"patch_embed.conv_down.{3 * i + 1}", b, is_batch=True)
    for i, dim in enumerate(dims):
        for j in range(depths[i]):
            block = f"levels.{i}.blocks.{j}"
            for k in (1, 2):
                norm(f"{block}.norm{k}", dim, is_batch=i < 2)
                if i < 2:
                    add(f"{block}.conv{k}", weight=(dim, dim, 3, 3), bias=(dim,))
                elif has_carriers[i]:
                    norm(f"{block}.hat_norm{k}", dim)
            if i < 2:
                continue
            prefixes = ("", "hat_") if has_carriers[i] else ("",)
            for prefix in prefixes:
                attention(f"{block}.{prefix}attn", dim, heads[i])
                mlp(f"{block}.{prefix}mlp", dim)
                position(f"{block}.{prefix}pos_embed", dim)
            add(block, **{f"gamma{k}": (dim,) for k in range(5 - 2 * len(prefixes), 5)})
        if has_carriers[i]:
            name = f"levels.{i}.global_tokenizer.to_global_feature.pos"
            add(name, weight=(dim, 1, 3, 3), bias=(dim,))
        if i < 3:
            norm(f"levels.{i}.downsample.norm", dim)
            add(f"levels.{i}.downsample.reduction.0", weight=(2 * dim, dim, 3, 3))
    norm("norm", dims[3], is_batch=True)
    add("head", weight=(1000, dims[3]), bias=(1000,))
    return keys


PLAIN = dict(SMALL, num_heads=(1, 2, 4, 4), window_size=(7, 7, 4, 3))


@pytest.fixture
def plain_state():
    names = ("depths", "dims", "stem_dim", "num_heads")
    return make_state_dict(official_keys(*(PLAIN[k] for k in names), (False,) * 4))


def test_official_quirks_give_the_maps_of_the_detection_code(tmp_path, plain_state):
    torch.save({"state_dict": plain_state}, tmp_path / "weights.pth")
    x = make_input([1, 3, 75, 134], 0).double()
    expected = detection_maps(
        plain_state, x, PLAIN["depths"], PLAIN["window_size"], PLAIN["num_heads"]
    )
    models = {
        quirks: load(
            tmp_path / "weights.pth", NO_CARRIERS[0],
            features_only=True, official_quirks=quirks, **PLAIN,
        ).double().eval()
        for quirks in (True, False)
    }  # fmt: skip
    with torch.no_grad():
        maps, plain = models[True](x), models[False](x)
    for m, p, e in zip(maps, plain, expected, strict=True):
        assert relative_error(m, e) < 1e-6
        assert relative_error(p, e) > 1e-2
    x = make_input([1, 3, 112, 112], 0).double()  # maps of 28 and 14: nothing to pad
    with torch.no_grad():
        pairs = list(zip(models[True](x), models[False](x), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs[:2])
    assert all(relative_error(a, b) > 1e-2 for a, b in pairs[2:])


@pytest.mark.parametrize("name", ["faster_vit_0", "faster_vit_6"])
def test_variants_with_carriers_refuse_official_quirks_and_name_the_others(name):
    with pytest.raises(ValueError, match=f"official_quirks=True is .*{', '.join(NO_CARRIERS)}"):
        timm.create_model(name, device="meta", official_quirks=True)


# Arguments and names


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(window_size=0), "window_size is 0: a whole number of at least 2"),
        (dict(window_size=-7), "window_size is -7"),
        (dict(window_size=1), "window_size is 1"),
        (dict(window_size=(7, 7, 7)), r"window_size is \(7, 7, 7\)"),
        (dict(window_size=(7, 7, 7.0, 7)), "window_size is"),
        (dict(num_heads=8), "num_heads is 8: four whole numbers"),
        (dict(num_heads=(2, 4, 7, 16)), r"num_heads is \(2, 4, 7, 16\): .*divisors of dims \(64"),
        (dict(num_heads=(2, 4, 0, 16)), "num_heads is"),
        (dict(carriers=True), "carriers is True: four"),
        (dict(carriers=(True, False, True, False)), "the first two are False"),
        (dict(propagation=1), "propagation is 1"),
        (dict(official_quirks="yes"), "official_quirks is 'yes'"),
        (dict(mlp_ratio=0), "mlp_ratio is 0"),
        (dict(layer_scale=-1), "layer_scale is -1"),
        (dict(stem_dim=0), "stem_dim is 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("faster_vit_0", device="meta", **arguments)


@pytest.mark.parametrize(
    "alias, name",
    [
        ("faster_vit_0_224", "faster_vit_0"),
        ("faster_vit_6_224", "faster_vit_6"),
        ("faster_vit_3_any_res", "faster_vit_3"),
        *((f"{name}_any_res", name) for name in NO_CARRIERS),
    ],
)
def test_official_names_build_the_same_models(alias, name):
    assert find_backbone(alias) is BACKBONES[name]
    assert isinstance(timm.create_model(alias, device="meta"), FasterViT)


def test_images_are_prepared_as_published():
    names = [name for name in BACKBONES if name.startswith("faster_vit")]
    cfg = {name: default_cfgs[name].default for name in names}
    given = {n: (c.input_size[1], c.crop_pct, c.crop_mode) for n, c in cfg.items()}
    assert given.pop("faster_vit_0") == (224, 0.875, "center")
    for size, crop_pct in ((224, 0.95), (384, 1.0), (512, 1.0), (768, 0.93)):
        assert given.pop(f"faster_vit_4_21k_{size}") == (size, crop_pct, "squash")
    assert set(given.values()) == {(224, 1.0, "center")} and len(given) == 6


def test_parts_start_as_published():
    torch.manual_seed(0)
    model = timm.create_model("faster_vit_3", **SMALL)
    block = model.stages[2].blocks[0]
    for part in (block.windows, block.carriers):
        assert (part.gamma1 == 1e-5).all() and (part.gamma2 == 1e-5).all()
        weights = (part.pos_embed.fc2, part.attn.rel_pos_bias.fc2, part.attn.qkv, part.mlp.fc1)
        for linear in (*weights, model.head.fc):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert linear.bias is None or not linear.bias.any()
    eps = [m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert sorted(eps) == [1e-6] * 3 + [1e-5] * 10
    eps = [m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted(eps) == [1e-5] * 5 + [1e-4] * 2
    assert model.stages[0].blocks[0].conv1.bias is not None and model.stem.conv1.bias is None
    assert not hasattr(model.stages[0].blocks[0], "gamma1")
    assert not any("gamma" in n for n, _ in timm.create_model("faster_vit_2").named_parameters())


# Folding


@pytest.mark.parametrize(
    "name, arguments", [("faster_vit_3", {}), (NO_CARRIERS[0], dict(window_size=(7, 7, 14, 7)))]
)
def test_fusing_folds_positions_and_norms_and_keeps_every_size(name, arguments, tmp_path):
    model = small(name, num_heads=(1, 2, 4, 8), **arguments)
    sizes = [(224, 224), (97, 131), (250, 460)]
    expected = [maps_and_logits(model, image(*size)) for size in sizes]
    assert model.fuse() is model
    for stage in model.stages[2:]:
        for block in stage.blocks:
            left = [m for m in block.windows.modules() if type(m) in (MlpPosEmbed, MlpRelPosBias)]
            assert left == []
    assert [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == [model.norm]
    torch.save(model.state_dict(), tmp_path / "fused.pth")
    again = timm.create_model(name, **SMALL, num_heads=(1, 2, 4, 8), **arguments).eval().fuse()
    again.load_state_dict(torch.load(tmp_path / "fused.pth"))
    for one in (model, again, saved_and_loaded(model), copy.deepcopy(model).fuse()):
        for size, before in zip(sizes, expected, strict=True):
            for a, b in zip(maps_and_logits(one, image(*size)), before, strict=True):
                assert relative_error(a, b) < 1e-5, size


# Programs of any size


@pytest.mark.parametrize(
    "fused",
    [pytest.param(False, marks=pytest.mark.slow, id="plain"), pytest.param(True, id="fused")],
)
def test_one_program_serves_maps_of_one_window_and_of_any_grid(fused):
    model = small("faster_vit_3", depths=(1, 1, 1, 1))
    model = model.fuse() if fused else model
    program = export_files.trace(model, size=(64, 96), batch=2, dynamic=True).module()
    for size in [(64, 96), (112, 113), (300, 180), (33, 400)]:
        x = image(*size, batch=2)
        with torch.no_grad():
            for o, e in zip(as_list(program(x)), as_list(model(x)), strict=True):
                assert relative_error(o, e) < 1e-5, size


@pytest.mark.slow
def test_gradients_of_a_program_of_any_size_are_the_eager_ones():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = small("faster_vit_3", depths=(1, 1, 1, 1)).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in [(130, 240), (64, 64), (240, 130)]:
        x = image(*size, batch=2)
        actual = gradients(model, compiled(x))
        assert gradient_error(actual, gradients(model, model(x))) < 1e-4, size
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_it_vectorises_over_images_with_carriers():
    model = small("faster_vit_3")
    x = image(113, 230, batch=2)
    with torch.no_grad():
        assert relative_error(torch.vmap(lambda one: model(one[None])[0])(x), model(x)) < 1e-5


# What is kept between calls


def test_changed_weights_of_positions_are_noticed_however_they_change():
    model = small()
    x = image(130, 250)
    changes = {
        "step": lambda p: p.add_(0.1),
        "data": lambda p: p.data.mul_(-1),
        "one value": lambda p: p.data.view(-1)[7].add_(5),
        "swap": lambda p: setattr(p, "data", p.data.flip(0)),
    }
    names = [n for n, _ in model.named_parameters() if ".fc1.weight" in n and "stages.2" in n]
    names = [n for n in names if "pos" in n and "blocks.0" in n]
    assert len(names) == 4
    for name in [n.replace("fc1", layer) for n in names for layer in ("fc1", "fc2")]:
        for how, change in changes.items():
            with torch.no_grad():
                before = model(x)
                change(model.get_parameter(name))
                after = model(x)
            assert not torch.equal(after, before), (name, how)
            assert relative_error(after, model(x)) < 1e-5  # the latter records gradients


def test_memory_is_linear_in_pixels():
    model = small(dims=(32, 64, 128, 256))
    peaks = []
    for side in (512, 1024):
        x = image(side, side)
        with torch.no_grad(), PeakMemory() as memory:
            model(x)
        peaks.append(memory.peak)
    assert peaks[1] < 4.2 * peaks[0]


def test_biases_of_large_windows_are_not_kept():  # 340 MB a block
    model = small(NO_CARRIERS[3], window_size=(7, 7, 48, 24), num_heads=(1, 2, 4, 4))
    kept = []
    with torch.no_grad():
        model(image(64, 64))
    for module in model.modules():
        for cache in [v for v in vars(module).values() if hasattr(v, "entries")]:
            kept += [entry[1] for entry in cache.entries.values()]
    assert kept and max(t.numel() for t in kept) <= 2**20


# Files


def training_file(state, path):
    """A file as timm's training script leaves it, with what the published ones hold beside."""
    torch.save(
        {
            "epoch": 309,
            "arch": "faster_vit_0_224",
            "state_dict": state,
            "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": []},
            "version": 2,
            "args": argparse.Namespace(lr=5e-3, mean=None, opt_betas=(0.9, 0.999), amp=True),
            "amp_scaler": {"scale": 65536.0},
            "metric": 82.1,
        },
        path,
    )


@pytest.fixture(scope="module")
def carrier_state():
    names = ("depths", "dims", "stem_dim")
    heads = (2, 4, 8, 16)
    keys = official_keys(*(SMALL[k] for k in names), heads, (False, False, True, False))
    return make_state_dict(keys)


def with_derived(state):
    """A state dict beside what the official model stores of its own: biases, tables, names."""
    derived = {}
    for key in state:
        if key.endswith("cpb_mlp.0.weight"):
            module = key.removesuffix("cpb_mlp.0.weight")
            derived[f"{module}relative_bias"] = torch.ones(1, 8, 53, 53)
            if "pos_emb_funct" in key:
                derived[f"{module}relative_coords_table"] = torch.ones(1, 13, 13, 2)
                derived[f"{module}relative_position_index"] = torch.ones(49, 49, dtype=torch.long)
        if "to_global_feature.pos" in key:
            derived[key.replace("to_global_feature.pos", "pos_embed")] = 0 * state[key]
    assert len(derived) == 2 + 2 * 5 + 2 * 5
    return {**state, **derived}


LAYOUTS = {
    "published": with_derived,
    "parameters alone": lambda state: state,
    "module.": lambda state: {f"module.{k}": v for k, v in with_derived(state).items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_files_load_with_and_without_derived_entries(
    layout, carrier_state, tmp_path, caplog
):
    training_file(LAYOUTS[layout](carrier_state), tmp_path / "weights.pth.tar")
    with caplog.at_level("INFO", "densezoo"):
        model = load(tmp_path / "weights.pth.tar", "faster_vit_3", **SMALL)
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("densezoo")]
    counters = [k for k in model.state_dict() if k.endswith("num_batches_tracked")]
    loaded = len(model.state_dict()) - len(counters)
    assert f"{loaded} entries loaded (official keys); 0 missing; 0 unexpected; 0 resh" in message
    name = "levels.2.global_tokenizer.to_global_feature.pos.weight"
    assert torch.equal(model.stages[2].carriers.conv.weight, carrier_state[name])
    block = model.stages[2].blocks[1]
    official = {k: carrier_state[f"levels.2.blocks.1.{k}"] for k in ("gamma1", "gamma4")}
    assert torch.equal(block.carriers.gamma1, official["gamma1"])
    assert torch.equal(block.windows.gamma2, official["gamma4"])


def test_a_detectors_file_loads_and_widths_number_its_norms(plain_state, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for number, dim in enumerate((32, 64, 128)):  # of stages 2 to 4, numbered from 0
        for name in ("weight", "bias", "running_mean", "running_var"):
            plain_state[f"norm{number}.{name}"] = torch.rand(dim, generator=generator)
    state = {f"module.backbone.0.{k}": v for k, v in plain_state.items()}
    state["module.transformer.level_embed"] = torch.zeros(4, 256)
    path = tmp_path / "dino.pth"
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4)}, path)
    arguments = dict(**PLAIN, official_quirks=True)
    model = load(path, NO_CARRIERS[0], **arguments)
    assert torch.equal(model.stem.conv1.weight, plain_state["patch_embed.conv_down.0.weight"])
    mapped = {f"out_norms.{i}.weight": plain_state[f"norm{i}.weight"] for i in range(3)}
    model.adapt_checkpoint(mapped)
    assert {k: len(v) for k, v in mapped.items()} == {
        f"out_norms.{i}.weight": PLAIN["dims"][i] for i in (1, 2, 3)
    }


class Payload:
    """An object whose unpickling writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({self.marker!r}, 'w').close()",)


class Arguments(argparse.Namespace):
    """A namespace of another class, which no reader needs."""


def _namespace_as_state(payload):
    namespace = argparse.Namespace(x=1)
    namespace.__setstate__ = payload
    return namespace


NAMESPACES = {
    "an attribute": lambda payload: argparse.Namespace(lr=0.1, hook=payload),
    "a list within": lambda payload: argparse.Namespace(a=[1, {"b": (2, payload)}]),
    "a namespace within": lambda payload: argparse.Namespace(a=argparse.Namespace(b=payload)),
    "a dict's key": lambda payload: argparse.Namespace(a={(1, 2): {3: payload}}),
    "a method": _namespace_as_state,
    "a subclass": lambda payload: Arguments(a=payload),
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", NAMESPACES)
def test_namespaces_that_hold_what_runs_code_are_refused(kind, is_zip, carrier_state, tmp_path):
    path, marker = tmp_path / "evil.pth.tar", tmp_path / "marker"
    contents = {"state_dict": carrier_state, "args": NAMESPACES[kind](Payload(str(marker)))}
    torch.save(contents, path, _use_new_zipfile_serialization=is_zip)
    for entry in (
        read_checkpoint,
        lambda path: load(path, "faster_vit_3", **SMALL),
        lambda path: dense("faster_vit_3", model_kwargs=SMALL, pretrained=str(path)),
    ):
        with pytest.raises(
            ValueError, match="evil.pth.tar' is not a checkpoint .* safely"
        ) as error:
            entry(path)
        assert "\n" not in str(error.value)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the file is not malicious at all"


def test_namespaces_of_a_subclass_are_refused_even_without_a_payload(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "args": Arguments(a=1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth.*Arguments"):
        read_checkpoint(tmp_path / "a.pth")


def test_namespaces_are_of_plain_values_after_reading(carrier_state, tmp_path):
    training_file(carrier_state, tmp_path / "weights.pth.tar")
    args = read_checkpoint(tmp_path / "weights.pth.tar")["args"]
    assert type(args) is argparse.Namespace and args.opt_betas == (0.9, 0.999)
    assert pickle.loads(pickle.dumps(args)) == args


def test_a_file_of_another_family_is_refused_by_name(tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="faster_vit_0: no entry of FasterViT .*another model"):
        load(tmp_path / "weights.pth")
