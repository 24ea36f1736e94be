"""What every registered backbone promises. A family inherits these tests by registering.

A family's smallest variant is tested by default, its others by the slow tests, and models too
large to run (`oracles.MOST_PARAMETERS`) by their shapes on the meta device alone. Where a family
has several designs, a class each, the smallest of each is held by default to what depends on how
a resolution is changed (`every_design`).

What does not depend on depth is held on two blocks a stage (`shallow`), with the widths, heads and
windows of the variant; its maps, figures, rounding, fusing and shapes on all of its blocks.

Models of one map, which four stages' clauses do not fit, have tests of their own
(`test_nat_isotropic.py`).
"""

import copy
import functools
import itertools
import math
import os
import pickle
import shutil

import pytest
import timm
import torch
from oracles import (
    FORMS,
    PeakMemory,
    as_list,
    build,
    dense,
    equal_arguments,
    fewest_blocks,
    frozen_and_free,
    gradient_error,
    gradients,
    image,
    load_trunk,
    loss_of,
    norms,
    official_checkpoint,
    relative_error,
    rms_error,
    round_as,
    saved_and_loaded,
    shallow,
    smallest_of_families,
    variants_by_shape,
    variants_of_families,
    without_gradient,
)
from safetensors.torch import load_file, load_model, save_file, save_model
from timm.models._manipulate import group_parameters
from torch.export.passes import move_to_device_pass

from densezoo.backbones.base import HierarchicalBackbone
from densezoo.backbones.cas_vit import CASViT
from densezoo.backbones.registry import BACKBONES
from densezoo.tools import export_files
from densezoo.tools.count_macs import count_macs

every_name = pytest.mark.parametrize("name", variants_of_families())
every_design = pytest.mark.parametrize("name", variants_of_families(every_design=True))
every_name_by_shape = pytest.mark.parametrize("name", [p.values[0] for p in variants_by_shape()])
runnable = {p.values[0] for p in variants_of_families()}
SIZES = [(224, 224), (97, 131), (33, 200)]
LARGE_SIZES = [(256, 320), (480, 640)]
# As many pixels as 64 x 64, and on maps of stride 16 more than one window of 7 x 7.
WIDE = (32, 128)
MAIN_FORMS = ["classifier", "getter", "dense"]
SUBSETS = [s for n in (1, 2, 3, 4) for s in itertools.combinations(range(4), n)]


# The first family is held to more by default of what is the zoo's code and not the family's.
FIRST = "cas_vit_xs"
SMALLEST = set(smallest_of_families().values())


def some_of(combinations, by_default, of_first, of_designs, of_others, make_id):
    """Parameters name, *combination: which of them a variant is held to, and when.

    Args:
        combinations: what the smallest variant of each family is held to.
        by_default: which of them unmarked.
        of_first: which of them unmarked for the first family besides.
        of_designs: which of them unmarked for the smallest of a family's other classes.
        of_others: what any other variant is held to, in the slow tests.
        make_id: from a combination to the beginning of a test's id.
    """
    for parameters in variants_of_families(every_design=True):
        (name,) = parameters.values
        unmarked = by_default if name in SMALLEST else of_designs
        unmarked = [*unmarked, *(of_first if name == FIRST else ())]
        for combination in combinations if name in SMALLEST else of_others:
            is_default = not parameters.marks and combination in unmarked
            marks = () if is_default else pytest.mark.slow
            test_id = f"{make_id(*combination)}-{name}"
            yield pytest.param(name, *combination, marks=marks, id=test_id)


def in_forms(forms, by_default):
    """A test's parameters name and form: all of `forms` by default for the first family alone.

    Of the others those of `by_default`, the rest of their smallest variant in the slow tests.
    """
    params = some_of(
        [(form,) for form in forms],
        by_default=[(form,) for form in by_default],
        of_first=[(form,) for form in forms],
        of_designs=[],
        of_others=[(form,) for form in by_default],
        make_id=str,
    )
    return pytest.mark.parametrize("name, form", list(params))


def create(name, **kwargs):
    """A classifier of two blocks a stage."""
    return timm.create_model(name, **{**shallow(name), **kwargs})


def make(name, form, **kwargs):
    """A model of two blocks a stage in one of its forms."""
    return build(name, form, **{**shallow(name), **kwargs})


def make_dense(name, **kwargs):
    """A `DenseBackbone` of two blocks a stage."""
    return dense(name, model_kwargs=shallow(name), **kwargs)


# Features, at any size


def check_maps(name, sizes, arguments, dtype, bound):
    """Hold every form, with the same weights, to the maps of the classifier and to their shapes."""
    reference = timm.create_model(name, **arguments).eval()
    state = reference.state_dict()
    forms = {form: load_trunk(build(name, form, **arguments), state).eval() for form in FORMS[1:]}
    for model in (reference, *forms.values()):
        model.to(dtype)
    for size in sizes:  # of one instance
        x = image(*size).to(dtype)
        with torch.no_grad():
            expected = reference.forward_intermediates(x, intermediates_only=True)
            maps = {form: as_list(model(x)) for form, model in forms.items()}
        for i, stride in enumerate((4, 8, 16, 32)):
            channels = reference.feature_info[i]["num_chs"]
            assert expected[i].shape == (1, channels, *(math.ceil(n / stride) for n in size))
            for form in forms:
                assert maps[form][i].is_contiguous()
                assert relative_error(maps[form][i], expected[i]) < bound, (form, size)
    for form, model in forms.items():
        if form != "dense":
            assert model.feature_info.channels() == [m.shape[1] for m in expected]
            assert model.feature_info.reduction() == [4, 8, 16, 32]


SIZED = some_of(
    [(SIZES,), (LARGE_SIZES,)],
    by_default=[(SIZES,)],
    of_first=[],
    of_designs=[],
    of_others=[],
    make_id=lambda sizes: "small" if sizes == SIZES else "large",
)


@pytest.mark.parametrize("name, sizes", list(SIZED))
def test_every_form_gives_the_same_maps_of_the_promised_shapes_at_any_size(name, sizes):
    check_maps(name, sizes, shallow(name), torch.float32, 1e-5)


@every_name
def test_every_form_gives_the_same_maps_of_all_its_blocks(name):
    # In float32 the rounding of 24 blocks alone is above the bound.
    sizes = SIZES[1:2] if name in SMALLEST else SIZES[1:]
    check_maps(name, sizes, equal_arguments(name), torch.float64, 1e-12)


ORDERED = some_of(
    [((3, 0),), ((-1, 1),), ((2,),), (2,)],
    by_default=[((3, 0),), (2,)],
    of_first=[((-1, 1),), ((2,),)],
    of_designs=[],
    of_others=[((3, 0),)],
    make_id=str,
)


@pytest.mark.parametrize("name, out_indices", list(ORDERED))
def test_every_form_gives_the_maps_asked_for_in_that_order(name, out_indices):
    reference = create(name).double().eval()
    x = image(97, 131).double()
    with torch.no_grad():
        expected = reference.forward_intermediates(x, out_indices, intermediates_only=True)
    for form in FORMS[1:]:
        if form == "dense":
            model = make_dense(name, out_indices=out_indices)
            channels, strides = model.out_channels, model.out_strides
        else:
            model = make(name, form, out_indices=out_indices)
            channels, strides = model.feature_info.channels(), model.feature_info.reduction()
        load_trunk(model.double(), reference.state_dict())
        with torch.no_grad():
            maps = as_list(model.eval()(x))
        assert [m.shape[1] for m in maps] == channels
        assert [m.shape[2] for m in maps] == [math.ceil(97 / s) for s in strides]
        for m, e in zip(maps, expected, strict=True):
            assert relative_error(m, e) < 1e-10, form


@every_design
def test_images_smaller_than_the_largest_stride_work_or_are_named(name):
    model = create(name, features_only=True).eval()
    for size in [(1, 1), (1, 40), (31, 33), (4, 7)]:
        with torch.no_grad():
            try:
                maps = model(image(*size))
            except ValueError as error:
                assert all(str(n) in str(error) for n in size)
                continue
        for m, stride in zip(maps, (4, 8, 16, 32), strict=True):
            assert m.shape[2:] == tuple(math.ceil(n / stride) for n in size)
            assert m.isfinite().all()


@every_name
def test_forward_intermediates_takes_all_its_options(name):
    model = create(name).eval()
    x = image(97, 131)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        assert relative_error(final, model.forward_features(x)) < 1e-5
        assert relative_error(model.forward_head(final), model(x)) < 1e-5
        (normed,) = model.forward_intermediates(x, [3], norm=True, intermediates_only=True)
        assert relative_error(normed, final) < 1e-5
        early, _ = model.forward_intermediates(x, [0], stop_early=True)
        assert relative_error(early, maps[0]) < 1e-5
        last, _ = model.forward_intermediates(x, [0])
        assert relative_error(last, final) < 1e-5
        (nhwc,) = model.forward_intermediates(x, 1, output_fmt="NHWC", intermediates_only=True)
        assert relative_error(nhwc, maps[3].permute(0, 2, 3, 1)) < 1e-5
        with pytest.raises(ValueError, match="output_fmt"):
            model.forward_intermediates(x, output_fmt="NLC")
        with pytest.raises(ValueError, match="out_indices"):
            model.forward_intermediates(x, [4])


@every_name
def test_pruning_keeps_the_maps_and_drops_what_they_do_not_need(name):
    model = create(name).eval()
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([-3, 0], prune_norm=True) == [1, 0]
    x = image(64, 96)
    with torch.no_grad():
        expected = model.forward_intermediates(x, [1, 0], intermediates_only=True)
        maps = pruned.forward_intermediates(x, [1, 0], intermediates_only=True)
    assert all(torch.equal(m, e) for m, e in zip(maps, expected, strict=True))
    assert {k.split(".")[1] for k in pruned.state_dict() if k.startswith("stages")} == {"0", "1"}
    assert not [k for k in pruned.state_dict() if k.startswith(("norm", "head"))]


@every_design
def test_the_layout_of_outputs_follows_the_image(name):
    model = create(name).eval()
    x = image(64, 96)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for contiguous in (x, image(64, 192)[..., ::2]):
                final, maps = model.forward_intermediates(contiguous)
                assert all(m.is_contiguous() for m in [final, *maps])
                assert model.forward_features(contiguous).is_contiguous()
            last = x.to(memory_format=torch.channels_last)
            maps = model.forward_intermediates(last, intermediates_only=True)
            assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


@every_name
def test_images_of_a_batch_do_not_affect_each_other(name):
    model = create(name).eval()
    x = image(97, 131, batch=2)
    with torch.no_grad():
        assert relative_error(model(x)[1:], model(x[1:])) < 1e-5


@every_design
def test_it_vectorises_over_images(name):
    model = create(name).double().eval()
    x = image(32, 64, batch=3).double()
    with torch.no_grad():
        mapped = torch.vmap(lambda one: model(one[None])[0])(x)
        assert relative_error(mapped, model(x)) < 1e-10


@every_name
def test_inference_changes_neither_the_image_nor_what_hooks_saw(name):
    model = create(name).eval()
    x, seen = image(64, 96), []
    before = x.clone()

    def hook(module, inputs, output):
        seen.append((output, output.clone()))

    watched = [block for stage in model.stages for block in stage.blocks]
    for module in model.modules():
        if type(module).__module__.startswith("densezoo") and not list(module.children()):
            watched.append(module)
    for module in watched:
        module.register_forward_hook(hook)
    with torch.no_grad():
        model(x)
    assert torch.equal(x, before)
    assert seen and all(torch.equal(output, copy) for output, copy in seen)


# Shapes alone, also of models too large to run


@functools.cache
def meta_model(name):
    """A classifier of all its blocks, without memory."""
    return timm.create_model(name, device="meta")


def depths_by_shape():
    """Every name with all its blocks; those too large to run by default with two a stage."""
    by_default = {p.values[0] for p in variants_by_shape() if not p.marks}
    for parameters in variants_by_shape():
        (name,) = parameters.values
        is_smallest = name in runnable and name in by_default
        marks = () if is_smallest else pytest.mark.slow
        yield pytest.param(name, {}, marks=marks, id=f"{name}-all")
        if name not in runnable:
            yield pytest.param(name, shallow(name), id=f"{name}-shallow")


@pytest.mark.parametrize("name, arguments", list(depths_by_shape()))
def test_shapes_and_gradients_of_every_variant_on_the_meta_device(name, arguments):
    with torch.device("meta"):
        features = timm.create_model(name, features_only=True, **arguments)
        model = timm.create_model(name, num_classes=7, **arguments)
        channels = features.feature_info.channels()
        maps = features(torch.empty(2, 3, 97, 131))
        final, of_classifier = model.forward_intermediates(torch.empty(2, 3, 224, 224))
        for found, size in ((maps, (97, 131)), (of_classifier, (224, 224))):
            for m, dim, stride in zip(found, channels, (4, 8, 16, 32), strict=True):
                assert m.shape == (2, dim, *(math.ceil(n / stride) for n in size))
        logits = model.forward_head(final)
        assert logits.shape == (2, 7)
        logits.sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@every_name_by_shape
@pytest.mark.parametrize("coarse", [False, True])
def test_every_parameter_is_in_exactly_one_layer_group(name, coarse):
    model = meta_model(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    names = [n for group in groups.values() for n in group]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    depths = [len(stage.blocks) for stage in model.stages]
    assert len(groups) == 2 + (len(depths) if coarse else sum(depths))
    assert all(n.startswith("stem.") for n in groups[0])
    assert all(n.startswith("head.") for n in groups[len(groups) - 1])
    # The norm with the last block; a family that pools first has it in its head.
    last = groups[len(groups) - 2]
    assert [n for n in last if n.startswith("norm.")] == [n for n in names if n.startswith("norm.")]
    assert model.no_weight_decay() <= set(names)


@every_name_by_shape
def test_parameters_are_the_published_ones_to_their_last_digit(name):
    published = BACKBONES[name].weights.published.params
    millions = sum(p.numel() for p in meta_model(name).parameters()) / 1e6
    # The one figure of three files whose tensors are known to have these numbers.
    known = {"dinat_large": 200.944, "dinat_large_384": 200.944, "dinat_large_384_11x11": 201.144}
    if name in known:
        assert (round(millions, 3), published) == (known[name], 200)
    else:
        assert published is None or round_as(published, millions) == published


@every_name
def test_macs_are_the_published_ones_to_their_last_digit_and_none_is_uncounted(name):
    report = count_macs(name)
    assert report.published == BACKBONES[name].weights.published
    gmacs = report.published.gmacs
    # Authors count norms, as fvcore does, or leave LayerNorm or all of them out.
    norms_macs = [report.operators.get(f"{kind}_norm", 0) for kind in ("layer", "batch")]
    counts = [report.macs, report.macs - norms_macs[0], report.macs - sum(norms_macs)]
    assert gmacs is None or gmacs in [round_as(gmacs, count / 1e9) for count in counts]
    assert report.uncounted == {}


# Gradients and memory


# One stage or all of them, and two or three; a `DenseBackbone` has a getter of its stages within.
FEW, SEVERAL = ([s for s in SUBSETS if (len(s) in (1, 4)) is is_few] for is_few in (True, False))
CHOSEN = some_of(
    list(itertools.product(("dense", "getter"), (FEW, SEVERAL))),
    by_default=[("dense", FEW)],
    of_first=[("dense", SEVERAL), ("getter", FEW)],
    of_designs=[],
    of_others=[("dense", FEW)],
    make_id=lambda form, subsets: f"{form}-{'few' if subsets == FEW else 'several'}",
)


@pytest.mark.parametrize("name, form, subsets", list(CHOSEN))
def test_gradients_reach_every_parameter_for_every_choice_of_stages(name, form, subsets):
    x = image(*WIDE, batch=2)
    for out_indices in subsets:
        if form == "dense":
            model = make_dense(name, out_indices=out_indices, out_norms="batch_norm")
        else:
            model = make(name, form, out_indices=out_indices)
        loss_of(model.train()(x)).backward()
        assert without_gradient(model) == [], out_indices


@every_design
def test_gradients_reach_every_parameter_of_the_classifier(name):
    model = timm.create_model(name).train()
    loss_of(model(image(*WIDE, batch=2))).backward()
    assert without_gradient(model) == []


@in_forms(MAIN_FORMS, by_default=["dense"])
def test_checkpointing_changes_neither_output_nor_gradient_nor_statistics(name, form):
    x = image(*WIDE, batch=2)
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        if form == "dense":
            model = make_dense(name, drop_path_rate=0.3, with_cp=enable)
        else:
            model = make(name, form, drop_path_rate=0.3)
            model.set_grad_checkpointing(enable)
        outputs = as_list(model.train()(x))
        loss_of(outputs).backward()
        results.append([*outputs, *(p.grad for p in model.parameters()), *model.buffers()])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(checkpointed, plain)


@every_name
def test_checkpointing_lowers_the_peak_of_memory_by_a_quarter_and_more(name):
    def peak(enable, batch):
        model = create(name, features_only=True).train()
        model.set_grad_checkpointing(enable)
        with PeakMemory() as memory:
            loss_of(model(image(224, 224, batch=batch))).backward()
        return memory.peak, sum(4 * p.numel() for p in model.parameters())

    # Of two blocks a stage one is held at a time, and the gradients of the weights are: of so many
    # images that those are a small part.
    for batch in (4, 8, 16):
        plain, gradients = peak(False, batch)
        if gradients < plain / 4:
            break
    assert peak(True, batch)[0] < 0.75 * plain


@every_name
def test_drop_path_grows_linearly_over_the_network(name):
    model = timm.create_model(name, drop_path_rate=0.3, device="meta")
    rates = [
        max((getattr(m, "drop_prob", 0.0) or 0.0) for m in block.modules())
        for stage in model.stages
        for block in stage.blocks
    ]
    expected = torch.linspace(0, 0.3, len(rates)).tolist()
    assert rates == pytest.approx(expected, abs=1e-6)


# Freezing


@every_name
@pytest.mark.parametrize("frozen_stages", [-1, 0, 1, 4])
def test_frozen_stages_stay_frozen_while_training(name, frozen_stages):
    backbone = make_dense(name, frozen_stages=frozen_stages)
    detector = torch.nn.ModuleDict(dict(backbone=backbone, neck=torch.nn.BatchNorm2d(3)))
    for _ in range(2):  # as a Runner switches, around each validation
        detector.eval()
        assert not [m for m in detector.modules() if m.training]
        detector.train()
    frozen, free = frozen_and_free(backbone, frozen_stages)
    assert not [n for part in frozen for n, p in part.named_parameters() if p.requires_grad]
    assert not [n for part in free for n, p in part.named_parameters() if not p.requires_grad]
    assert not [m for part in frozen for m in part.modules() if m.training]
    assert all(m.training for part in free for m in norms(part))
    before = [b.clone() for part in frozen for b in part.buffers()]
    maps = backbone(image(*WIDE, batch=2))
    after = [b for part in frozen for b in part.buffers()]
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))
    if free:
        loss_of(maps).backward()
        parameters = [p for part in free for p in part.parameters()]
        assert parameters and all(p.grad is not None for p in parameters)


@every_name
def test_norm_eval_keeps_every_batch_norm_in_evaluation(name):
    backbone = make_dense(name, norm_eval=True, out_norms="batch_norm")
    detector = torch.nn.Sequential(backbone, torch.nn.BatchNorm2d(3))
    for _ in range(2):
        assert backbone.training and detector.train()[1].training
        assert norms(backbone) and not [m for m in norms(backbone) if m.training]
        detector.eval()
        detector.train()


@every_name
def test_freezing_outlives_conversion_to_synchronised_norms(name):
    backbone = make_dense(name, frozen_stages=2, out_norms="batch_norm")
    count = len(norms(backbone))
    backbone = torch.nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
    for _ in range(2):
        backbone.eval().train()
    assert len(norms(backbone)) == count
    assert {type(m) for m in norms(backbone)} == {torch.nn.SyncBatchNorm}
    frozen, free = frozen_and_free(backbone, 2)
    assert not [m for part in frozen for m in part.modules() if m.training]
    assert not [n for part in frozen for n, p in part.named_parameters() if p.requires_grad]
    assert all(m.training for part in [*free, backbone.out_norms] for m in norms(part))
    evaluated = make_dense(name, norm_eval=True, out_norms="batch_norm")
    evaluated = torch.nn.SyncBatchNorm.convert_sync_batchnorm(evaluated).train()
    assert not [m for m in norms(evaluated) if m.training]


# Head and image channels


@every_name
def test_classifier_can_be_removed_and_replaced(name):
    model = create(name, num_classes=7).eval()
    x = image(64, 64)
    with torch.no_grad():
        assert model(x).shape == (1, 7)
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert isinstance(model.get_classifier(), torch.nn.Identity)
        assert torch.equal(model(x), pooled)
        model.reset_classifier(5, "max")
        assert model(x).shape == (1, 5)
        model.reset_classifier(0, "")
        assert model(x).shape == (1, model.num_features, 2, 2)
        without = create(name, num_classes=0, global_pool="").eval()
        assert without(x).shape == (1, model.num_features, 2, 2)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, "")


@every_name
def test_image_channels_are_an_argument(name):
    model = create(name, in_chans=5, features_only=True).eval()
    with torch.no_grad():
        assert len(model(image(64, 64, chans=5))) == 4
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 64\).*\(B, 5, H, W\)"):
        model(image(64, 64))


@in_forms(MAIN_FORMS, by_default=["classifier"])
def test_pretrained_weights_fit_grey_images_and_those_of_four_channels(name, form, tmp_path):
    path = str(tmp_path / "weights.pth")
    checkpoint, arguments = official_checkpoint(name)
    torch.save(checkpoint, path)

    def load(in_chans):
        kwargs = dict(arguments, in_chans=in_chans)
        if form == "dense":
            init_cfg = dict(type="Pretrained", checkpoint=path)
            model = dense(name, model_kwargs=kwargs, init_cfg=init_cfg)
            model.init_weights()
        else:
            overlay = dict(file=path)
            weights = dict(pretrained=True, pretrained_cfg_overlay=overlay)
            model = build(name, form, **kwargs, **weights)
        return model.double().eval()

    grey, four = image(64, 96, chans=1).double(), image(64, 96, chans=4).double()
    # timm sums the kernel over its channels for one, and repeats it, scaled by 3 / 4, for four.
    first, second, third, fourth = four.unbind(1)
    of_four = 0.75 * torch.stack([first + fourth, second, third], dim=1)
    colour = load(3)
    with torch.no_grad():
        for x, same in [(grey, grey.repeat(1, 3, 1, 1)), (four, of_four)]:
            outputs, expected = load(x.shape[1])(x), colour(same)
            for o, e in zip(as_list(outputs), as_list(expected), strict=True):
                assert relative_error(o, e) < 1e-4


# Precision


@every_design
def test_float64_agrees_with_float32(name, settle):
    model = settle(timm.create_model(name))
    x = image(97, 131)
    with torch.no_grad():
        maps, logits = model.forward_intermediates(x)[1], model(x)
        model.double()
        exact = model.forward_intermediates(x.double())[1]
        assert {m.dtype for m in exact} == {torch.float64}
        for m, e in zip([*maps, logits], [*exact, model(x.double())], strict=True):
            assert relative_error(m, e) < 1e-3


@every_name
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_costs_little_more_than_rounding_weights_and_image(name, how, settle):
    """The error that rounded weights and image alone cause is what the network makes of an error.

    Computing in bfloat16 rounds each layer's result as well, and the results of norms and
    activations: up to six roundings for one, so the square root of it in error; twice that is
    the bound, and one rounding of the output beside it.
    """
    model = settle(create(name))
    x = image(97, 131, batch=2)

    def outputs(model, x):
        return [*model.forward_intermediates(x, intermediates_only=True), model(x)]

    rounded = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        exact = outputs(model, x)
        if how == "weights":
            results = outputs(rounded, x.bfloat16())
            assert {r.dtype for r in results} == {torch.bfloat16}
        else:
            with torch.autocast("cpu", torch.bfloat16):
                results = outputs(model, x)
            assert {r.dtype for r in results} <= {torch.bfloat16, torch.float32}
        inherent = outputs(rounded.float(), x.bfloat16().float())
    for r, i, e in zip(results, inherent, exact, strict=True):
        assert rms_error(r, e) < 2 * math.sqrt(6) * rms_error(i, e) + 2**-8


@in_forms(MAIN_FORMS, by_default=["dense"])
def test_gradients_pass_through_autocast_to_bfloat16(name, form):
    torch.manual_seed(0)
    model = make(name, form).train()
    x = image(*WIDE, batch=2)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(m.float() for m in as_list(model(x))).backward()
    assert without_gradient(model) == []
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


# Copies, files and traces


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


# What differs from one feature class to the next is how modules are kept, not what they are: that
# is the zoo's, and held with the first family.
COPIED = some_of(
    list(itertools.product(FORMS, (False, True))),
    by_default=[("fx", False), ("classifier", True)],
    of_first=[(form, False) for form in FORMS] + [("getter", True), ("dense", True)],
    of_designs=[],
    of_others=[("classifier", False), ("dense", True)],
    make_id=lambda form, fused: f"{'fused' if fused else 'plain'}-{form}",
)


@pytest.mark.parametrize("name, form, fused", list(COPIED))
def test_copies_give_the_same_outputs_in_either_mode(name, form, fused):
    if form == "dense":
        arguments = dict(frozen_stages=1, norm_eval=True, out_norms="batch_norm")
        model = make_dense(name, out_indices=(3, 1), drop_path_rate=0.5, **arguments)
    else:
        order = {} if form == "classifier" else dict(out_indices=(3, 1))
        model = make(name, form, drop_path_rate=0.5, **order)
    if fused:
        model.eval().fuse()
    x = image(*WIDE, batch=2)
    for training, (how, duplicate) in itertools.product((False, True), COPIES.items()):
        model.train(training)
        twin, results = duplicate(model), []
        modes = {n: m.training for n, m in model.named_modules()}
        assert {n: m.training for n, m in twin.named_modules()} == modes, (how, training)
        for one in (model, twin):
            torch.manual_seed(0)  # of the paths dropped
            results.append(as_list(one(x)))
        for expected, output in zip(*results, strict=True):
            assert torch.equal(output, expected), (how, training)


@in_forms(MAIN_FORMS, by_default=["classifier"])
def test_safetensors_files_hold_every_entry_and_load(name, form, tmp_path, settle):
    model = settle(make(name, form))
    path = str(tmp_path / "weights.safetensors")
    save_file(model.state_dict(), path)  # refuses tensors that share memory
    state = load_file(path)
    assert state.keys() == model.state_dict().keys()
    torch.manual_seed(1)
    if form == "dense":
        again = make_dense(name, pretrained=path)
    else:
        weights = dict(pretrained=True, pretrained_cfg_overlay=dict(file=path))
        again = make(name, form, **weights)
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value) and torch.equal(again.state_dict()[key], value), key
    save_model(model.fuse(), path)  # takes the layout of fused weights too
    fused = make(name, form).eval().fuse()
    load_model(fused, path)
    x = image(64, 96)
    with torch.no_grad():
        for m, e in zip(as_list(fused(x)), as_list(model(x)), strict=True):
            assert torch.equal(m, e)


@in_forms(MAIN_FORMS, by_default=["classifier"])
def test_a_trace_is_valid_at_the_size_of_its_example(name, form):
    model = make(name, form).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, image(64, 96), check_trace=False)
        x = image(64, 96, seed=1)
        for m, e in zip(as_list(traced(x)), as_list(model(x)), strict=True):
            assert relative_error(m, e) < 1e-5


@in_forms(FORMS, by_default=["classifier", "dense"])
def test_fusing_folds_every_norm_and_keeps_the_output(name, form, settle):
    # Of the classifier all blocks, since errors of rounding grow with them.
    model = settle(timm.create_model(name) if form == "classifier" else make(name, form))
    x = image(97, 131)
    with torch.no_grad():
        before = as_list(model(x))
        assert model.fuse() is model
        after = as_list(model(x))
        again = as_list(model.fuse()(x))  # once more changes nothing
    # The last norm feeds the pooling, and no convolution follows or precedes it.
    assert norms(model) == (norms(model.norm) if form == "classifier" else [])
    assert max(relative_error(a, b) for a, b in zip(after, before, strict=True)) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(again, after, strict=True))


# Compilers

# Above 32 pixels a side: PyTorch compiles maps of one row or column anew.
COMPILED_SIZES = [
    (33, 65), (97, 131), (64, 64), (128, 96), (40, 224), (224, 40), (160, 160), (75, 43), (256, 64),
    (48, 80),
]  # fmt: skip


def check_ten_sizes(model, training):
    """Compile a model, forward and backward, and hold it to eager results at ten sizes.

    In training in float64, since BatchNorm of small batches magnifies rounding.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    dtype, bound = (torch.float64, 1e-10) if training else (torch.float32, 1e-5)
    model.to(dtype).train(training)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, size in enumerate(COMPILED_SIZES):
        x = image(*size, batch=2 + i % 2).to(dtype)
        with torch.set_grad_enabled(training):
            outputs, expected = as_list(compiled(x)), as_list(model(x))
        for o, e in zip(outputs, expected, strict=True):
            assert relative_error(o, e) < bound, size
        if training:
            actual = gradients(model, outputs)
            assert gradient_error(actual, gradients(model, expected)) < bound, size
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


# Symbolic sizes take tens of seconds to trace. By default families are traced with them once, in
# training compiled here or exported below, and in both ways by the slow tests. The first is in both
# by default, MaxViT, whose padding and windows are GC ViT's, in none. At a fixed size each is
# compiled.
TRACED_BY_DEFAULT = {
    "compiled": {FIRST, "gc_vit_xxtiny", "ppma_tiny"},
    "exported": {FIRST, "biformer_tiny", "dinat_mini", "faster_vit_0"},
}


def traced(how, params):
    """Mark parameters of other names than those of `TRACED_BY_DEFAULT` as slow."""
    for param in params:
        marks = param.marks if param.values[0] in TRACED_BY_DEFAULT[how] else pytest.mark.slow
        yield pytest.param(*param.values, marks=marks, id=param.id)


COMPILED = some_of(
    list(itertools.product(MAIN_FORMS, (False, True))),
    by_default=[("classifier", True)],
    of_first=[],
    of_designs=[],
    of_others=[("classifier", True)],
    make_id=lambda form, training: f"{'training' if training else 'inference'}-{form}",
)


@pytest.mark.parametrize("name, form, training", list(traced("compiled", COMPILED)))
def test_ten_sizes_compile_into_two_graphs_at_most(name, form, training):
    check_ten_sizes(build(name, form, **fewest_blocks(name)), training)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_ten_sizes_of_all_blocks_compile_into_two_graphs_at_most(name):
    check_ten_sizes(timm.create_model(name), training=True)


@every_design
@pytest.mark.parametrize(
    "dynamic", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fixed", "dynamic"]
)
def test_channels_last_images_compile_whole(name, dynamic):
    torch._dynamo.reset()
    model = timm.create_model(name, **fewest_blocks(name)).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    x = image(33, 65).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 1e-5


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="Inductor needs a C++ compiler on CPUs"
)
@pytest.mark.parametrize(
    "name, stages",
    [
        # The first stage of CAS-ViT has all that the others have but the resolution change, which
        # is a convolution as those of the stem are.
        pytest.param(FIRST, (0,), id=f"{FIRST}-one-stage"),
        *(pytest.param(n, (0, 1, 2, 3), marks=pytest.mark.slow, id=n) for n in sorted(SMALLEST)),
    ],
)
def test_inductor_gives_the_same_maps_and_gradients(name, stages):
    torch._dynamo.reset()
    torch.manual_seed(0)
    arguments = dict(features_only=True, out_indices=stages, **fewest_blocks(name))
    model = timm.create_model(name, **arguments).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in [(65, 97), (128, 64)]:
        x = image(*size, batch=2)
        outputs, expected = compiled(x), model(x)
        assert max(relative_error(o, e) for o, e in zip(outputs, expected, strict=True)) < 1e-4
        actual = gradients(model, outputs)
        assert gradient_error(actual, gradients(model, expected)) < 1e-4


# Export


def check_other_devices(path, outputs):
    """Move an exported program to the meta device, and run it there at another size."""
    with open(path, "rb") as file:
        program = torch.export.load(file)
    assert not [n for n in program.graph.nodes if "mkldnn" in str(n.target)]
    moved = as_list(
        move_to_device_pass(program, "meta").module()(torch.empty(3, 3, 70, 99, device="meta"))
    )
    for m, output in zip(moved, outputs, strict=True):
        assert m.device.type == "meta" and m.shape[:2] == (3, output.shape[1])


def check_export(model, export_format, path):
    """Export, or hold the family to the reason that it lists for not being exportable."""
    family = next(m for m in model.modules() if isinstance(m, HierarchicalBackbone))
    reason = export_files.reason_against(model, export_format)
    is_onnx = export_format == "onnx"
    export = export_files.export_onnx if is_onnx else export_files.export_program
    options = dict(size=(64, 96), batch=2, dynamic=True)
    if is_onnx and not export_files.has_onnx_exporter():
        with pytest.raises(ImportError, match="torch 2.7"):
            export(model, path, **options)
    elif reason is not None:
        assert reason and reason in " ".join(type(family).__doc__.split())
        with pytest.raises(export_files.ExportError):
            export(model, path, **options)
        assert not path.exists()
    else:
        export(model, path, **options)
        if not is_onnx:
            check_other_devices(path, as_list(model(image(64, 96))))
        exported = (export_files.load_onnx if is_onnx else export_files.load_program)(path)
        for batch, size in ((1, (97, 131)), (3, (320, 224))):
            x = image(*size, batch=batch)
            with torch.no_grad():
                outputs, expected = exported(x), as_list(model(x))
            for o, e in zip(outputs, expected, strict=True):
                assert relative_error(o, e) < 1e-3, size


# ONNX files come of torch.export too. That operators of our own stay in its programs is held by
# the tests of operators and of the command.
EXPORTED = some_of(
    list(itertools.product(export_files.SUFFIXES, ("classifier", "getter"))),
    by_default=[("onnx", "classifier")],
    of_first=[("torch_export", "getter")],
    of_designs=[],
    of_others=[("onnx", "getter"), ("torch_export", "getter")],
    make_id=lambda export_format, form: f"{export_format}-{form}",
)


@pytest.mark.parametrize("name, export_format, form", list(traced("exported", EXPORTED)))
def test_it_is_exported_for_any_batch_and_size(name, export_format, form, settle, tmp_path):
    model = settle(build(name, form, **fewest_blocks(name)))
    check_export(model, export_format, tmp_path / "exported")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALLEST))
@pytest.mark.parametrize("export_format", list(export_files.SUFFIXES))
def test_all_its_blocks_are_exported(name, export_format, settle, tmp_path):
    check_export(settle(timm.create_model(name)), export_format, tmp_path / "exported")


class Branching(CASViT):
    """CAS-ViT that cannot be exported: its branch depends on the image."""

    unsupported_exports = {"torch_export": "its branch depends on the image"}

    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


class Silent(Branching):
    """CAS-ViT that does not say why."""


class Stale(CASViT):
    """CAS-ViT that claims: it takes no images of any size."""

    unsupported_exports = {"torch_export": "it takes no images of any size"}


@pytest.mark.parametrize("export_format", list(export_files.SUFFIXES))
def test_families_that_cannot_be_exported_are_held_to_their_reason(export_format, tmp_path):
    if export_format == "onnx" and not export_files.has_onnx_exporter():
        pytest.skip("ONNX export takes torch 2.7 or newer")
    small = ((1, 1, 1, 1), (8, 8, 8, 8))
    check_export(Branching(*small).eval(), export_format, tmp_path / "exported")
    with pytest.raises(AssertionError):
        check_export(Silent(*small).eval(), export_format, tmp_path / "exported")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_export(Stale(*small).eval(), export_format, tmp_path / "exported")
