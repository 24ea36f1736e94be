"""The engine's parts: classifier, data sets, metric, optimizer groups, checks."""

import pickle

import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner
from PIL import Image
from timm.data import create_transform
from timm.optim import param_groups_layer_decay
from torch import nn

import densezoo  # noqa: F401
from densezoo.backbones.checkpoints import read_checkpoint
from densezoo.tools.engine import TopKAccuracy, timm_dataset
from densezoo.tools.engine.checks import check_checkpoint
from densezoo.tools.engine.config_files import apply_options, find_config, load_config
from densezoo.tools.engine.cpu import CpuAmpOptimWrapper
from densezoo.tools.engine.image_data import fit_stream_loaders

CLASSES = ("blue", "green", "red")
NUM_IMAGES = 7  # per class, as the fixture `colours` has them


def _mean_colour(sample):
    """Return the class that the pixels of a sample show."""
    return 2 - int(sample["inputs"].float().mean((1, 2)).argmax())


SHARDS = dict(name="wds/", split=f"colours-{{0..2}}.tar|{3 * NUM_IMAGES}")


@pytest.mark.parametrize("is_training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "source",
    [dict(root="folder"), dict(root="classes.tar"), dict(root="shards", **SHARDS)],
    ids=["folder", "tar", "webdataset"],
)
def test_folders_tar_files_and_shards_give_the_same_samples(colours, source, is_training):
    dataset = timm_dataset(
        **{**source, "root": str(colours / source["root"])}, is_training=is_training, input_size=32
    )
    samples = list(iter(dataset)) if "name" in source else [dataset[i] for i in range(len(dataset))]
    assert len(samples) == len(dataset) == 3 * NUM_IMAGES
    assert sorted(sample["labels"] for sample in samples) == sorted([0, 1, 2] * NUM_IMAGES)
    for sample in samples:
        assert sample["inputs"].shape == (3, 32, 32) and sample["inputs"].dtype == torch.uint8
        assert is_training or _mean_colour(sample) == sample["labels"]
    if "name" not in source:
        assert dataset.metainfo["classes"] == CLASSES


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("is_training", [False, True], ids=["eval", "train"])
def test_loader_of_shards_has_the_length_that_it_says(colours, num_workers, is_training):
    cfg = {
        "train_dataloader": dict(
            batch_size=4,
            num_workers=num_workers,
            collate_fn=dict(type="default_collate"),
            sampler=dict(type="DefaultSampler", shuffle=True),
            dataset=dict(
                type="TimmDataset",
                root=str(colours / "shards"),
                is_training=is_training,
                input_size=32,
                **SHARDS,
            ),
        )
    }
    fit_stream_loaders(cfg)
    loader = Runner.build_dataloader(cfg["train_dataloader"], seed=0)
    orders = []
    for epoch in range(2):
        loader.dataset.set_epoch(epoch)
        batches = [batch["labels"].tolist() for batch in loader]
        orders.append(sum(batches, []))
        if is_training:
            assert len(batches) == len(loader)
            assert all(len(batch) == 4 for batch in batches)
        else:
            assert sorted(orders[-1]) == sorted([0, 1, 2] * NUM_IMAGES)
    assert (orders[0] != orders[1]) == is_training


@pytest.mark.parametrize("policy", ["rand-m10-inc1-n15", "original", "augmix-m10"])
def test_augmentations_may_keep_no_bit_of_an_image(colours, policy):
    # Pillow refuses that from version 13 on, and timm asks for it.
    dataset = timm_dataset(
        str(colours / "folder"),
        is_training=True,
        input_size=32,
        transform=dict(auto_augment=policy),
    )
    for _ in range(20):
        assert dataset[0]["inputs"].shape == (3, 32, 32)


def test_missing_data_and_unknown_sizes_are_named(colours, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        timm_dataset(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="root=.*0 images"):
        timm_dataset(str(tmp_path))
    with pytest.raises(ValueError, match="number of samples"):
        timm_dataset(str(colours / "shards"), "wds/", "colours-{0..2}.tar")


def test_normalised_images_equal_timms_own_transform(colours):
    image = Image.open(colours / "folder" / "train" / "red" / "0.png")
    options = dict(input_size=32, interpolation="bicubic", crop_pct=0.875)
    expected = create_transform(**options)(image)
    classifier = MODELS.build(dict(type="ImageClassifier", model_name="test_vit", num_classes=3))
    batch = {"inputs": create_transform(**options, normalize=False)(image)[None]}
    statistics = classifier.backbone.pretrained_cfg
    assert statistics["mean"] != timm.data.IMAGENET_DEFAULT_MEAN, "the default would hide an error"
    mean, std = (torch.tensor(statistics[key]).view(3, 1, 1) for key in ("mean", "std"))
    imagenet_mean, imagenet_std = (
        torch.tensor(value).view(3, 1, 1)
        for value in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    )
    expected = (expected * imagenet_std + imagenet_mean - mean) / std
    torch.testing.assert_close(classifier.data_preprocessor(batch)["inputs"][0], expected)


def test_classifier_has_the_modes_of_mmengine():
    torch.manual_seed(0)
    classifier = MODELS.build(dict(type="ImageClassifier", model_name="test_vit", num_classes=3))
    classifier.eval()
    batch = {"inputs": torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)}
    batch["labels"] = torch.tensor([2, 0])
    inputs = classifier.data_preprocessor(dict(batch))
    logits = classifier(**inputs, mode="tensor")
    torch.testing.assert_close(
        classifier(**inputs, mode="loss")["loss"],
        nn.functional.cross_entropy(logits, batch["labels"]),
    )
    predictions = classifier.test_step(dict(batch))
    for prediction, row, label in zip(predictions, logits, batch["labels"], strict=True):
        torch.testing.assert_close(prediction["pred_scores"], row.softmax(-1).detach())
        assert prediction["gt_label"] == label
    with pytest.raises(ValueError, match="loss, predict, tensor"):
        classifier(**inputs, mode="features")


def test_two_heads_are_trained_with_the_mean_of_their_losses():
    torch.manual_seed(0)
    classifier = MODELS.build(
        dict(type="ImageClassifier", model_name="cas_vit_xs", num_classes=3, drop_path_rate=0.0)
    )
    classifier.backbone.set_distilled_training(True)
    classifier.train()
    inputs, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    loss = classifier(inputs, labels, mode="loss")["loss"]
    first, second = classifier.backbone(inputs)
    losses = [nn.functional.cross_entropy(logits, labels) for logits in (first, second)]
    assert losses[0] != losses[1]
    torch.testing.assert_close(loss, sum(losses) / 2)
    loss.backward()
    assert all(parameter.grad is not None for parameter in classifier.parameters())


def test_mixup_and_erasing_act_in_training_only():
    torch.manual_seed(0)
    np.random.seed(0)
    classifier = MODELS.build(
        dict(
            type="ImageClassifier",
            model_name="test_vit",
            num_classes=3,
            mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0),
            random_erasing=dict(probability=1.0, mode="pixel"),
        )
    )
    seen = []
    classifier.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    inputs, labels = torch.randn(4, 3, 160, 160), torch.tensor([0, 1, 2, 0])
    assert classifier(inputs.clone(), labels, mode="loss")["loss"].isfinite()
    classifier(inputs.clone(), labels, mode="predict")
    assert not torch.equal(seen[0], inputs)
    assert torch.equal(seen[1], inputs)
    with pytest.raises(ValueError, match="even number of images"):
        classifier(inputs[:3], labels[:3], mode="loss")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(model_name="cas_vit_xl"), "cas_vit_xs"),
        (dict(loss=dict(type="FocalLoss")), "LabelSmoothingCrossEntropy"),
        (
            dict(mixup=dict(mixup_alpha=1.0), loss=dict(type="LabelSmoothingCrossEntropy")),
            "SoftTargetCrossEntropy",
        ),
    ],
    ids=["model", "loss", "soft_targets"],
)
def test_wrong_arguments_of_the_classifier_say_what_is_right(options, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(type="ImageClassifier", **{"model_name": "test_vit", **options}))


def test_init_cfg_loads_a_backbone_and_leaves_out_another_head(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("cas_vit_xs", num_classes=5)
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    classifier = MODELS.build(
        dict(
            type="ImageClassifier",
            model_name="cas_vit_xs",
            num_classes=3,
            init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "weights.pth")),
        )
    )
    weights = source.state_dict()
    trunk = [key for key in weights if not key.startswith("head.")]
    assert not torch.equal(classifier.backbone.state_dict()[trunk[0]], weights[trunk[0]])
    classifier.init_weights()
    for key in trunk:
        assert torch.equal(classifier.backbone.state_dict()[key], weights[key]), key


def test_init_weights_keeps_the_weights_of_construction():
    classifier = MODELS.build(dict(type="ImageClassifier", model_name="test_vit", num_classes=3))
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    classifier.init_weights()
    for key, value in classifier.state_dict().items():
        assert torch.equal(value, before[key]), key


def _accuracy(scores, labels, **options):
    metric = TopKAccuracy(**options)
    samples = [
        dict(pred_scores=torch.tensor(row), gt_label=torch.tensor(label))
        for row, label in zip(scores, labels, strict=True)
    ]
    metric.process(None, samples)
    return metric.evaluate(len(samples))


def test_accuracy_counts_the_k_highest_scores():
    scores = [[0.1, 0.2, 0.3, 0.4, 0.0, 0.05], [0.9, 0.1, 0.2, 0.3, 0.4, 0.5]]
    figures = _accuracy(scores, [3, 1])
    assert figures == {"accuracy/top1": 50.0, "accuracy/top5": 50.0}
    figures = _accuracy(scores, [0, 2], topk=(1, 3, 5))
    assert figures == {"accuracy/top1": 0.0, "accuracy/top3": 0.0, "accuracy/top5": 100.0}


def test_accuracy_leaves_out_top5_of_five_classes_or_fewer():
    assert _accuracy([[0.1, 0.2, 0.3, 0.4, 0.0]], [3]) == {"accuracy/top1": 100.0}


def test_scores_that_are_equal_or_not_finite_earn_nothing():
    assert _accuracy([[0.0, 0.0, 0.0]] * 3, [0, 1, 2])["accuracy/top1"] == pytest.approx(100 / 3)
    assert _accuracy([[float("nan")] * 3] * 3, [0, 1, 2])["accuracy/top1"] == 0


def _settings(groups, model, base_lr=1e-3):
    """Map parameter name -> (factor of the learning rate, weight decay)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (
            group["lr_scale"] if base_lr is None else group["lr"] / base_lr,
            group["weight_decay"],
        )
        for group in groups
        for parameter in group["params"]
    }


def _optim_wrapper(model, **paramwise_cfg):
    return build_optim_wrapper(
        model,
        dict(
            constructor="LayerDecayOptimWrapperConstructor",
            paramwise_cfg=paramwise_cfg,
            optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
        ),
    )


@pytest.mark.parametrize("name", ["cas_vit_xs", "test_vit", "test_convnext"])
def test_layer_decay_equals_timms_groups(name):
    classifier = MODELS.build(dict(type="ImageClassifier", model_name=name, num_classes=3))
    model = classifier.backbone
    expected = param_groups_layer_decay(
        model,
        weight_decay=0.05,
        no_weight_decay_list=model.no_weight_decay() if hasattr(model, "no_weight_decay") else (),
        layer_decay=0.8,
    )
    groups = _optim_wrapper(classifier, layer_decay=0.8).optimizer.param_groups
    ours, theirs = _settings(groups, model), _settings(expected, model, base_lr=None)
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    for key, (scale, weight_decay) in theirs.items():
        assert ours[key] == (pytest.approx(scale, rel=1e-12), weight_decay), key
    assert len({scale for scale, _ in theirs.values()}) > 3
    assert len(groups) == len(expected)


def test_a_detectors_backbone_has_the_classifiers_factors_and_its_heads_have_none():
    detector = nn.ModuleDict(
        dict(
            backbone=MODELS.build(
                dict(
                    type="DenseBackbone",
                    model_name="cas_vit_xs",
                    out_indices=(1, 3),
                    out_norms=True,
                )
            ),
            head=nn.Conv2d(56, 4, 1),
        )
    )
    classifier = MODELS.build(dict(type="ImageClassifier", model_name="cas_vit_xs"))
    expected = _settings(
        _optim_wrapper(classifier, layer_decay=0.8).optimizer.param_groups, classifier.backbone
    )
    groups = _optim_wrapper(detector, layer_decay=0.8).optimizer.param_groups
    settings = _settings(groups, detector)
    assert settings.keys() == dict(detector.named_parameters()).keys()
    in_classifier = 0
    for name, (scale, weight_decay) in settings.items():
        original = next((key for key in expected if name.endswith(f".{key}")), None)
        if original and "out_norms" not in name:
            in_classifier += 1
            assert (scale, weight_decay) == expected[original], name
        else:
            assert scale == pytest.approx(1), name
            assert weight_decay == (0.05 if name == "head.weight" else 0.0), name
    assert in_classifier == len(settings) - 2 - 4


def test_custom_keys_multiply_the_factor_of_the_layer():
    classifier = MODELS.build(dict(type="ImageClassifier", model_name="test_vit", num_classes=3))
    plain = _optim_wrapper(classifier, layer_decay=0.5).optimizer.param_groups
    custom = _optim_wrapper(
        classifier,
        layer_decay=0.5,
        min_scale=0.3,
        custom_keys={"patch_embed": dict(lr_mult=10.0, decay_mult=0.5)},
    ).optimizer.param_groups
    plain, custom = (_settings(groups, classifier.backbone) for groups in (plain, custom))
    for name, (scale, weight_decay) in plain.items():
        scale = max(scale, 0.3)
        expected = (10 * scale, 0.025) if "patch_embed" in name else (scale, weight_decay)
        assert custom[name] == (pytest.approx(expected[0]), expected[1]), name


def test_a_layer_decay_that_makes_no_sense_is_refused():
    classifier = MODELS.build(dict(type="ImageClassifier", model_name="test_vit", num_classes=3))
    with pytest.raises(ValueError, match="layer_decay=1.5"):
        _optim_wrapper(classifier, layer_decay=1.5)
    with pytest.raises(ValueError, match="no backbone"):
        _optim_wrapper(nn.Linear(2, 2), layer_decay=0.5)


def test_optimizers_of_timm_are_reached_by_name():
    classifier = MODELS.build(dict(type="ImageClassifier", model_name="test_vit", num_classes=3))
    optimizer = dict(type="TimmOptimizer", opt="lamb", lr=1e-3, weight_decay=0.02)
    wrapper = build_optim_wrapper(
        classifier,
        dict(constructor="LayerDecayOptimWrapperConstructor", optimizer=optimizer),
    )
    assert type(wrapper.optimizer).__name__ == "Lamb"
    assert {group["weight_decay"] for group in wrapper.optimizer.param_groups} == {0.0, 0.02}
    with pytest.raises(ValueError, match="lambda.*lamb"):
        build_optim_wrapper(classifier, dict(optimizer={**optimizer, "opt": "lambda"}))


def test_mixed_precision_on_the_cpu_computes_in_bfloat16():
    model = nn.Linear(4, 4)
    wrapper = CpuAmpOptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with wrapper.optim_context(model):
        assert model(torch.ones(1, 4)).dtype == torch.bfloat16


class _Payload:
    def __reduce__(self):
        return (print, ("executed",))


class _Getter:
    def __reduce__(self):
        return (getattr, (torch.Tensor, "__init_subclass__"))


@pytest.mark.parametrize("payload", [_Payload(), _Getter()], ids=["call", "getattr"])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, capsys, payload):
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "meta": payload}, path)
    with pytest.raises(ValueError, match="evil.pth.*safely"):
        read_checkpoint(path)
    assert "executed" not in capsys.readouterr().out


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "list.pth").write_bytes(pickle.dumps([1, 2]))
    torch.save([torch.zeros(2)], tmp_path / "tensors.pth")
    with pytest.raises(FileNotFoundError, match="none.pth"):
        read_checkpoint(tmp_path / "none.pth")
    for name in ("text.pth", "list.pth", "tensors.pth"):
        with pytest.raises(ValueError, match=name):
            read_checkpoint(tmp_path / name)


def test_a_checkpoint_belongs_to_a_model_when_its_entries_fit():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    whole = model.state_dict()
    check_checkpoint(model, {"state_dict": whole}, "whole.pth")
    check_checkpoint(model, {f"module.{key}": value for key, value in whole.items()}, "ddp.pth")
    head = {**whole, "1.weight": torch.zeros(3, 8), "1.bias": torch.zeros(3)}
    check_checkpoint(model, head, "head.pth", is_whole=False)
    with pytest.raises(ValueError, match=r"2 of 4 entries fit.*1.weight with \(3, 8\).*\(2, 8\)"):
        check_checkpoint(model, head, "head.pth")
    with pytest.raises(ValueError, match="0 of 4 entries fit; 4 are missing, such as 0.weight"):
        check_checkpoint(model, {"conv.weight": torch.zeros(1)}, "other.pth", is_whole=False)


def test_configs_are_found_by_path_and_by_name(tmp_path):
    name = "retinanet_cas_vit_xs_fpn_1x_coco"
    assert find_config(name) == find_config(f"{name}.py") == find_config(str(find_config(name)))
    own = tmp_path / f"{name}.py"
    own.write_text("model = dict()")
    assert find_config(str(own)) == own
    with pytest.raises(FileNotFoundError, match=f"nearest: {name}"):
        find_config("retinanet_casvit_xs_fpn_1x")
    with pytest.raises(FileNotFoundError):
        find_config(str(tmp_path / "elsewhere" / f"{name}.py"))


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("model = dict(", ValueError, "SyntaxError"),
        ("model = undefined", ValueError, "undefined"),
        ("_base_ = 'missing.py'", FileNotFoundError, "missing.py"),
        ("custom_imports = dict(imports=['no_such_package'])", ImportError, "no_such_package"),
    ],
)
def test_a_config_that_is_not_one_says_why(tmp_path, text, error, message):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(error, match=message):
        load_config(str(tmp_path / "broken.py"))


def test_options_change_values_of_every_kind():
    cfg = Config(dict(a=dict(b=1, c=[dict(d=2.0)]), e=None))
    apply_options(cfg, ["a.b=7", "a.c.0.d=1e-3", "e=text", "load_from=x.pth", "a.f=[1,2]"])
    assert cfg.to_dict() == {
        "a": {"b": 7, "c": [{"d": 1e-3}], "f": [1, 2]},
        "e": "text",
        "load_from": "x.pth",
    }


@pytest.mark.parametrize(
    "option, message",
    [
        ("model", "KEY=VALUE"),
        ("=1", "KEY=VALUE"),
        ("train_dataloder.batch_size=4", "did you mean train_dataloader"),
        ("param_scheduler.7.end=4", "param_scheduler.7.end"),
        ("model=dict(depths=(1,2))", r"model=dict\(depths=\(1,2\)\) .* a dict's keys as a\.b=1"),
    ],
)
def test_malformed_options_are_refused(option, message):
    cfg = Config(dict(model=dict(), train_dataloader=dict(), param_scheduler=[dict(end=1)]))
    with pytest.raises(ValueError, match=message):
        apply_options(cfg, [option])
