"""What BiFormer alone has: any size by its two kinds of padding, its files, its designs.

`transcription` is the authors' model written once more from its definition, with loops over
regions, on a state dict of their names; it shares no code with the package.
"""

import logging

import pytest
import timm
import torch
from oracles import (
    dense,
    error,
    gradient_error,
    image,
    load_cases,
    make_checkpoint,
    make_input,
    make_state_dict,
    relative_error,
)
from torch import nn
from torch.nn import functional as F

from densezoo.backbones import BiFormer, BiFormerSTL
from densezoo.tools.step_memory import measure_peak

CASES = load_cases()
FILES = {case_file["model_name"]: case_file for case_file, _ in CASES.values()}
TOPK = (1, 4, 16)
# Of each design a model of one block a stage and few channels.
DIMS = (16, 32, 64, 64)
SMALL = dict(depths=(1, 1, 1, 1), dims=DIMS, head_dim=16)
DESIGNS = ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"]
FULL = {
    "biformer_tiny": ((2, 2, 8, 2), (64, 128, 256, 512)),
    "biformer_small": ((4, 4, 18, 4), (64, 128, 256, 512)),
    "biformer_base": ((4, 4, 18, 4), (96, 192, 384, 768)),
    "biformer_stl": ((2, 2, 6, 2), (96, 192, 384, 768)),
    "biformer_stl_nchw": ((2, 2, 6, 2), (96, 192, 384, 768)),
}


def keys_of(name, depths, dims, classes=1000):
    """Entries of an official checkpoint, as a case file lists them."""
    is_stl, is_nchw = "stl" in name, name.endswith("nchw")
    ones = (1, 1) if is_nchw else ()
    keys = []

    def put(entry, *shape, bias=True):
        keys.append((f"{entry}.weight", shape, "param"))
        if bias:
            keys.append((f"{entry}.bias", shape[:1], "param"))

    def put_norm(entry, dim):
        put(entry, dim)
        keys.extend((f"{entry}.running_{k}", (dim,), "buffer") for k in ("mean", "var"))
        keys.append((f"{entry}.num_batches_tracked", (), "counter"))

    if is_stl:
        put("downsample_layers.0.0", dims[0], 3, 4, 4)
        put_norm("downsample_layers.0.1", dims[0])
    else:
        put("downsample_layers.0.0", dims[0] // 2, 3, 3, 3)
        put_norm("downsample_layers.0.1", dims[0] // 2)
        put("downsample_layers.0.3", dims[0], dims[0] // 2, 3, 3)
        put_norm("downsample_layers.0.4", dims[0])
    for i in (1, 2, 3):
        before, dim = dims[i - 1 : i + 1]
        side = 2 if is_stl else 3
        put(f"downsample_layers.{i}.{int(is_stl)}", dim, before, side, side)
        put_norm(f"downsample_layers.{i}.{int(not is_stl)}", before if is_stl else dim)
    for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        hidden = (4 if is_stl else 3) * dim
        for j in range(depth):
            block = f"stages.{i}.blocks.{j}" if is_stl else f"stages.{i}.{j}"
            if not is_stl:
                put(f"{block}.pos_embed", dim, 1, 3, 3)
            put(f"{block}.norm1", dim)
            if i < 3:
                qkv, out = ("qkv_linear", "output_linear") if is_nchw else ("qkv.qkv", "wo")
                put(f"{block}.attn.{qkv}", 3 * dim, dim, *ones)
                put(f"{block}.attn.{out}", dim, dim, *ones)
            else:
                put(f"{block}.attn.qkv", 3 * dim, dim, *ones, bias=False)
                put(f"{block}.attn.proj", dim, dim, *ones)
            put(f"{block}.attn.lepe", dim, 1, 5, 5)
            put(f"{block}.norm2", dim)
            put(f"{block}.mlp.0", hidden, dim, *ones)
            put(f"{block}.mlp.{2 if is_stl else 3}", dim, hidden, *ones)
    put_norm("norm", dims[-1])
    put("head", classes, dims[-1])
    return keys


def routed(q, k, v, rows, columns, topk, num_heads, scale, is_ragged):
    """Token attention of (B, H, W, C) maps region by region, each given by its token slices.

    `rows` and `columns` are (start, end) of the regions; maps are those with padding. Ragged, an
    edge region's mean is that of `is_ragged`'s (H, W) alone.
    """
    regions = [(slice(*r), slice(*c)) for r in rows for c in columns]
    height, width = is_ragged or q.shape[1:3]
    real = [(slice(r.start, min(r.stop, height)), slice(c.start, min(c.stop, width)))
            for r, c in regions]  # fmt: skip
    out = torch.zeros_like(v)
    for b in range(len(q)):
        q_mean = torch.stack([q[b][place].flatten(0, 1).mean(0) for place in real]).detach()
        k_mean = torch.stack([k[b][place].flatten(0, 1).mean(0) for place in real]).detach()
        best = (q_mean @ k_mean.T).topk(min(topk, len(regions)), dim=-1).indices
        for place, routes in zip(regions, best.tolist(), strict=True):
            keys = torch.cat([k[b][regions[r]].flatten(0, 1) for r in routes])
            values = torch.cat([v[b][regions[r]].flatten(0, 1) for r in routes])
            tokens = q[b][place]
            heads = [
                (scale * a.flatten(0, 1) @ c.T).softmax(-1) @ d
                for a, c, d in zip(
                    tokens.chunk(num_heads, -1), keys.chunk(num_heads, -1),
                    values.chunk(num_heads, -1), strict=True,
                )
            ]  # fmt: skip
            joined = torch.cat(heads, -1).view(*tokens.shape[:2], -1)
            out[b][place] = joined
    return out


def cut_axis(side, size):
    return [(start, start + size) for start in range(0, side, size)]


def transcription(state, x, name, depths, head_dim, num_regions, topk=TOPK):
    """The stage maps and logits of the authors' model, in evaluation mode."""
    is_stl, is_nchw = "stl" in name, name.endswith("nchw")

    def get(entry):
        return state.get(entry)

    def linear(entry, x):
        weight = get(f"{entry}.weight")
        return F.linear(x, weight.flatten(1), get(f"{entry}.bias"))

    def norm(entry, x):
        return F.layer_norm(x, x.shape[-1:], get(f"{entry}.weight"), get(f"{entry}.bias"), 1e-6)

    def batch_norm(entry, x):
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(get(f"{entry}.{n}") for n in names), eps=1e-5)

    def conv(entry, x, **options):
        return F.conv2d(x, get(f"{entry}.weight"), get(f"{entry}.bias"), **options)

    def patches(entry, x, side):
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % side, 0, -height % side))
        return conv(entry, x, stride=side)

    def lepe(entry, x):
        dim = x.shape[-1]
        y = conv(entry, x.permute(0, 3, 1, 2), padding=2, groups=dim)
        return y.permute(0, 2, 3, 1)

    def routing(block, x, stage):
        height, width, dim = x.shape[1:]
        heads, k = dim // head_dim, topk[stage]
        if is_nchw:
            q, key, v = linear(f"{block}.attn.qkv_linear", x).chunk(3, -1)
            size = [max(1, side // num_regions) for side in (height, width)]
            pad = (0, 0, 0, -width % size[1], 0, -height % size[0])
            out = routed(
                *(F.pad(part, pad) for part in (q, key, v)),
                cut_axis(height, size[0]), cut_axis(width, size[1]), k, heads, dim**-0.5,
                (height, width),
            )  # fmt: skip
            out = out[:, :height, :width] + lepe(f"{block}.attn.lepe", v)
            return linear(f"{block}.attn.output_linear", out)
        x = F.pad(x, (0, 0, 0, -width % num_regions, 0, -height % num_regions))
        q, key, v = linear(f"{block}.attn.qkv.qkv", x).chunk(3, -1)
        places = [cut_axis(side, side // num_regions) for side in x.shape[1:3]]
        out = routed(q, key, v, *places, k, heads, dim**-0.5, None)
        out = out + lepe(f"{block}.attn.lepe", v)
        return linear(f"{block}.attn.wo", out)[:, :height, :width]

    def attention(block, x):
        qkv = linear(f"{block}.attn.qkv", x)
        q, k, v = (part.flatten(1, 2) for part in qkv.chunk(3, -1))
        heads = [
            ((a @ b.transpose(1, 2)) * a.shape[-1] ** -0.5).softmax(-1) @ c
            for a, b, c in zip(q.chunk(8, -1), k.chunk(8, -1), v.chunk(8, -1), strict=True)
        ]
        out = torch.cat(heads, -1).view(x.shape)
        out = out + lepe(f"{block}.attn.lepe", qkv.chunk(3, -1)[2] if is_nchw else x)
        return linear(f"{block}.attn.proj", out)

    stages = []
    for i, depth in enumerate(depths):
        entry = f"downsample_layers.{i}"
        if is_stl and i == 0:
            x = batch_norm(f"{entry}.1", patches(f"{entry}.0", x, 4))
        elif is_stl:
            x = patches(f"{entry}.1", batch_norm(f"{entry}.0", x), 2)
        else:
            x = batch_norm(f"{entry}.1", conv(f"{entry}.0", x, stride=2, padding=1))
            if i == 0:
                x = conv(f"{entry}.3", F.gelu(x), stride=2, padding=1)
                x = batch_norm(f"{entry}.4", x)
        for j in range(depth):
            block = f"stages.{i}.blocks.{j}" if is_stl else f"stages.{i}.{j}"
            if not is_stl:
                x = x + conv(f"{block}.pos_embed", x, padding=1, groups=x.shape[1])
            x = x.permute(0, 2, 3, 1)
            y = norm(f"{block}.norm1", x)
            x = x + (routing(block, y, i) if i < 3 else attention(block, y))
            hidden = F.gelu(linear(f"{block}.mlp.0", norm(f"{block}.norm2", x)))
            x = x + linear(f"{block}.mlp.{2 if is_stl else 3}", hidden)
            x = x.permute(0, 3, 1, 2)
        stages.append(x)
    return stages, linear("head", batch_norm("norm", x).mean((2, 3)))


def create(path, name, **arguments):
    overlay = dict(file=str(path))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


def saved(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


def small_state(name, seed=0):
    return make_state_dict(keys_of(name, SMALL["depths"], DIMS), seed)


def double(state):
    return {k: v.double() if v.is_floating_point() else v for k, v in state.items()}


# Any size


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl_nchw"])
def test_keys_and_transcription_are_the_authors(name):
    assert sorted(map(repr, keys_of(name, *FULL[name]))) == sorted(
        repr((key, tuple(shape), kind)) for key, shape, kind in FILES[name]["keys"]
    )
    case_file, case = next(
        (f, c) for f, c in reversed(CASES.values()) if f["model_name"] == name and "logits" in
        c["outputs"]
    )  # fmt: skip
    state = double(make_checkpoint(case_file, case)["model"])
    x = make_input(case["input"], case["seed"]).double()
    stages, logits = transcription(state, x, name, FULL[name][0], 32, 7)
    expected = case["outputs"]
    assert error(expected["logits"], logits) < 1e-6
    assert max(error(s, m) for s, m in zip(expected["stages"], stages, strict=True)) < 1e-6


# Divisible maps, ragged ones, of one row, smaller than num_regions both ways and one; odd ones.
SIZES = {
    7: [(112, 224), (97, 131), (33, 250), (1, 1), (15, 70)],
    8: [(128, 96), (75, 41), (20, 300)],
    16: [(130, 70), (61, 64)],
}


@pytest.mark.parametrize("num_regions", SIZES)
@pytest.mark.parametrize("name", DESIGNS)
def test_every_size_gives_what_the_authors_definition_does(name, num_regions, tmp_path):
    state = small_state(name)
    path = saved(tmp_path, {"model": state})
    model = create(path, name, **SMALL, num_regions=num_regions).double().eval()
    for i, size in enumerate(SIZES[num_regions]):
        x = image(*size, batch=1 + i % 2).double()
        with torch.no_grad():
            stages, logits = transcription(double(state), x, name, SMALL["depths"], 16, num_regions)
            maps = model.forward_intermediates(x, intermediates_only=True)
            for one, two in zip([*maps, model(x)], [*stages, logits], strict=True):
                assert relative_error(one, two) < 1e-9, size


@pytest.mark.parametrize("name", DESIGNS)
def test_gradients_of_a_ragged_map_are_those_of_the_definition(name, tmp_path):
    state = double(small_state(name))
    model = create(saved(tmp_path, {"model": state}), name, **SMALL).double().eval()
    x = image(75, 41).double()
    model(x).square().sum().backward()
    leaves = {k: v.requires_grad_() for k, v in state.items() if k.endswith(("weight", "bias"))}
    transcription(state, x, name, SMALL["depths"], 16, 7)[1].square().sum().backward()
    # A checkpoint whose weights are the gradients.
    file = {k: leaves[k].grad if k in leaves else v for k, v in state.items()}
    expected = create(saved(tmp_path, {"model": file}), name, **SMALL).double()
    pairs = list(zip(model.parameters(), expected.parameters(), strict=True))
    # The file's numbers are loaded in float32.
    assert gradient_error([p.grad for p, _ in pairs], [e.detach() for _, e in pairs]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("size, num_regions", [((224, 224), 7), ((199, 310), 16)], ids=str)
@pytest.mark.parametrize("name", ["biformer_small", "biformer_base", "biformer_stl"])
def test_the_other_variants_give_what_the_authors_definition_does(
    name, size, num_regions, tmp_path
):
    depths, dims = FULL[name]
    state = make_state_dict(keys_of(name, depths, dims), seed=1)
    model = create(saved(tmp_path, {"model": state}), name, num_regions=num_regions).eval()
    x = image(*size)
    with torch.no_grad():
        exact = transcription(double(state), x.double(), name, depths, 32, num_regions)
        for dtype, bound in ((torch.float32, 1e-3), (torch.float64, 1e-6)):
            model.to(dtype)
            stages, logits = model.forward_intermediates(x.to(dtype))[1], model(x.to(dtype))
            for one, two in zip([*stages, logits], [*exact[0], exact[1]], strict=True):
                assert relative_error(one, two) < bound


# Memory


def test_inference_keeps_twice_the_bytes_of_the_largest_attention_at_most():
    # Of queries, keys, values and outputs of the first stage, whose second block holds the most.
    model = timm.create_model(
        "biformer_small", features_only=True, depths=(2, 1, 1, 1), num_regions=16
    ).eval()
    x = image(800, 1216)
    core = 4 * x[:, 0].numel() // 16 * 64 * 4
    with torch.no_grad():
        peak = measure_peak(lambda: model(x), x.device) * 2**20
    assert core < peak < 2 * core


# Files


DENSE = {
    name: case for name, (case_file, case) in CASES.items()
    if case_file["model_name"] == "biformer_tiny" and "extra_keys" in case
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_a_detectors_norms_are_a_side_branch_and_loaded(name, tmp_path, caplog):
    case_file, case = CASES[name]
    state = make_checkpoint(case_file, case)["model"]
    state = {k: v for k, v in state.items() if k not in case["absent_keys"]}
    state |= make_state_dict(case["extra_keys"], case["seed"])
    path = saved(tmp_path, {"state_dict": {f"backbone.{k}": v for k, v in state.items()}})
    with caplog.at_level(logging.INFO, "densezoo"):
        model = dense(
            "biformer_tiny", out_norms=True, pretrained=str(path), model_kwargs=case["model_kwargs"]
        )
    assert "8 of 8 entries of out_norms loaded" in caplog.text
    assert "0 unexpected; 0 reshaped" in caplog.text
    x = make_input(case["input"], case["seed"]).double()
    with torch.no_grad():
        maps = model.double().eval()(x)
    expected = case["outputs"]["normed_stages"]
    assert max(error(s, m) for s, m in zip(expected, maps, strict=True)) < 1e-6


def test_raw_weights_are_loaded_where_a_file_has_their_average_too(tmp_path):
    raw, average = (small_state("biformer_tiny", seed) for seed in (0, 1))
    entry = "stages.0.0.attn.wo.weight"
    for names in (("model", "model_ema"), ("model_ema", "model")):
        parts = dict(model=raw, model_ema=average)
        path = saved(tmp_path, {"epoch": 299, **{name: parts[name] for name in names}})
        models = [
            create(path, "biformer_tiny", **SMALL),
            create(path, "biformer_tiny", features_only=True, **SMALL).model,
            dense("biformer_tiny", pretrained=str(path), model_kwargs=SMALL).model.model,
        ]
        for model in models:
            assert torch.equal(model.stages[0].blocks[0].attn.proj.weight, raw[entry])


@pytest.mark.parametrize("name, other", [DESIGNS[1:], DESIGNS[:0:-1]], ids=str)
def test_the_two_files_of_one_layout_are_not_taken_for_each_other(name, other, tmp_path):
    message = f"{name}: the checkpoint is of a model with .* regions, .* another function"
    official = {"model": small_state(other)}
    for checkpoint in (official, timm.create_model(other, **SMALL).state_dict()):
        with pytest.raises(ValueError, match=message):
            create(saved(tmp_path, checkpoint), name, **SMALL)


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("is_ragged", [False, True])
def test_what_a_model_saves_it_loads(name, is_ragged, tmp_path):
    arguments = dict(SMALL, is_ragged=is_ragged)
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments)
    path = saved(tmp_path, model.state_dict())
    x = image(40, 56)
    with torch.no_grad():
        assert torch.equal(create(path, name, **arguments).eval()(x), model.eval()(x))


def test_a_checkpoint_of_another_variant_is_refused_by_name(tmp_path):
    path = saved(tmp_path, {"model": small_state("biformer_tiny")})
    with pytest.raises(ValueError, match="biformer_tiny: .*another variant"):
        create(path, "biformer_tiny", **SMALL | dict(dims=(32, 64, 128, 128)))


@pytest.mark.parametrize("name", FULL)
def test_without_a_file_it_says_where_one_is(name):
    with pytest.raises(ValueError, match=rf"{name}_in1k of https://.*listed at .*/BiFormer\)"):
        timm.create_model(name, pretrained=True, **SMALL)


# Initialisation, arguments


def test_linear_layers_begin_truncated_normal_but_in_the_design_of_convolutions():
    for name in ("biformer_tiny", "biformer_stl", "biformer_stl_nchw"):
        torch.manual_seed(0)
        model = timm.create_model(name, depths=(1, 1, 1, 1))
        linears = [m for m in model.stages.modules() if isinstance(m, nn.Linear)]
        assert len(linears) == 16
        for linear in linears:
            std = float(linear.weight.detach().std())
            if name.endswith("nchw"):  # kaiming_uniform_(a=sqrt(5))
                assert std == pytest.approx((3 * linear.in_features) ** -0.5, rel=0.05)
                assert linear.bias is None or linear.bias.any()
            else:
                assert std == pytest.approx(0.02, rel=0.05)
                assert linear.bias is None or not linear.bias.any()
        assert float(model.head.fc.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
        assert len(norms) == 8 and {norm.eps for norm in norms} == {1e-6}


def test_regions_and_topk_are_of_all_three_stages_or_of_each():
    def attentions(**arguments):
        model = BiFormer(**SMALL, **arguments)
        return [stage.blocks[0].attn for stage in model.stages[:3]]

    assert [a.num_regions for a in attentions(num_regions=8)] == [8, 8, 8]
    assert [a.num_regions for a in attentions(num_regions=(16, 8, 4))] == [16, 8, 4]
    assert [a.topk for a in attentions()] == [1, 4, 16]
    assert [a.topk for a in attentions(topk=2)] == [2, 2, 2]
    assert [a.topk for a in attentions(topk=[9, 1, 2], num_regions=3)] == [9, 1, 2]


def test_fused_downsamplers_have_zeros_beyond_the_edge_of_odd_maps():
    torch.manual_seed(0)
    model = BiFormerSTL(**SMALL).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()
    x = image(37, 60).double()
    with torch.no_grad():
        expected = model(x)
        assert relative_error(model.fuse()(x), expected) < 1e-9
        assert relative_error(model.fuse()(x), expected) < 1e-9


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_regions=0), "num_regions is 0: a whole number of at least 1, or three"),
        (dict(num_regions=7.0), "num_regions is 7.0"),
        (dict(num_regions=(7, 7)), r"num_regions is \(7, 7\)"),
        (dict(num_regions="7"), "num_regions is '7'"),
        (dict(num_regions=3), "topk is 16: at most 9 is taken, .* num_regions=3"),
        (dict(topk=0), "topk is 0"),
        (dict(topk=(1, 4, 50)), "topk is 50: at most 49"),
        (dict(topk=(1, 4, 16, -1)), r"topk is \(1, 4, 16, -1\)"),
        (dict(head_dim=48), r"head_dim is 48: a divisor of the first three of dims \(64"),
        (dict(dims=(32, 64, 96, 100)), r"dims\[3\] is 100: a multiple of 8"),
        (dict(dims=(1, 64, 96, 128)), r"dims\[0\] is 1"),
        (dict(mlp_ratio=0), "mlp_ratio is 0"),
        (dict(is_ragged=1), "is_ragged is 1"),
        (dict(drop_rate=2), "drop_rate is 2"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("biformer_tiny", device="meta", **arguments)
