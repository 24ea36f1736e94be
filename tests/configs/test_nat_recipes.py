"""The recipes of NAT, DiNAT and DiNAT_s are the published ones, figure by figure.

The tables below were typed from the papers' repository (its configs and Markdown files), beside
what our configs say.
"""

import re

import pytest
import torch
from recipes import build, check_that_rates_follow_timm, decay_by_name, rates, rows_of
from torch.utils.flop_counter import FlopCounterMode

from densezoo.backbones.registry import BACKBONES
from densezoo.tools.engine.config_files import load_config, shipped_configs

# Model: drop path, top-1.
FROM_SCRATCH = {
    "nat_mini": (0.2, "81.8"), "nat_tiny": (0.2, "83.2"),
    "nat_small": (0.3, "83.7"), "nat_base": (0.5, "84.3"),
    "dinat_mini": (0.2, "81.8"), "dinat_tiny": (0.2, "82.7"),
    "dinat_small": (0.3, "83.8"), "dinat_base": (0.5, "84.4"),
    "dinat_s_tiny": (0.2, "81.8"), "dinat_s_small": (0.3, "83.5"), "dinat_s_base": (0.5, "83.8"),
    "nat_isotropic_small": (0.1, "80.0"), "nat_isotropic_base": (0.4, "81.6"),
    "dinat_isotropic_small": (0.1, "80.8"), "dinat_isotropic_base": (0.4, "82.1"),
    "vitrpb_small": (0.1, "81.2"), "vitrpb_base": (0.4, "82.5"),
}  # fmt: skip
# Model: image size, weight decay, crop of testing, top-1. That of kernel 11 has no published decay.
FINE_TUNED = {
    "dinat_large": (224, 1e-4, 0.875, "86.6"),
    "dinat_large_384": (384, 1e-10, 1.0, "87.4"),
    "dinat_large_384_11x11": (384, 1e-10, 1.0, "87.5"),
    "dinat_s_large": (224, 1e-4, 0.875, "86.5"),
    "dinat_s_large_384": (384, 1e-5, 1.0, "87.4"),
}
# Model: drop path, parameters (M), box AP, mask AP.
MASK_RCNN = {
    "nat_mini": (0.2, 40, "46.5", "41.7"), "nat_tiny": (0.2, 48, "47.7", "42.6"),
    "nat_small": (0.35, 70, "48.4", "43.2"), "dinat_mini": (0.2, 40, "47.2", "42.5"),
    "dinat_tiny": (0.2, 48, "48.6", "43.5"), "dinat_small": (0.35, 70, "49.3", "44.0"),
    "dinat_s_tiny": (0.2, 48, "46.6", "42.1"), "dinat_s_small": (0.35, 69, "48.6", "43.5"),
}  # fmt: skip
CASCADE = {
    "nat_mini": (0.2, 77, "50.3", "43.6"), "nat_tiny": (0.3, 85, "51.4", "44.5"),
    "nat_small": (0.3, 108, "52.0", "44.9"), "nat_base": (0.5, 147, "52.3", "45.1"),
    "dinat_mini": (0.2, 77, "51.2", "44.4"), "dinat_tiny": (0.3, 85, "52.2", "45.1"),
    "dinat_small": (0.5, 108, "52.9", "45.8"), "dinat_base": (0.6, 147, "53.4", "46.2"),
    "dinat_large": (0.6, 258, "55.3", "47.8"),
    "dinat_s_tiny": (0.3, 86, "51.0", "44.1"), "dinat_s_small": (0.5, 107, "52.3", "45.2"),
    "dinat_s_base": (0.6, 145, "52.6", "45.3"), "dinat_s_large": (0.6, 253, "54.8", "47.2"),
}  # fmt: skip
# Model: drop path, parameters (M), mIoU, mIoU of several sizes.
UPERNET = {
    "nat_mini": (0.2, 50, "45.1", "46.4"), "nat_tiny": (0.3, 58, "47.1", "48.4"),
    "nat_small": (0.5, 82, "48.0", "49.5"), "nat_base": (0.5, 123, "48.5", "49.7"),
    "dinat_mini": (0.2, 50, "45.8", "47.2"), "dinat_tiny": (0.3, 58, "47.8", "48.8"),
    "dinat_small": (0.5, 82, "48.9", "49.9"), "dinat_base": (0.5, 123, "49.6", "50.4"),
    "dinat_large": (0.3, 238, "54.0", "54.9"),
    "dinat_s_tiny": (0.3, 60, "46.0", "47.4"), "dinat_s_small": (0.3, 81, "48.6", "49.9"),
    "dinat_s_base": (0.3, 121, "49.4", "50.2"), "dinat_s_large": (0.3, 234, "53.4", "54.6"),
}  # fmt: skip

DENSE = {
    **{f"mask_rcnn_{name}_fpn_3x_coco": (name, *row[:2]) for name, row in MASK_RCNN.items()},
    **{f"cascade_mask_rcnn_{name}_fpn_3x_coco": (name, *row[:2]) for name, row in CASCADE.items()},
    **{f"upernet_{name}_160k_ade20k": (name, *row[:2]) for name, row in UPERNET.items()},
}
SCRATCH_CONFIGS = {f"{name}_8xb128_300e_in1k": name for name in FROM_SCRATCH}
TUNED_CONFIGS = {f"{name}_8xb64_30e_in1k": name for name in FINE_TUNED}


def test_there_is_a_config_for_every_published_run():
    published = {*DENSE, *SCRATCH_CONFIGS, *TUNED_CONFIGS}
    assert published == {n for n in shipped_configs() if re.search(r"nat|vitrpb", n)}


@pytest.mark.parametrize("config", SCRATCH_CONFIGS)
def test_training_from_scratch_is_the_published_recipe(config):
    cfg, name = load_config(config), SCRATCH_CONFIGS[config]
    assert (cfg.model.model_name, cfg.model.drop_path_rate) == (name, FROM_SCRATCH[name][0])
    optimizer = dict(type="AdamW", lr=1e-3, weight_decay=0.05, eps=1e-8, betas=(0.9, 0.999))
    assert cfg.optim_wrapper.optimizer == optimizer
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=5.0)
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"
    assert cfg.train_dataloader.batch_size == 128
    assert cfg.train_cfg.max_epochs == 300 + 10
    mixup = dict(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5, prob=1.0, label_smoothing=0.1)
    assert cfg.model.mixup == mixup
    assert cfg.model.random_erasing == dict(probability=0.25, mode="pixel")
    transform = dict(interpolation="random", auto_augment="rand-m9-mstd0.5-inc1")
    assert cfg.train_dataloader.dataset.transform == transform
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.transform.crop_pct == 0.875
    assert cfg.randomness.seed == 42
    averages = [1 - hook.momentum for hook in cfg.get("custom_hooks", [])]
    assert averages == ([pytest.approx(0.9998)] if "isotropic_base" in config or
                        name == "vitrpb_base" else [])  # fmt: skip


@pytest.mark.parametrize("config, warmup", [
    ("nat_mini_8xb128_300e_in1k", 20), ("vitrpb_base_8xb128_300e_in1k", 50),
])  # fmt: skip
def test_the_rate_of_training_from_scratch_follows_timm_iteration_by_iteration(config, warmup):
    length = 7
    ours = rates(load_config(config), length, 310 * length)
    assert ours[0] == pytest.approx(1e-6)
    check_that_rates_follow_timm(ours, length, lr=1e-3, epochs=300, warmup=warmup)
    assert ours[300 * length :] == [pytest.approx(5e-6, rel=1e-3)] * (10 * length)


@pytest.mark.parametrize("config", TUNED_CONFIGS)
def test_fine_tuning_from_22k_is_the_published_recipe(config):
    cfg, name = load_config(config), TUNED_CONFIGS[config]
    size, decay, crop, _ = FINE_TUNED[name]
    assert (cfg.model.model_name, cfg.model.drop_path_rate) == (name, 0.35)
    assert cfg.optim_wrapper.optimizer.lr == 5e-5
    assert cfg.optim_wrapper.optimizer.weight_decay == decay
    assert cfg.optim_wrapper.type == "OptimWrapper"  # no mixed precision
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=5.0)
    assert cfg.train_dataloader.batch_size == 64
    assert cfg.train_cfg.max_epochs == 30
    assert "mixup" not in cfg.model
    assert cfg.model.loss == dict(type="LabelSmoothingCrossEntropy", smoothing=0.1)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.input_size == size
    assert cfg.test_dataloader.dataset.transform.crop_pct == crop
    assert "crop_mode" not in cfg.test_dataloader.dataset.transform
    family = "dinat_s_large" if name.startswith("dinat_s") else "dinat_large"
    interpolated = "_11x11interp" if "11x11" in name else ""
    assert cfg.model.init_cfg.checkpoint == f"checkpoints/{family}_in22k_224{interpolated}.pth"


def test_the_rate_of_fine_tuning_falls_linearly():
    seen = rates(load_config("dinat_large_8xb64_30e_in1k"), 10, 300)
    assert seen[0] == 5e-5
    steps = [one - two for one, two in zip(seen, seen[1:], strict=False)]
    assert steps == [pytest.approx(4.5e-5 / 299, rel=0.01)] * 299
    assert seen[-1] == pytest.approx(5e-6, rel=0.05)


@pytest.mark.parametrize("config", ["nat_small_8xb128_300e_in1k", "dinat_large_8xb64_30e_in1k"])
def test_only_one_dimension_is_spared_from_decay_on_imagenet(config):
    cfg = load_config(config)
    model = build(cfg)
    decay = cfg.optim_wrapper.optimizer.weight_decay
    dimensions = {name: p.ndim for name, p in model.named_parameters()}
    assert decay_by_name(cfg, model) == {
        name: decay if ndim > 1 else 0 for name, ndim in dimensions.items()
    }
    assert any(name.endswith("rel_pos_bias") and ndim == 3 for name, ndim in dimensions.items())


@pytest.mark.parametrize("config", DENSE)
def test_dense_recipes_are_the_published_ones(config):
    cfg, (name, drop_path, params) = load_config(config), DENSE[config]
    backbone, optimizer = cfg.model.backbone, cfg.optim_wrapper.optimizer
    is_detector = config.endswith("_coco")
    assert (backbone.model_name, backbone.drop_path_rate) == (name, drop_path)
    assert backbone.init_cfg.checkpoint == f"checkpoints/{name}.pth"
    lr = 6e-5
    if is_detector:
        lr = {"dinat_base": 7.5e-5, "dinat_large": 7.5e-5, "dinat_s_base": 7.5e-5,
              "dinat_s_large": 5e-5}.get(name, 1e-4)  # fmt: skip
    decay = 0.05 if is_detector else 0.01
    assert optimizer == dict(type="AdamW", lr=lr, betas=(0.9, 0.999), weight_decay=decay)
    is_mixed = cfg.optim_wrapper.type == "AmpOptimWrapper"
    assert is_mixed == (name != "dinat_large")
    assert "clip_grad" not in cfg.optim_wrapper
    assert 8 * cfg.train_dataloader.batch_size == 16
    dilations = "coco" if is_detector else "ade20k_640" if "large" in name else "ade20k"
    wanted = None if name.startswith("nat") else dilations
    assert backbone.get("model_kwargs", {}).get("dilations") == wanted

    model = build(cfg)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == params
    for key, value in decay_by_name(cfg, model).items():
        is_spared = "rel_pos_bias" in key or "norm" in key
        assert value == (0 if is_spared else decay), key
    # The published rule in its own names: what it spares is what ours does.
    spared = [p.numel() for k, p in model.backbone.named_parameters()
              if "rel_pos_bias" in k or "norm" in k]  # fmt: skip
    norms = [m for m in model.backbone.modules() if isinstance(m, torch.nn.LayerNorm)]
    tables = [p for k, p in model.backbone.named_parameters() if p.ndim == 3]
    assert sum(spared) == sum(p.numel() for m in norms for p in m.parameters()) + sum(
        p.numel() for p in tables
    )


# The dilations of a block each, as the configs of the detectors and segmenters spell them.
DILATIONS = {
    "mask_rcnn_dinat_mini_fpn_3x_coco": (
        (1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3, 1, 3, 1)),
    "cascade_mask_rcnn_dinat_large_fpn_3x_coco": (
        (1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7) * 3, (1, 3, 1, 3, 1)),
    "cascade_mask_rcnn_dinat_s_small_fpn_3x_coco": (
        (1, 28), (1, 14), (1, 3, 1, 5, 1, 7) * 3, (1, 3)),
    "upernet_dinat_tiny_160k_ade20k": (
        (1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4) * 3, (1, 2, 1, 2, 1)),
    "upernet_dinat_s_base_160k_ade20k": ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4) * 3, (1, 2)),
    "upernet_dinat_large_160k_ade20k": (
        (1, 20, 1), (1, 5, 1, 10), (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5),
        (1, 2, 1, 2, 1)),
    "upernet_dinat_s_large_160k_ade20k": (
        (1, 20), (1, 10), (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5), (1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("config", DILATIONS)
def test_dense_configs_have_the_published_dilations(config):
    model = build(load_config(config))
    (trunk,) = [m for m in model.modules() if hasattr(m, "dilations")]
    assert trunk.dilations == DILATIONS[config]


def test_detectors_train_on_several_sizes_and_test_on_one():
    cfg = load_config("mask_rcnn_nat_mini_fpn_3x_coco")
    (choice,) = [s for s in cfg.train_dataloader.dataset.pipeline if s.type == "RandomChoice"]
    plain, cropped = choice.transforms
    sizes = [(1333, short) for short in (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)]
    assert plain[0].scales == sizes
    assert [step.type for step in cropped] == [
        "RandomChoiceResize", "RandomCrop", "RandomChoiceResize",
    ]  # fmt: skip
    assert [min(scale) for scale in cropped[0].scales] == [400, 500, 600]
    assert cropped[1].crop_size == (384, 600)
    assert cropped[2].scales == sizes
    (resize,) = [s for s in cfg.test_dataloader.dataset.pipeline if s.type == "Resize"]
    assert resize.scale == (1333, 800)
    assert cfg.model.data_preprocessor.pad_size_divisor == 32
    assert cfg.train_cfg.max_epochs == 36


def test_cascade_heads_are_the_published_ones():
    cfg = load_config("cascade_mask_rcnn_dinat_s_large_fpn_3x_coco")
    heads = cfg.model.roi_head.bbox_head
    assert len(heads) == 3
    for head in heads:
        assert (head.num_shared_convs, head.num_shared_fcs) == (4, 1)
        assert head.norm_cfg.type == "SyncBN"
        assert head.reg_class_agnostic is False
        assert (head.loss_bbox.type, head.loss_bbox.loss_weight) == ("GIoULoss", 10.0)


def test_the_rate_of_detectors_drops_at_epochs_27_and_33():
    seen = rates(load_config("mask_rcnn_nat_mini_fpn_3x_coco"), 100, 36 * 100)
    assert seen[0] == pytest.approx(1e-7)
    assert seen[250] == pytest.approx(5e-5, rel=0.01)
    assert seen[500:2700] == [pytest.approx(1e-4)] * 2200
    assert seen[2700:3300] == [pytest.approx(1e-5)] * 600
    assert seen[3300:] == [pytest.approx(1e-6)] * 300


def test_the_rate_of_segmenters_falls_from_the_first_iteration_beside_the_warm_up():
    seen = rates(load_config("upernet_nat_mini_160k_ade20k"), 10**9, 4000)
    assert seen[0] == pytest.approx(6e-11)
    for iteration in (1, 700, 1499, 1500, 3999):
        warmup = min(1, 1e-6 + (1 - 1e-6) * iteration / 1499)
        assert seen[iteration] == pytest.approx(6e-5 * (1 - iteration / 160000) * warmup)


@pytest.mark.parametrize("config, side", [
    ("upernet_nat_base_160k_ade20k", 512), ("upernet_dinat_large_160k_ade20k", 640),
    ("upernet_dinat_s_large_160k_ade20k", 640),
])  # fmt: skip
def test_segmenters_train_and_test_at_the_side_of_their_dilations(config, side):
    cfg = load_config(config)
    (crop,) = [s for s in cfg.train_dataloader.dataset.pipeline if s.type == "RandomCrop"]
    assert crop.crop_size == cfg.model.data_preprocessor.size == (side, side)
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        (resize,) = [s for s in loader.dataset.pipeline if s.type.startswith("Resize")]
        assert resize.scale == (4 * side, side) and resize.keep_ratio
    assert cfg.train_cfg.max_iters == 160000
    assert cfg.model.decode_head.channels == 512
    head = cfg.model.auxiliary_head
    assert (head.in_index, head.channels, head.loss_decode.loss_weight) == (2, 256, 0.4)


@pytest.mark.parametrize("config, size, published", [
    ("upernet_nat_mini_160k_ade20k", (512, 2048), 900e9),
    ("upernet_dinat_large_160k_ade20k", (640, 2560), 2335e9),
    ("upernet_dinat_s_large_160k_ade20k", (640, 2560), 2466e9),
])  # fmt: skip
def test_published_macs_of_segmenters_are_those_of_their_side(config, size, published):
    model = build(load_config(config)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, *size, device="meta"))
    assert counter.get_total_flops() / 2 == pytest.approx(published, rel=5e-3)


def test_the_pages_and_the_registry_say_the_published_figures():
    top1 = {name: row[-1] for name, row in {**FROM_SCRATCH, **FINE_TUNED}.items()}
    registered = {name: BACKBONES[name].weights.published.top1 for name in top1}
    assert registered == {name: (float(figure),) for name, figure in top1.items()}
    rows = rows_of("classification")
    for config, name in SCRATCH_CONFIGS.items():
        rate, top1 = FROM_SCRATCH[name]
        assert rows[config] == [top1, str(rate), "224"]
    for config, name in TUNED_CONFIGS.items():
        assert rows[config] == [FINE_TUNED[name][3], "0.35", str(FINE_TUNED[name][0])]
    rows = rows_of("detection")
    for head, table in (("mask_rcnn", MASK_RCNN), ("cascade_mask_rcnn", CASCADE)):
        for name, (rate, _, *figures) in table.items():
            assert rows[f"{head}_{name}_fpn_3x_coco"] == [*figures, str(rate)]
    rows = rows_of("segmentation")
    for name, (rate, _, *figures) in UPERNET.items():
        assert rows[f"upernet_{name}_160k_ade20k"] == [" / ".join(figures), str(rate)]
