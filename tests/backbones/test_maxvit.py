"""What MaxViT alone has: windows and grids at any size, SAME padding, its head, weights by tag."""

import json
import logging

import pytest
import timm
import torch
from oracles import PeakMemory, gradient_error, image, loss_of, relative_error, round_as
from timm.models import get_pretrained_cfg, save_for_hf
from torch import nn
from torch.nn import functional as F

from densezoo.backbones.checkpoints import map_keys
from densezoo.backbones.maxvit import KEY_RULES, AvgPool, MBConv, PartitionAttention, SameConv
from densezoo.backbones.registry import (
    BACKBONES,
    check_model_name,
    find_weights,
)
from densezoo.layers import windows
from densezoo.layers.resolution import pad_to_windows
from densezoo.layers.window_attention import attend_to_real_tokens

SMALL = dict(depths=(1, 1, 1, 1), dims=(32, 32, 64, 64), stem_dim=16)
PEER = dict(depths=(1, 1, 1, 1), embed_dim=(32, 32, 64, 64), stem_width=16, head_hidden_size=64)
ALL_TAGS = [(name, tag) for name in BACKBONES if "maxvit" in name for tag in BACKBONES[name].tags]


def create(path, **arguments):
    overlay = dict(file=str(path))
    return timm.create_model(
        "maxvit_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL, **arguments
    )


def randomise(module):
    """Give every parameter and statistic a value that tells whether it is used."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.ndim > 1:
                tensor.normal_(0, 0.3 if "table" in name else 0.05, generator=generator)
            elif tensor.ndim == 1:
                is_scale = name.endswith(("var", "weight"))
                low, high = (0.5, 1.5) if is_scale else (-0.5, 0.5)
                tensor.uniform_(low, high, generator=generator)
    return module.eval()


@pytest.fixture
def small():
    return randomise(timm.create_model("maxvit_tiny", **SMALL))


def peers(tmp_path, name, peer_arguments, **arguments):
    """timm's own model, and ours with its weights, through the file that they are saved in."""
    peer = randomise(timm.create_model(name, **PEER, **peer_arguments))
    torch.save(peer.state_dict(), tmp_path / "weights.pth")
    return peer, create(tmp_path / "weights.pth", **arguments).eval()


# timm's own model


# Bounds of parity, relative to the standard deviation.
BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-3}
every_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


@every_dtype
def test_timms_own_model_gives_the_same_maps_and_logits_at_multiples_of_its_size(dtype, tmp_path):
    peer, model = (m.to(dtype) for m in peers(tmp_path, "maxvit_tiny_tf_224", {}))
    x = image(224, 448).to(dtype)
    with torch.no_grad():
        expected = peer.forward_intermediates(x, intermediates_only=True)[1:]
        maps = model.forward_intermediates(x, intermediates_only=True)
        for m, e in zip([*maps, model(x)], [*expected, peer(x)], strict=True):
            assert relative_error(m, e) < BOUNDS[dtype]


@every_dtype
@pytest.mark.parametrize(
    "name, arguments, size, window",
    [
        ("maxvit_tiny_tf_384", {}, (384, 384), 12),
        ("maxvit_tiny_tf_224", dict(img_size=(96, 160)), (96, 160), "fit:96x160"),
    ],
    ids=["384", "fit"],
)
def test_timms_other_windows_are_an_argument(name, arguments, size, window, dtype, tmp_path):
    peer, model = (m.to(dtype) for m in peers(tmp_path, name, arguments, window_size=window))
    assert model.window_size == model.grid_size == (size[0] // 32, size[1] // 32)
    x = image(*size).to(dtype)
    with torch.no_grad():
        assert relative_error(model(x), peer(x)) < BOUNDS[dtype]


def test_gradients_in_training_are_those_of_timms_own_model(tmp_path):
    peer, model = (m.double().train() for m in peers(tmp_path, "maxvit_tiny_tf_224", {}))
    x = image(224, 224, batch=2).double()
    for one in (model, peer):
        loss_of(one(x)).backward()
    expected = map_keys({n: p.grad for n, p in peer.named_parameters()}, KEY_RULES["timm"])
    own = {n: p.grad for n, p in model.named_parameters()}
    assert own.keys() == expected.keys()
    assert gradient_error(list(own.values()), [expected[n] for n in own]) < 1e-6


# Any size


def attend_by_definition(x, attn, is_grid):
    """Attention of a map (H, W, C), token by token, as the definition without padding has it."""
    height, width, dim = x.shape
    (rows, columns), table = attn.window_size, attn.rel_pos_bias.table
    strides = -(-height // rows), -(-width // columns)
    r, s = (t.flatten() for t in torch.meshgrid(*map(torch.arange, (height, width)), indexing="ij"))
    if is_grid:
        window, place = (r % strides[0], s % strides[1]), (r // strides[0], s // strides[1])
    else:
        window, place = (r // rows, s // columns), (r % rows, s % columns)
    query, key, value = attn.qkv(x.flatten(0, 1)).unflatten(-1, (3, attn.num_heads, -1)).unbind(1)
    out = torch.zeros_like(query)
    for i in range(len(r)):
        seen = (window[0] == window[0][i]) & (window[1] == window[1][i])
        offsets = [p[seen] - p[i] + n - 1 for p, n in zip(place, (rows, columns), strict=True)]
        logits = torch.einsum("hd,nhd->hn", query[i], key[seen]) * query.shape[-1] ** -0.5
        weights = (logits + table[:, offsets[0], offsets[1]]).softmax(-1)
        out[i] = torch.einsum("hn,nhd->hd", weights, value[seen])
    return attn.proj(out.flatten(1)).view(height, width, dim)


@pytest.mark.parametrize("is_grid", [False, True], ids=["block", "grid"])
@pytest.mark.parametrize("window", [(7, 7), (3, 4)], ids=str)
@pytest.mark.parametrize("has_gradient", [False, True], ids=["inference", "training"])
def test_a_real_token_sees_the_real_tokens_of_its_window_alone(window, is_grid, has_gradient):
    module = PartitionAttention(16, 2, window, 0.0, is_grid=is_grid)
    randomise(module).double()
    for size in [(1, 1), (2, 9), (5, 3), (7, 14), (8, 8), (13, 6), (9, 15)]:
        x = image(*size, chans=16).double().permute(0, 2, 3, 1)
        y = module.norm1(x)
        with torch.set_grad_enabled(has_gradient):
            actual = attend_to_real_tokens(y, module.attn, is_grid=is_grid)
        with torch.no_grad():
            expected = attend_by_definition(y[0], module.attn, is_grid)
        assert (actual[0] - expected).abs().max() < 1e-12, size


@pytest.mark.parametrize("value", [3.7, -1e6])
def test_what_padding_holds_changes_nothing(value, small, monkeypatch):
    x = image(97, 131)
    expected = small(x)

    calls = []

    def pad(x, size):
        if x.dtype == torch.bool:  # the mask
            return pad_to_windows(x, size)
        calls.append(x.shape)
        whole = [-(-n // side) * side for n, side in zip(x.shape[1:3], size, strict=True)]
        padded = x.new_full((len(x), *whole, x.shape[3]), value)
        padded[:, : x.shape[1], : x.shape[2]] = x
        return padded

    monkeypatch.setattr(windows, "pad_to_windows", pad)
    assert torch.equal(small(x), expected) and len(calls) == 8


@pytest.mark.parametrize("size", [(1, 1), (33, 65), (97, 131)], ids=str)
def test_any_size_gives_finite_maps_and_gradients_and_images_stay_apart(size, small):
    x = image(*size, batch=2).requires_grad_()
    maps = small.forward_intermediates(x, intermediates_only=True)
    loss_of(maps).backward()
    assert [m.shape[2:] for m in maps] == [
        tuple(-(-n // stride) for n in size) for stride in (4, 8, 16, 32)
    ]
    assert x.grad.isfinite().all() and all(m.isfinite().all() for m in maps)
    trunk = [p.grad for n, p in small.named_parameters() if not n.startswith("head.")]
    assert all(g.isfinite().all() for g in trunk)
    with torch.no_grad():
        inference = small.forward_intermediates(x, intermediates_only=True)
        alone = small.forward_intermediates(x[1:], intermediates_only=True)
    for m, i, a in zip(maps, inference, alone, strict=True):
        assert (i - m).abs().max() < 1e-4 * m.abs().max()
        assert (i[1:] - a).abs().max() < 1e-4 * m.abs().max()


def test_a_window_larger_than_the_map_works():
    model = randomise(timm.create_model("maxvit_tiny", window_size=(40, 3), **SMALL))
    with torch.no_grad():
        maps = model.forward_intermediates(image(64, 96), intermediates_only=True)
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_memory_grows_with_the_pixels(training, small):
    peaks = []
    for side in (150, 300):
        model = timm.create_model("maxvit_tiny", features_only=True, **SMALL).train(training)
        x = image(side, side)
        with PeakMemory() as memory, torch.set_grad_enabled(training):
            loss = loss_of(model(x))
            if training:
                loss.backward()
        peaks.append(memory.peak)
    assert peaks[1] < 4.4 * peaks[0]


# Convolutions and pooling


def same_padding(n, stride):
    """Zeros before and after, as TensorFlow's formula has them for a kernel of 3."""
    total = max((-(-n // stride) - 1) * stride + 3 - n, 0)
    return total // 2, total - total // 2


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_pad_as_tensorflow_does(stride):
    conv = SameConv(4, 4, stride, groups=4)
    for size in [(1, 1), (2, 1), (3, 4), (5, 5), (6, 6), (8, 7)]:
        x = image(*size, chans=4, batch=2)
        (top, bottom), (left, right) = (same_padding(n, stride) for n in size)
        padded = F.pad(x, (left, right, top, bottom))
        expected = F.conv2d(padded, conv.weight, conv.bias, stride, groups=4)
        assert expected.shape[2:] == tuple(-(-n // stride) for n in size)
        assert torch.allclose(conv(x), expected, atol=1e-6)


def test_pooling_divides_by_the_positions_that_there_are():
    for size in [(1, 1), (2, 2), (5, 5), (4, 7)]:
        x = image(*size, chans=2)
        pooled = AvgPool()(x)
        assert pooled.shape[2:] == tuple(-(-n // 2) for n in size)
        for r in range(pooled.shape[2]):
            for s in range(pooled.shape[3]):
                mean = x[:, :, 2 * r : 2 * r + 2, 2 * s : 2 * s + 2].mean((2, 3))
                assert torch.allclose(pooled[:, :, r, s], mean, atol=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (9, 6), (7, 5), (1, 2)], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_inference_of_a_convolutional_block_equals_its_parts(size, fused):
    block = randomise(MBConv(8, 16, 2, 0.0))
    x = image(*size, chans=8, batch=2)
    expected = block(x)  # with gradients, layer by layer
    if fused:
        block.fuse()
    with torch.no_grad():
        assert torch.allclose(block(x), expected, rtol=1e-4, atol=1e-4)


def test_hooks_of_parts_are_called_in_inference(small):
    block = small.stages[1].blocks[0].conv
    x, seen = image(64, 64), []
    with torch.no_grad():
        expected = small(x)
        for part in (block.norm1, block.conv2, small.stem.norm1):
            part.register_forward_hook(lambda module, inputs, output: seen.append(module))
        assert relative_error(small(x), expected) < 1e-5
    assert seen == [small.stem.norm1, block.norm1, block.conv2]


# Head


def test_the_head_normalises_what_is_pooled_and_has_a_hidden_layer(small):
    x = image(64, 96)
    with torch.no_grad():
        features = small.forward_features(x)
        maps = small.forward_intermediates(x, intermediates_only=True)
        assert torch.equal(features, maps[-1])  # no norm before pooling
        head = small.head
        normed = F.layer_norm(features.mean((2, 3)), (64,), head.norm.weight, head.norm.bias)
        hidden = torch.tanh(F.linear(normed, head.hidden.weight, head.hidden.bias))
        logits = F.linear(hidden, head.fc.weight, head.fc.bias)
        assert relative_error(small.forward_head(features, pre_logits=True), hidden) < 1e-5
        assert relative_error(small(x), logits) < 1e-5


def test_another_classifier_keeps_the_hidden_layer(small):
    assert small.classifier_names() == "head.fc"
    hidden = small.head.hidden
    before = hidden.weight.clone()
    small.reset_classifier(5)
    assert small.head.hidden is hidden and torch.equal(hidden.weight, before)
    small.reset_classifier(0)
    assert small.head.hidden is hidden and small.classifier_names() is None
    small.reset_classifier(0, "")
    assert not list(small.head.parameters())
    small.reset_classifier(7, "catavgmax")
    assert small(image(64, 64)).shape == (1, 7)
    assert small.head.hidden.in_features == small.head_hidden_size == 128


def test_published_weights_with_other_classes_keep_the_hidden_layer(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "weights.pth")
    model = create(tmp_path / "weights.pth", num_classes=3)
    assert torch.equal(model.head.hidden.weight, small.head.hidden.weight)
    assert model.head.fc.weight.shape == (3, 64)


# Windows


def test_tables_of_another_window_are_resized_and_said_to_be(small, tmp_path, caplog):
    torch.save(small.state_dict(), tmp_path / "weights.pth")
    with caplog.at_level(logging.INFO, "densezoo"):
        model = create(tmp_path / "weights.pth", window_size=12, grid_size=(5, 12)).eval()
    assert (
        "4 tables of relative position bias from windows of 7x7 to 12x12 tokens by bilinear "
        "interpolation" in caplog.text
    )
    assert "4 tables of relative position bias from windows of 7x7 to 5x12 tokens" in caplog.text
    for key, value in model.state_dict().items():
        expected = small.state_dict()[key]
        if key.endswith("table"):
            sides = (23, 23) if "block_attn" in key else (9, 23)
            expected = F.interpolate(expected[None], sides, mode="bilinear", align_corners=False)[0]
        assert torch.equal(value, expected), key
    small.set_window_size(12, (5, 12))
    assert small.window_size == (12, 12) and small.grid_size == (5, 12)
    x = image(97, 131)
    with torch.no_grad():
        assert relative_error(small(x), model(x)) < 1e-5
    assert torch.equal(
        small.stages[0].blocks[0].grid_attn.attn.rel_pos_bias.table,
        model.stages[0].blocks[0].grid_attn.attn.rel_pos_bias.table,
    )


def test_windows_set_anew_keep_frozen_tables_frozen(small):
    small.requires_grad_(False)
    small.set_window_size("fit:100x64")
    assert small.window_size == (4, 2)
    assert not [n for n, p in small.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(window_size=0), "window_size is 0"),
        (dict(window_size=-7), "window_size is -7"),
        (dict(window_size=7.0), "window_size is 7.0"),
        (dict(window_size=True), "window_size is True"),
        (dict(window_size=(7, 0)), r"window_size is \(7, 0\)"),
        (dict(window_size=(7, 7, 7)), r"window_size is \(7, 7, 7\)"),
        (dict(window_size="fit:224"), "window_size is 'fit:224'.*\"fit:HxW\""),
        (dict(window_size="fit:0x224"), "window_size is 'fit:0x224'"),
        (dict(grid_size=0), "grid_size is 0"),
        (dict(head_dim=24), r"head_dim is 24: a divisor of all of dims \(64"),
        (dict(head_dim=0), "head_dim is 0"),
        (dict(dims=(2, 4, 8, 8), head_dim=1), "the least of dims is 2"),
        (dict(stem_dim=0), "stem_dim is 0"),
        (dict(drop_rate=2), "drop_rate is 2"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("maxvit_tiny", device="meta", **arguments)


def test_bad_windows_set_anew_are_named_and_change_nothing(small):
    with pytest.raises(ValueError, match="grid_size is -1"):
        small.set_window_size(12, -1)
    assert small.window_size == (7, 7)
    assert small.stages[0].blocks[0].block_attn.attn.window_size == (7, 7)


@pytest.mark.parametrize("name", ["nat_mini", "cas_vit_xs"])
def test_a_checkpoint_of_another_family_is_refused_by_name(name, tmp_path):
    torch.save(timm.create_model(name, depths=(1, 1, 1, 1)).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="maxvit_tiny: .* of MaxViT in the checkpoint"):
        create(tmp_path / "weights.pth")


# What it is made of


def test_parts_start_as_in_the_official_code():
    torch.manual_seed(0)
    model = timm.create_model("maxvit_tiny", depths=(1, 1, 1, 1))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.numel() > 2000:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
    batch_norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(batch_norms) == 1 + 3 * 4
    assert {(m.eps, m.momentum) for m in batch_norms} == {(1e-3, 0.01)}
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


def test_tables_need_no_weight_decay():
    model = timm.create_model("maxvit_tiny", device="meta")
    tables = {n for n, p in model.named_parameters() if n.endswith("rel_pos_bias.table")}
    assert model.no_weight_decay() == tables and len(tables) == 2 * 11


def test_all_branches_of_a_block_share_a_rate():
    model = timm.create_model("maxvit_tiny", device="meta", drop_path_rate=0.2)
    blocks = [block for stage in model.stages for block in stage.blocks]
    for i, block in enumerate(blocks):
        parts = block.conv, block.block_attn, block.grid_attn
        rates = [part.drop_path.drop_prob for part in parts]
        assert rates == pytest.approx([0.2 * i / 10] * 3)


# Weights by tag


@pytest.mark.parametrize("name, tag", ALL_TAGS, ids=str)
def test_a_tag_is_timms_file_with_its_size_and_window(name, tag):
    data, _, size = tag.rpartition("_") if tag[-1].isdigit() else (tag, "", "224")
    peer = get_pretrained_cfg(f"{name}_tf_{size}.{data}").to_dict()
    model = timm.create_model(f"{name}.{tag}", device="meta", depths=(1, 1, 1, 1))
    cfg = model.pretrained_cfg
    for key in ("hf_hub_id", "input_size", "crop_pct", "mean", "std", "num_classes"):
        assert cfg[key] == peer[key], key
    assert cfg.get("crop_mode", "center") == peer.get("crop_mode", "center")
    assert cfg["tag"] == tag and cfg["architecture"] == name
    assert model.window_size == model.grid_size == (int(size) // 32,) * 2
    assert model.num_classes == (21843 if data == "in21k" else 1000)


@pytest.mark.slow
@pytest.mark.parametrize("name, tag", ALL_TAGS, ids=str)
def test_parameters_of_a_tag_are_the_published_ones(name, tag):
    published = find_weights(f"{name}.{tag}").published
    model = timm.create_model(f"{name}.{tag}", device="meta")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert round_as(published.params, millions) == published.params


def test_a_name_alone_stands_for_the_first_tag_and_arguments_go_before_a_tags():
    assert [list(BACKBONES[f"maxvit_{n}"].tags)[0] for n in ("tiny", "xlarge")] == ["in1k", "in21k"]
    assert timm.create_model("maxvit_tiny", **SMALL).pretrained_cfg["tag"] == "in1k"
    model = timm.create_model("maxvit_tiny.in1k_384", window_size=16, grid_size=8, **SMALL)
    assert (model.window_size, model.grid_size) == ((16, 16), (8, 8))
    features = timm.create_model("maxvit_base.in21k_ft_in1k_512", features_only=True, **SMALL)
    table = features.get_parameter("model.stages.0.blocks.0.grid_attn.attn.rel_pos_bias.table")
    assert table.shape == (1, 31, 31)


def test_an_unknown_tag_is_named_with_those_that_there_are():
    for use in (timm.create_model, check_model_name):
        with pytest.raises(ValueError, match="in1k_999.*there are in1k, in1k_384, in1k_512$"):
            use("maxvit_tiny.in1k_999")


def test_a_model_saved_for_the_hub_keeps_the_windows_of_its_tag(tmp_path):
    model = timm.create_model("maxvit_tiny.in1k_384", **SMALL)
    save_for_hf(model, tmp_path / "hub", model_args=SMALL, safe_serialization=True)
    assert json.loads((tmp_path / "hub/config.json").read_text())["pretrained_cfg"]["tag"]
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    assert again.window_size == (12, 12)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_weights_that_cannot_be_downloaded_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"maxvit_tiny_tf_384\.in1k, can't be downloaded.*file="):
        timm.create_model("maxvit_tiny.in1k_384", pretrained=True, cache_dir=tmp_path)
