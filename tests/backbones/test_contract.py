"""What every registered backbone promises. A family inherits these tests by registering."""

import copy
import math

import pytest
import timm
import torch
from mmengine.registry import MODELS
from oracles import relative_error, variants_of_families
from timm.models._manipulate import group_parameters

from densezoo.backbones.base import FEATURE_CLASSES

NAMES = variants_of_families()
every_name = pytest.mark.parametrize("name", NAMES)
SIZES = [(224, 224), (97, 131), (33, 200), (256, 320)]


def image(*size, batch=1, chans=3, seed=0):
    return torch.randn(batch, chans, *size, generator=torch.Generator().manual_seed(seed))


def as_list(maps):
    return list(maps.values()) if isinstance(maps, dict) else list(maps)


def norms(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]


@every_name
def test_stage_maps_have_the_promised_shapes_at_any_size(name):
    model = timm.create_model(name, features_only=True).eval()
    for size in SIZES:  # of one instance
        with torch.no_grad():
            maps = model(image(*size))
        for m, channels, stride in zip(
            maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
        ):
            assert m.shape == (1, channels, *(math.ceil(n / stride) for n in size))
            assert m.is_contiguous()
    assert model.feature_info.reduction() == [4, 8, 16, 32]


@every_name
@pytest.mark.parametrize("out_indices", [None, (3, 0), (-1, 1), (2,), 2], ids=str)
def test_every_feature_class_gives_the_same_maps(name, out_indices):
    reference = timm.create_model(name).eval()
    x = image(97, 131)
    with torch.no_grad():
        expected = reference.forward_intermediates(x, out_indices, intermediates_only=True)
    kwargs = {} if out_indices is None else dict(out_indices=out_indices)
    for feature_cls in FEATURE_CLASSES:
        model = timm.create_model(name, features_only=True, feature_cls=feature_cls, **kwargs)
        state = dict(zip(model.state_dict(), _trunk(reference, model), strict=True))
        model.load_state_dict(state)
        with torch.no_grad():
            maps = as_list(model.eval()(x))
        for m, e, channels in zip(maps, expected, model.feature_info.channels(), strict=True):
            assert m.shape[1] == channels
            assert relative_error(m, e) < 1e-5, feature_cls


def _trunk(reference, features):
    """The values of `reference` in the order of the wrapper's own state dict."""
    state = reference.state_dict()
    prefixes = ("model.", "body.", "graph_module.")
    for key in features.state_dict():
        for prefix in prefixes:
            key = key.removeprefix(prefix)
        yield state[key.replace("stages_", "stages.", 1)]


@every_name
def test_forward_intermediates_takes_all_its_options(name):
    model = timm.create_model(name).eval()
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
    model = timm.create_model(name).eval()
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([-3, 0], prune_norm=True) == [1, 0]
    x = image(64, 96)
    with torch.no_grad():
        expected = model.forward_intermediates(x, [1, 0], intermediates_only=True)
        maps = pruned.forward_intermediates(x, [1, 0], intermediates_only=True)
    assert all(torch.equal(m, e) for m, e in zip(maps, expected, strict=True))
    assert {k.split(".")[1] for k in pruned.state_dict() if k.startswith("stages")} == {"0", "1"}
    assert not [k for k in pruned.state_dict() if k.startswith(("norm", "head"))]


@every_name
def test_classifier_can_be_removed_and_replaced(name):
    model = timm.create_model(name, num_classes=7).eval()
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
        without = timm.create_model(name, num_classes=0, global_pool="").eval()
        assert without(x).shape == (1, model.num_features, 2, 2)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, "")


@every_name
@pytest.mark.parametrize("coarse", [False, True])
def test_every_parameter_is_in_exactly_one_layer_group(name, coarse):
    model = timm.create_model(name, device="meta")
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    names = [n for group in groups.values() for n in group]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    depths = [len(stage.blocks) for stage in model.stages]
    assert len(groups) == 2 + (len(depths) if coarse else sum(depths))
    assert all(n.startswith("stem.") for n in groups[0])
    assert all(n.startswith("head.") for n in groups[len(groups) - 1])
    assert any(n.startswith("norm.") for n in groups[len(groups) - 2])
    assert model.no_weight_decay() <= {n for n, _ in model.named_parameters()}


@every_name
def test_image_channels_are_an_argument(name):
    model = timm.create_model(name, in_chans=5, features_only=True).eval()
    with torch.no_grad():
        assert len(model(image(64, 64, chans=5))) == 4
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 64\).*\(B, 5, H, W\)"):
        model(image(64, 64))


@every_name
def test_drop_path_grows_linearly_over_the_network(name):
    model = timm.create_model(name, drop_path_rate=0.3)
    rates = [
        max((getattr(m, "drop_prob", 0.0) or 0.0) for m in block.modules())
        for stage in model.stages
        for block in stage.blocks
    ]
    expected = torch.linspace(0, 0.3, len(rates)).tolist()
    assert rates == pytest.approx(expected, abs=1e-6)


@every_name
def test_checkpointing_changes_neither_output_nor_gradient_nor_statistics(name):
    x = image(64, 64, batch=2)
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(name, features_only=True).train()
        model.set_grad_checkpointing(enable)
        maps = model(x)
        sum(m.square().mean() for m in maps).backward()
        gradients = [p.grad for p in model.parameters()]
        results.append([*maps, *gradients, *model.buffers()])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@every_name
def test_the_layout_of_outputs_follows_the_image(name):
    model = timm.create_model(name).eval()
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
def test_it_compiles_whole_for_either_layout_of_the_image(name):
    model = timm.create_model(name).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for layout in (torch.contiguous_format, torch.channels_last):
        x = image(33, 65).to(memory_format=layout)
        with torch.no_grad():
            assert relative_error(compiled(x), model(x)) < 1e-5


@every_name
def test_inference_changes_neither_the_image_nor_what_hooks_saw(name):
    model = timm.create_model(name).eval()
    x, seen = image(64, 96), []
    before = x.clone()

    def hook(module, inputs, output):
        seen.append((output, output.clone()))

    for module in model.modules():
        if type(module).__module__.startswith("densezoo") and not list(module.children()):
            module.register_forward_hook(hook)
    with torch.no_grad():
        model(x)
    assert torch.equal(x, before)
    assert seen and all(torch.equal(output, copy) for output, copy in seen)


@every_name
def test_it_vectorises_over_images(name):
    model = timm.create_model(name).eval()
    x = image(32, 64, batch=3)
    with torch.no_grad():
        mapped = torch.vmap(lambda one: model(one[None])[0])(x)
        assert relative_error(mapped, model(x)) < 1e-5


@every_name
def test_images_of_a_batch_do_not_affect_each_other(name):
    model = timm.create_model(name).eval()
    x = image(97, 131, batch=2)
    with torch.no_grad():
        assert relative_error(model(x)[1:], model(x[1:])) < 1e-5


@every_name
@pytest.mark.parametrize("feature_cls", [None, *FEATURE_CLASSES])
def test_fusing_folds_every_norm_and_keeps_the_output(name, feature_cls, settle):
    kwargs = dict(features_only=True, feature_cls=feature_cls) if feature_cls else {}
    model = settle(timm.create_model(name, **kwargs))
    x = image(97, 131)
    with torch.no_grad():
        before = model(x)
        assert model.fuse() is model
        after = model(x)
    # The last norm feeds the pooling, and no convolution follows or precedes it.
    assert len(norms(model)) == (0 if feature_cls else 1)
    pairs = zip(as_list(after), as_list(before), strict=True) if feature_cls else [(after, before)]
    for a, b in pairs:
        assert relative_error(a, b) < 1e-5
    with torch.no_grad():  # once more changes nothing
        again = model.fuse()(x)
    if not feature_cls:
        again, after = [again], [after]
    assert all(torch.equal(a, b) for a, b in zip(as_list(again), as_list(after), strict=True))


@every_name
def test_dense_backbone_gives_the_same_maps_in_the_order_asked_for(name):
    torch.manual_seed(0)
    backbone = MODELS.build(dict(type="DenseBackbone", model_name=name, out_indices=(3, 1)))
    backbone.eval()
    x = image(97, 131)
    with torch.no_grad():
        maps = backbone(x)
        expected = backbone.model.model.forward_intermediates(x, [3, 1], intermediates_only=True)
    assert isinstance(maps, tuple)
    assert all(torch.equal(m, e) for m, e in zip(maps, expected, strict=True))
    assert [m.shape[1] for m in maps] == backbone.out_channels
    assert backbone.out_strides == [32, 8]


@every_name
@pytest.mark.parametrize("out_indices", [(0,), (1, 2), (0, 1, 2, 3)], ids=str)
def test_dense_backbone_holds_only_parameters_that_get_a_gradient(name, out_indices):
    backbone = MODELS.build(
        dict(type="DenseBackbone", model_name=name, out_indices=out_indices, out_norms=True)
    )
    sum(m.square().mean() for m in backbone.train()(image(64, 64, batch=2))).backward()
    assert not [n for n, p in backbone.named_parameters() if p.grad is None]


@every_name
@pytest.mark.parametrize("frozen_stages", [-1, 0, 1, 4])
def test_frozen_stages_stay_frozen_while_training(name, frozen_stages):
    backbone = MODELS.build(
        dict(type="DenseBackbone", model_name=name, frozen_stages=frozen_stages)
    )
    backbone.train()
    inner = backbone.model.model
    frozen = [inner.stem] * (frozen_stages >= 0) + list(inner.stages[: max(frozen_stages, 0)])
    free = [inner.stem] * (frozen_stages < 0) + list(inner.stages[max(frozen_stages, 0) :])
    assert not [n for part in frozen for n, p in part.named_parameters() if p.requires_grad]
    assert not [n for part in free for n, p in part.named_parameters() if not p.requires_grad]
    assert not [m for part in frozen for m in norms(part) if m.training]
    assert all(m.training for part in free for m in norms(part))
    before = [b.clone() for part in frozen for b in part.buffers()]
    backbone(image(64, 64, batch=2))
    assert all(
        torch.equal(b, a)
        for b, a in zip(before, [b for p in frozen for b in p.buffers()], strict=True)
    )


@every_name
def test_norm_eval_keeps_every_batch_norm_in_evaluation(name):
    backbone = MODELS.build(
        dict(type="DenseBackbone", model_name=name, norm_eval=True, out_norms="batch_norm")
    )
    backbone.train()
    assert norms(backbone) and not [m for m in norms(backbone) if m.training]
    assert backbone.training
    assert norms(backbone.eval().train())[0].training is False


@every_name
def test_dense_backbone_fuses(name, settle):
    backbone = settle(MODELS.build(dict(type="DenseBackbone", model_name=name)))
    x = image(97, 131)
    with torch.no_grad():
        before = backbone(x)
        assert backbone.fuse() is backbone
        after = backbone(x)
    assert not norms(backbone)
    assert max(relative_error(a, b) for a, b in zip(after, before, strict=True)) < 1e-5
