"""What GC ViT alone has: timm's own as a peer, the dense form, windows, tables, tags."""

import logging
import re

import pytest
import timm
import torch
from oracles import (
    dense,
    image,
    load_cases,
    make_checkpoint,
    make_state_dict,
    relative_error,
)
from timm.models.gcvit import GlobalContextVit
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from densezoo.backbones import GCViT
from densezoo.backbones.gc_vit import Block, GCViTStage, GlobalQuery

CASES = load_cases()
OFFICIAL, CASE = CASES["gc_vit_xxtiny-classification-224x224-0"]
OWN = (7, 7, 14, 7)
TWO_BLOCKS = dict(depths=(2, 2, 2, 2))
SMALL = dict(TWO_BLOCKS, dims=(32, 64, 128, 256), num_heads=(1, 2, 4, 8))


def create(path, name="gc_vit_xxtiny", **arguments):
    overlay = dict(file=str(path))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


def saved(tmp_path, state):
    torch.save(state, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


def windows_of(model):
    """Sides of the windows that the blocks, their bias tables and the queries have, by stage."""
    for stage in model.stages:
        size = stage.global_query.window_size
        for block in stage.blocks:
            assert block.window_size == block.attn.rel_pos_bias.window_size == size
            assert block.attn.rel_pos_bias.table.shape[1:] == tuple(2 * n - 1 for n in size)
        assert size[0] == size[1]
    return tuple(stage.global_query.window_size[0] for stage in model.stages)


def pools_of(model):
    return tuple(stage.global_query.num_pools for stage in model.stages)


def reports(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("densezoo")]


# timm's own model


def peers(tmp_path, depths, layer_scale=None):
    """timm's model with weights that leave no part idle, and ours with the same file."""
    torch.manual_seed(0)
    arguments = dict(depths=depths, num_heads=(1, 2, 4, 8), layer_scale=layer_scale)
    peer = GlobalContextVit(embed_dim=32, **arguments)
    for key, parameter in peer.named_parameters():
        if key.endswith(("gamma", "table", "bias")):  # near zero at first
            nn.init.normal_(parameter, std=0.3)
    path = saved(tmp_path, peer.state_dict())
    return peer, create(path, dims=(32, 64, 128, 256), **arguments)


@pytest.mark.parametrize("layer_scale", [None, 1e-5])
def test_it_computes_what_timms_own_model_does(layer_scale, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "densezoo"):
        peer, model = peers(tmp_path, (3, 2, 4, 2), layer_scale)
    assert re.search(r"\(timm keys\); 0 missing; 0 unexpected; 0 reshaped", caplog.text)
    x = image(224, 224, batch=3)
    with torch.no_grad():
        assert relative_error(model.eval()(x), peer.eval()(x)) < 1e-4


def test_a_training_step_has_the_gradients_of_timms_own_model(tmp_path):
    peer, model = peers(tmp_path, (2, 2, 2, 2))
    x = image(224, 224, batch=3).double()
    for one in (model, peer):
        one.double().train()(x).square().mean().backward()
    # Of the checkpoint of a model whose weights are its gradients, ours has to be as much.
    theirs = {k: p.grad.float() for k, p in peer.named_parameters()}
    expected = create(saved(tmp_path, theirs), **SMALL)
    for (name, one), two in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert relative_error(one.grad, two) < 1e-5, name


# The dense form, windows


def test_the_dense_form_has_windows_of_24_and_pools_a_third_stage_whose_window_is_not_14():
    def build(**arguments):
        return timm.create_model("gc_vit_xxtiny", **TWO_BLOCKS, **arguments)

    assert (windows_of(build()), pools_of(build())) == (OWN, (3, 2, 0, 0))
    at_384 = build(window_size=(12, 12, 24, 12))
    assert (windows_of(at_384), pools_of(at_384)) == ((12, 12, 24, 12), (3, 2, 0, 0))
    for inner in (
        build(features_only=True).model,
        dense("gc_vit_xxtiny", model_kwargs=TWO_BLOCKS).model.model,
    ):
        assert (windows_of(inner), pools_of(inner)) == ((24,) * 4, (3, 2, 1, 0))
    of_others = build(features_only=True, window_size=[7, 7, 14, 7]).model
    assert (windows_of(of_others), pools_of(of_others)) == (OWN, (3, 2, 0, 0))
    assert windows_of(build(features_only=True, window_size=8).model) == (8,) * 4
    assert pools_of(build(features_only=True, is_dense=False).model) == (3, 2, 0, 0)


def test_a_stage_without_global_blocks_has_no_query():
    model = GCViT(**{**SMALL, "depths": (1, 2, 1, 1)})
    assert [stage.global_query is None for stage in model.stages] == [True, False, True, True]
    model(image(64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("size", [(56, 112), (224, 224), (100, 60)], ids=str)
def test_windows_cut_once_for_a_stage_are_those_that_each_block_cuts(size):
    torch.manual_seed(0)
    model = GCViT(**SMALL).eval()
    with torch.no_grad():
        x = model.stem(image(*size, batch=2))
        for stage in model.stages:
            expected = stage.downsample(x)
            query = stage.global_query(expected)
            expected = expected.permute(0, 2, 3, 1)
            for block in stage.blocks:
                expected = block(expected, query)
            x = stage(x)
            assert relative_error(x, expected.permute(0, 3, 1, 2)) < 1e-5


@pytest.mark.parametrize("has_gradient", [False, True], ids=["inference", "training"])
def test_a_batch_without_images_gives_maps_without_images(has_gradient):
    model = GCViT(**SMALL)
    with torch.set_grad_enabled(has_gradient):
        for size in [(64, 64), (224, 224)]:
            maps = model.forward_intermediates(torch.empty(0, 3, *size), intermediates_only=True)
            assert [m.shape[0] for m in maps] == [0] * 4
            assert maps[0].shape[2:] == (size[0] // 4, size[1] // 4)


def small_stage(dim=16):
    """A stage of a local and a global block, windows of 6, that pools its query twice."""
    torch.manual_seed(0)
    arguments = dict(mlp_ratio=2.0, layer_scale=None, rate=0.0)
    blocks = [Block(dim, 2, (6, 6), is_global=i == 1, **arguments) for i in range(2)]
    return GCViTStage(nn.Identity(), GlobalQuery(dim, 2, (6, 6), 2, 2), blocks)


# Maps that divide into windows and that do not, one window and many, smaller than a window; large
# enough for a pooled query of two rows and columns, since tracers take one for a case of its own.
MAPS = [(8, 13), (12, 12), (30, 11), (6, 6), (5, 7)]


def test_a_stage_is_one_exported_program_for_maps_of_any_size():
    stage = small_stage().eval()
    axes = {0: Dim("batch", min=1), 2: Dim("height", min=5), 3: Dim("width", min=5)}
    x = torch.randn(2, 16, 8, 13)
    with torch.no_grad():
        program = torch.export.export(stage, (x,), dynamic_shapes=(axes,), strict=False).module()
        for batch, size in enumerate(MAPS, 1):
            x = torch.randn(batch, 16, *size)
            assert relative_error(program(x), stage(x)) < 1e-5, size


def test_stochastic_depth_drops_a_branch_of_all_windows_of_an_image():
    torch.manual_seed(0)
    block = Block(8, 2, (2, 2), is_global=False, mlp_ratio=2.0, layer_scale=None, rate=0.5).train()
    x = torch.randn(64, 3, 2, 2, 8)  # 3 windows an image
    is_kept = (block(x) != x).flatten(2).any(2)
    assert torch.equal(is_kept.all(1), is_kept.any(1))
    assert 0 < is_kept.sum() < is_kept.numel()


# Checkpoints


@pytest.fixture
def official():
    return make_state_dict(OFFICIAL["keys"])


def test_index_buffers_of_other_windows_are_ignored(official, tmp_path, caplog):
    index = [k for k in official if k.endswith("relative_position_index")]
    for key in index or [k[: -len("bias_table")] + "index" for k in official if "bias_table" in k]:
        official[key] = torch.zeros(576, 576, dtype=torch.long)
    with caplog.at_level(logging.INFO, "densezoo"):
        create(saved(tmp_path, official))
    assert re.search(r"\(official keys\); 0 missing; 0 unexpected; 0 reshaped", caplog.text)


def table_of(official, stage, block=0):
    """A published table as (heads, rows, columns), of offsets of key minus query."""
    table = official[f"levels.{stage}.blocks.{block}.attn.relative_position_bias_table"]
    side = round(len(table) ** 0.5)
    return table.view(side, side, -1).permute(2, 0, 1).flip(1, 2)


def test_tables_hold_offsets_of_query_minus_key_in_files_and_the_opposite_here(official, tmp_path):
    model = create(saved(tmp_path, official))
    name = "levels.2.blocks.3.attn.relative_position_bias_table"
    table, bias = official[name], model.stages[2].blocks[3].attn.rel_pos_bias()
    for query, key in [((0, 0), (13, 13)), ((5, 2), (1, 9)), ((7, 7), (7, 7))]:
        row = (query[0] - key[0] + 13) * 27 + query[1] - key[1] + 13
        pair = query[0] * 14 + query[1], key[0] * 14 + key[1]
        assert torch.equal(bias[:, pair[0], pair[1]], table[row])


@pytest.mark.parametrize(
    "window_size, lines",
    [
        (
            24,
            ["6 tables of {} from window_size 7 to 24", "6 tables of {} from window_size 14 to 24"],
        ),
        (
            (9, 7, 12, 7),
            ["2 tables of {} from window_size 7 to 9", "6 tables of {} from window_size 14 to 12"],
        ),
    ],
    ids=str,
)
def test_tables_of_other_windows_are_resized_and_that_is_said(
    window_size, lines, official, tmp_path, caplog
):
    with caplog.at_level(logging.INFO, "densezoo"):
        model = create(saved(tmp_path, official), window_size=window_size)
    lines = [line.format("relative position bias") for line in lines]
    assert f"2 reshaped: {lines[0]} by bicubic interpolation, {lines[1]} by" in caplog.text
    for i, stage in enumerate(model.stages):
        own = stage.blocks[1].attn.rel_pos_bias.table
        expected = F.interpolate(
            table_of(official, i, 1)[None], own.shape[1:], mode="bicubic", align_corners=False
        )
        assert relative_error(own, expected[0]) < 1e-5


def test_a_published_detectors_file_loads_as_it_is(official, tmp_path, caplog):
    generator = torch.Generator().manual_seed(0)
    state = {k: v for k, v in official.items() if not k.startswith(("norm.", "head."))}
    for key in [k for k in state if k.endswith("bias_table")]:
        state[key] = torch.randn(47 * 47, state[key].shape[1], generator=generator)
    for i, dim in enumerate((64, 128, 256, 512)):
        state[f"norm{i}.weight"] = torch.randn(dim, generator=generator)
        state[f"norm{i}.bias"] = torch.randn(dim, generator=generator)
    path = str(saved(tmp_path, {"state_dict": {f"backbone.{k}": v for k, v in state.items()}}))
    with caplog.at_level(logging.INFO, "densezoo"):
        model = dense("gc_vit_xxtiny", out_norms=True, pretrained=path)
    missing = "4 missing: norm.weight, norm.bias, head.fc.weight, head.fc.bias"
    assert f"{missing}; 0 unexpected; 0 reshaped" in caplog.text
    assert "8 of 8 entries of out_norms loaded" in caplog.text
    assert torch.equal(model.out_norms["2"].weight, state["norm2.weight"])
    assert all(norm.eps == 1e-5 for norm in model.out_norms.values())
    inner = model.model.model
    for stage, block in [(0, 1), (2, 5)]:
        table = inner.stages[stage].blocks[block].attn.rel_pos_bias.table
        assert torch.equal(table, table_of(state, stage, block))
    # And a classifier takes them back, resized.
    state |= {k: v for k, v in official.items() if k.startswith(("norm.", "head."))}
    create(saved(tmp_path, state))
    assert "from window_size 24 to 14 by bicubic" in caplog.text


def test_a_checkpoint_of_another_family_is_refused_by_name(tmp_path):
    nat = make_checkpoint(*CASES["nat_mini-classification-224x224-0"])
    with pytest.raises(ValueError, match="gc_vit_xxtiny: .* of GCViT .*another model"):
        create(saved(tmp_path, nat))


def test_a_checkpoint_of_another_variant_is_refused_by_name(official, tmp_path):
    with pytest.raises(ValueError, match="gc_vit_xxtiny: .*another variant"):
        create(saved(tmp_path, official), **SMALL | dict(depths=(2, 2, 6, 2)))


TAGS = {
    "": (OWN, 224),
    ".in1k": (OWN, 224),
    ".in21k_ft_in1k": (OWN, 224),
    ".in21k_ft_in1k_384": ((12, 12, 24, 12), 384),
    ".in21k_ft_in1k_512": ((16, 16, 32, 16), 512),
}


@pytest.mark.parametrize("tag", TAGS)
def test_the_files_of_gc_vit_large_come_with_their_windows(tag):
    windows, size = TAGS[tag]
    arguments = dict(SMALL, device="meta")
    model = timm.create_model(f"gc_vit_large{tag}", **arguments)
    assert windows_of(model) == windows
    assert model.pretrained_cfg["input_size"] == (3, size, size)
    assert model.pretrained_cfg["license"] == "cc-by-nc-sa-4.0"
    assert pools_of(model) == (3, 2, 0, 0)
    given = timm.create_model(f"gc_vit_large{tag}", window_size=8, **arguments)
    assert windows_of(given) == (8,) * 4
    features = timm.create_model(f"gc_vit_large{tag}", features_only=True, **arguments)
    assert windows_of(features.model) == (24,) * 4


@pytest.mark.parametrize("tag", list(TAGS)[-2:])
def test_the_larger_windows_have_the_published_number_of_parameters(tag):
    model = timm.create_model(f"gc_vit_large{tag}", device="meta")
    params = sum(p.numel() for p in model.parameters())
    assert params == {384: 202_860_610, 512: 203_795_362}[TAGS[tag][1]]


def test_a_tag_of_weights_without_tags_is_refused_in_a_whole_sentence():
    with pytest.raises(ValueError, match="'in1k' of gc_vit_xxtiny: the name alone is enough$"):
        timm.create_model("gc_vit_xxtiny.in1k", device="meta")


# Initialisation and arguments


def test_initialisation_is_the_authors():
    torch.manual_seed(0)
    model = timm.create_model("gc_vit_small", **TWO_BLOCKS)
    for name, parameter in model.named_parameters():
        is_linear = parameter.ndim == 2 or ".se." in name
        if is_linear or name.endswith("bias_table"):
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1), name
        elif name.endswith(("gamma1", "gamma2")):
            assert (parameter == 1e-5).all()
        elif name.endswith("bias") and name != "stem.conv1.bias":
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all()
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 9 + 2 * 8 and {norm.eps for norm in norms} == {1e-5}


def test_tables_alone_are_exempt_from_weight_decay_beside_vectors():
    model = timm.create_model("gc_vit_xxtiny", device="meta")
    tables = {n for n, p in model.named_parameters() if p.ndim == 3}
    assert model.no_weight_decay() == tables and len(tables) == 12


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(window_size=0), "window_size is 0: a whole number of at least 1, or four"),
        (dict(window_size=-7), "window_size is -7"),
        (dict(window_size=7.0), "window_size is 7.0"),
        (dict(window_size="7"), "window_size is '7'"),
        (dict(window_size=(7, 7)), r"window_size is \(7, 7\)"),
        (dict(window_size=(7, 7, 0, 7)), r"window_size is \(7, 7, 0, 7\)"),
        (dict(num_heads=(2, 4, 8, 15)), r"num_heads is \(2, 4, 8, 15\): divisors of dims \(64"),
        (dict(num_heads=(2, 4, 8)), r"num_heads is \(2, 4, 8\): four"),
        (dict(num_heads=2), "num_heads is 2: four"),
        (dict(num_heads=(2, 4, 0, 16)), "num_heads is .*: four"),
        (dict(dims=(2, 4, 8, 16), num_heads=(1, 1, 1, 1)), r"dims\[0\] is 2"),
        (dict(mlp_ratio=0), "mlp_ratio is 0"),
        (dict(layer_scale=-1), "layer_scale is -1"),
        (dict(is_dense="yes"), "is_dense is 'yes'"),
        (dict(drop_rate=2), "drop_rate is 2"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("gc_vit_xxtiny", device="meta", **arguments)
