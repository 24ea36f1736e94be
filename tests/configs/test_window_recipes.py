"""The recipes of MaxViT, GC ViT and FasterViT are the published ones, figure by figure.

The tables below were typed from the papers and from the configurations of the official code, beside
what our configs say. Where no recipe is published, the config says so.
"""

import re

import pytest
from mmengine.optim import build_optim_wrapper
from recipes import build, check_that_rates_follow_timm, decay_by_name, rates, rows_of

from densezoo.backbones.registry import BACKBONES
from densezoo.tools.engine.config_files import load_config, shipped_configs

# MaxViT: drop path from scratch, top-1 at 224, 384 and 512.
MAXVIT = {
    "tiny": (0.2, "83.62", "85.24", "85.72"), "small": (0.3, "84.45", "85.74", "86.19"),
    "base": (0.4, "84.95", "86.34", "86.66"), "large": (0.6, "85.17", "86.40", "86.70"),
}  # fmt: skip
# From ImageNet-21k: drop path of the fine-tuning, top-1 at 384 and 512.
MAXVIT_21K = {
    "base": (0.4, "88.24", "88.38"), "large": (0.5, "88.32", "88.46"),
    "xlarge": (0.9, "88.51", "88.70"),
}  # fmt: skip
# GC ViT: images on each GPU, drop path, top-1, crop of testing, channels of the first stage.
GC_VIT = {
    "xxtiny": (128, 0.2, "79.9", 1.0, 64), "xtiny": (128, 0.2, "82.0", 0.875, 64),
    "tiny": (128, 0.2, "83.5", 1.0, 64), "tiny2": (128, 0.25, "83.7", 0.875, 64),
    "small": (32, 0.3, "84.3", 0.875, 96), "small2": (32, 0.35, "84.8", 0.875, 96),
    "base": (32, 0.5, "85.0", 1.0, 128), "large": (32, 0.5, "85.7", 1.0, 192),
}  # fmt: skip
# FasterViT: optimizer, weight decay and MESA's weight of the YAML files, epochs of warm-up, drop
# path, top-1, crop of testing, seed.
FASTER_VIT = {
    0: ("AdamW", 0.05, 0.0, 20, 0.2, "82.1", 0.875, 31),
    1: ("AdamW", 0.05, 0.5, 20, 0.2, "83.2", 1.0, 31),
    2: ("AdamW", 0.05, 1.0, 20, 0.2, "84.2", 1.0, 31),
    3: ("AdamW", 0.075, 1.0, 35, 0.3, "84.9", 1.0, 31),
    4: ("lamb", 0.12, 4.0, 20, 0.3, "85.4", 1.0, 31),
    5: ("lamb", 0.12, 5.0, 20, 0.3, "85.6", 1.0, 30),
    6: ("lamb", 0.15, 5.0, 20, 0.5, "85.8", 1.0, 30),
}  # fmt: skip
# Box and mask AP.
MASK_RCNN = {"gc_vit_tiny": ("47.9", "43.2")}
CASCADE = {
    "gc_vit_tiny": ("51.6", "44.6"), "gc_vit_small": ("52.4", "45.4"),
    "gc_vit_base": ("52.9", "45.8"),
}  # fmt: skip
# MaxViT's at 896: rate, drop path as survival of 0.8, 0.3 and 0.3, box and mask AP.
MAXVIT_CASCADE = {
    "tiny": (1e-3, 0.2, "52.1", "44.6"), "small": (3e-3, 0.7, "53.1", "45.4"),
    "base": (3e-3, 0.7, "53.4", "45.7"),
}  # fmt: skip
# DINO: channels of the first stage.
DINO = {"0": 64, "1": 80, "2": 96, "3": 128, "4": 196,
        "4_21k_224": 196, "4_21k_384": 196, "4_21k_512": 196}  # fmt: skip

SCRATCH = {f"maxvit_{name}_8xb64_300e_in1k": name for name in MAXVIT}
# Config: start, tag of the weights that come of it, drop path, top-1.
TUNED = {
    f"maxvit_{name}_{side}_8xb16_30e_in1k": (name, f"in1k_{side}", row[0], row[column])
    for column, side in ((2, 384), (3, 512))
    for name, row in MAXVIT.items()
} | {
    f"maxvit_{name}_in21k_{side}_8xb16_30e_in1k": (
        f"{name}_in21k", f"in21k_ft_in1k_{side}", row[0], row[column],
    )
    for column, side in ((1, 384), (2, 512))
    for name, row in MAXVIT_21K.items()
}  # fmt: skip
GC_CONFIGS = {f"gc_vit_{name}_8xb{row[0]}_310e_in1k": name for name, row in GC_VIT.items()}
GC_LARGER = {f"gc_vit_large_{side}_8xb32_310e_in1k": side for side in (384, 512)}
FASTER_CONFIGS = {f"faster_vit_{n}_8xb128_310e_in1k": n for n in FASTER_VIT}
GC_DENSE = {
    **{f"mask_rcnn_{name}_fpn_3x_coco": name for name in MASK_RCNN},
    **{f"cascade_mask_rcnn_gc_vit_{name}_fpn_3x_coco": f"gc_vit_{name}" for name in GC_VIT},
}
MAXVIT_DENSE = {f"cascade_mask_rcnn_maxvit_{n}_fpn_896_200e_coco": n for n in MAXVIT_CASCADE}
DINO_CONFIGS = {f"dino_faster_vit_{name}_4scale_1x_coco": name for name in DINO}
# Config: model, channels of the first stage, drop path.
UPERNET = {
    f"upernet_{model}_160k_ade20k": (model, channels, rate)
    for model, channels, rate in (
        ("maxvit_tiny", 64, 0.2), ("maxvit_small", 96, 0.3), ("maxvit_base", 96, 0.4),
        ("maxvit_large", 128, 0.6),
        *((f"gc_vit_{name}", row[4], row[1]) for name, row in GC_VIT.items()),
        *((f"faster_vit_{n}", DINO[str(n)], FASTER_VIT[n][4]) for n in range(5)),
    )
}  # fmt: skip
# Without a published recipe.
UNPUBLISHED = {
    *UPERNET,
    "gc_vit_large_512_8xb32_310e_in1k",
    *(f"cascade_mask_rcnn_gc_vit_{name}_fpn_3x_coco" for name in GC_VIT if name != "tiny"),
}


def read_average(cfg):
    """The decay of a config's average of weights, which counts the optimizer's steps."""
    average = cfg.custom_hooks[0]
    assert average.type == "EMAHook" and average.update_buffers
    assert average.interval == cfg.optim_wrapper.accumulative_counts
    return pytest.approx(1 - average.momentum)


def images_of_a_step(cfg):
    return 8 * cfg.train_dataloader.batch_size * cfg.optim_wrapper.accumulative_counts


def test_there_is_a_config_for_every_published_run():
    ours = {n for n in shipped_configs() if re.search("maxvit|gc_vit|faster_vit", n)}
    assert ours == {
        *SCRATCH, *TUNED, *GC_CONFIGS, *GC_LARGER, *FASTER_CONFIGS, *GC_DENSE, *MAXVIT_DENSE,
        *DINO_CONFIGS, *UPERNET,
    }  # fmt: skip


def test_a_config_says_that_its_recipe_is_not_published_where_none_is():
    paths = {n: p for n, p in shipped_configs().items()
             if re.search("maxvit|gc_vit|faster_vit", n)}  # fmt: skip
    assert UNPUBLISHED == {n for n, p in paths.items() if "not published" in p.read_text()[:120]}


@pytest.mark.parametrize("config", SCRATCH)
def test_maxvit_trains_from_scratch_as_published(config):
    cfg, name = load_config(config), SCRATCH[config]
    assert (cfg.model.model_name, cfg.model.drop_path_rate) == (f"maxvit_{name}", MAXVIT[name][0])
    assert cfg.optim_wrapper.optimizer == dict(type="AdamW", lr=3e-3, weight_decay=0.05)
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=1.0)
    assert images_of_a_step(cfg) == 4096
    assert cfg.train_cfg.max_epochs == 300
    assert cfg.model.mixup == dict(mixup_alpha=0.8, cutmix_alpha=0.0, label_smoothing=0.1)
    assert "random_erasing" not in cfg.model
    assert cfg.train_dataloader.dataset.transform.auto_augment == "rand-m15-n2-p1.0"
    assert cfg.test_dataloader.dataset.transform.crop_pct == 224 / 256
    assert read_average(cfg) == 0.9999


def test_maxvits_rate_rises_for_10000_steps_and_falls_to_1e_5():
    length = 4
    seen = rates(load_config("maxvit_tiny_8xb64_300e_in1k"), length, 300 * length)
    peak = seen.index(max(seen))
    assert seen[peak] == pytest.approx(3e-3)
    # In steps of 4096 of ImageNet's 1281167 images.
    assert peak / length * 1281167 / 4096 == pytest.approx(10000, rel=0.01)
    assert seen[-1] == pytest.approx(1e-5, rel=0.01)
    assert seen[0] < 1e-8


@pytest.mark.parametrize("config", TUNED)
def test_maxvit_is_fine_tuned_as_published(config):
    cfg, (start, tag, rate, _) = load_config(config), TUNED[config]
    size, side = start.removesuffix("_in21k"), int(tag[-3:])
    assert (cfg.model.model_name, cfg.model.drop_path_rate) == (f"maxvit_{size}.{tag}", rate)
    assert cfg.model.init_cfg.checkpoint == f"checkpoints/maxvit_{start}.pth"
    assert (
        BACKBONES[f"maxvit_{size}"].tags[tag].arguments["window_size"] == {384: 12, 512: 16}[side]
    )
    assert cfg.optim_wrapper.optimizer == dict(type="AdamW", lr=5e-5, weight_decay=1e-8)
    assert images_of_a_step(cfg) == 512
    assert (cfg.train_cfg.max_epochs, cfg.param_scheduler) == (30, [])
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.input_size == side
    transform = cfg.test_dataloader.dataset.transform
    assert (transform.crop_mode, transform.crop_pct) == ("squash", 1.0)
    assert read_average(cfg) == 0.9999


@pytest.mark.parametrize("config", [*GC_CONFIGS, *FASTER_CONFIGS, *GC_LARGER])
def test_gc_vit_and_faster_vit_share_what_is_published_of_both(config):
    cfg = load_config(config)
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=5.0)
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"
    assert images_of_a_step(cfg) == 4096
    assert cfg.train_cfg.max_epochs == 310 + 10
    mixup = dict(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5, prob=1.0, label_smoothing=0.1)
    assert cfg.model.mixup == mixup
    assert cfg.model.random_erasing == dict(probability=0.25, mode="pixel")
    transform = dict(interpolation="random", auto_augment="rand-m9-mstd0.5-inc1")
    assert cfg.train_dataloader.dataset.transform == transform
    assert read_average(cfg) == 0.9998


@pytest.mark.parametrize("config", GC_CONFIGS)
def test_gc_vit_trains_from_scratch_as_published(config):
    cfg, name = load_config(config), GC_CONFIGS[config]
    batch, rate, _, crop, _ = GC_VIT[name]
    assert (cfg.model.model_name, cfg.model.drop_path_rate) == (f"gc_vit_{name}", rate)
    optimizer = dict(type="AdamW", lr=5e-3, weight_decay=0.05, eps=1e-8, betas=(0.9, 0.999))
    assert cfg.optim_wrapper.optimizer == optimizer
    assert cfg.train_dataloader.batch_size == batch
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.transform.crop_pct == crop


@pytest.mark.parametrize("config", GC_LARGER)
def test_gc_vit_at_larger_sizes_is_trained_as_published(config):
    cfg, side = load_config(config), GC_LARGER[config]
    tag = f"in21k_ft_in1k_{side}"
    assert (cfg.model.model_name, cfg.model.drop_path_rate) == (f"gc_vit_large.{tag}", 0.1)
    windows = {384: (12, 12, 24, 12), 512: (16, 16, 32, 16)}[side]
    assert BACKBONES["gc_vit_large"].tags[tag].arguments == dict(window_size=windows)
    assert (cfg.optim_wrapper.optimizer.lr, cfg.train_dataloader.batch_size) == (1e-3, 32)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.input_size == side
    transform = cfg.test_dataloader.dataset.transform
    assert (transform.crop_mode, transform.crop_pct) == ("squash", 1.0)


@pytest.mark.parametrize("config", FASTER_CONFIGS)
def test_faster_vit_trains_from_scratch_as_published(config):
    cfg, n = load_config(config), FASTER_CONFIGS[config]
    optimizer, decay, mesa, warmup, rate, _, crop, seed = FASTER_VIT[n]
    assert (cfg.model.model_name, cfg.model.drop_path_rate) == (f"faster_vit_{n}", rate)
    options = cfg.optim_wrapper.optimizer
    assert options.get("opt", options.type) == optimizer
    assert (options.lr, options.weight_decay) == (5e-3, decay)
    assert cfg.param_scheduler[0].end == warmup
    assert cfg.train_dataloader.batch_size == 128
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.transform.crop_pct == crop
    assert cfg.randomness.seed == seed
    # The first epoch of 310 past a quarter of them, or 0.3 for variant 3.
    hooks = [dict(type="SelfDistillationHook", weight=mesa, begin_epoch=94 if n == 3 else 78)]
    assert cfg.custom_hooks[1:] == (hooks if mesa else [])


@pytest.mark.parametrize("config, lr, warmup", [
    ("gc_vit_small_8xb32_310e_in1k", 5e-3, 20), ("gc_vit_large_384_8xb32_310e_in1k", 1e-3, 20),
    ("faster_vit_0_8xb128_310e_in1k", 5e-3, 20), ("faster_vit_3_8xb128_310e_in1k", 5e-3, 35),
])  # fmt: skip
def test_the_rate_follows_timm_iteration_by_iteration(config, lr, warmup):
    length = 7
    seen = rates(load_config(config), length, 320 * length)
    assert seen[0] == pytest.approx(1e-6)
    check_that_rates_follow_timm(seen, length, lr=lr, epochs=310, warmup=warmup)
    assert seen[310 * length :] == [pytest.approx(5e-6, rel=1e-3)] * (10 * length)


@pytest.mark.parametrize("config, spares_tables", [
    ("maxvit_tiny_8xb64_300e_in1k", True), ("gc_vit_xxtiny_8xb128_310e_in1k", False),
    ("faster_vit_0_8xb128_310e_in1k", False),
])  # fmt: skip
def test_on_imagenet_one_dimension_is_spared_from_decay_and_maxvits_tables(config, spares_tables):
    cfg = load_config(config)
    model = build(cfg)
    tables = {name for name, _ in model.named_parameters() if name.endswith("rel_pos_bias.table")}
    assert bool(tables) == ("faster_vit" not in config)
    for name, value in decay_by_name(cfg, model).items():
        is_spared = model.get_parameter(name).ndim <= 1 or (spares_tables and name in tables)
        assert value == (0 if is_spared else 0.05), name


def check_backbone(cfg, model_name, drop_path):
    backbone = cfg.model.backbone
    assert (backbone.model_name, backbone.drop_path_rate) == (model_name, drop_path)
    assert backbone.init_cfg.checkpoint == f"checkpoints/{model_name}.pth"


@pytest.mark.parametrize("config", GC_DENSE)
def test_gc_vits_detectors_train_as_published(config):
    cfg, name = load_config(config), GC_DENSE[config]
    check_backbone(cfg, name, GC_VIT[name.removeprefix("gc_vit_")][1])
    optimizer = dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
    assert cfg.optim_wrapper.optimizer == optimizer
    is_cascade = config.startswith("cascade")
    assert cfg.optim_wrapper.type == ("OptimWrapper" if is_cascade else "AmpOptimWrapper")
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.train_cfg.max_epochs == 36
    assert (cfg.param_scheduler[0].end, cfg.param_scheduler[0].start_factor) == (2500, 1e-3)
    assert cfg.param_scheduler[1].milestones == [27, 33]
    assert cfg.model.data_preprocessor.pad_size_divisor == 32
    if name != "gc_vit_tiny":
        return
    model = build(cfg)
    (trunk,) = [m for m in model.modules() if hasattr(m, "dense_arguments")]
    assert {m.window_size for m in trunk.modules() if hasattr(m, "window_size")} >= {(24, 24)}
    for key, value in decay_by_name(cfg, model).items():
        is_spared = "norm" in key or (is_cascade and key.endswith("rel_pos_bias.table"))
        assert value == (0 if is_spared else 0.05), key
    if not is_cascade:
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 48


@pytest.mark.parametrize("config", MAXVIT_DENSE)
def test_maxvits_detectors_train_as_far_as_is_published(config):
    cfg, name = load_config(config), MAXVIT_DENSE[config]
    lr, rate, *_ = MAXVIT_CASCADE[name]
    check_backbone(cfg, f"maxvit_{name}", rate)
    assert cfg.optim_wrapper.optimizer == dict(type="AdamW", lr=lr, weight_decay=0.05)
    assert images_of_a_step(cfg) == 256
    assert cfg.train_cfg.max_epochs == 200
    assert cfg.param_scheduler[0].end == 6000 * cfg.optim_wrapper.accumulative_counts
    assert read_average(cfg) == 0.9998
    assert cfg.model.backbone.model_kwargs == dict(window_size=28, grid_size=28)
    # Levels 3 to 7, in squares of 896 pixels.
    assert cfg.model.rpn_head.anchor_generator.strides == [8, 16, 32, 64, 128]
    assert cfg.model.data_preprocessor.pad_size_divisor == 896
    crop, resize = cfg.train_dataloader.dataset.pipeline[3], cfg.test_dataloader.dataset.pipeline[1]
    assert crop.crop_size == resize.scale == (896, 896)


@pytest.mark.parametrize("config", DINO_CONFIGS)
def test_faster_vits_detectors_train_as_published(config):
    cfg, name = load_config(config), DINO_CONFIGS[config]
    check_backbone(cfg, f"faster_vit_{name}", 0.1)
    is_published_detector = name == "4_21k_224"
    wanted = dict(official_quirks=True) if is_published_detector else None
    assert cfg.model.backbone.get("model_kwargs") == wanted
    assert cfg.model.neck.in_channels == [DINO[name] * 2**i for i in (1, 2, 3)]
    assert cfg.optim_wrapper.optimizer == dict(type="AdamW", lr=1e-4, weight_decay=1e-4)
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=0.1)
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.train_cfg.max_epochs == 12
    assert [schedule.milestones for schedule in cfg.param_scheduler] == [[11]]
    (choice,) = [s for s in cfg.train_dataloader.dataset.pipeline if s.type == "RandomChoice"]
    plain, cropped = choice.transforms
    assert [min(scale) for scale in plain[0].scales] == list(range(480, 801, 32))
    assert {max(scale) for scale in plain[0].scales} == {1333}
    assert [min(scale) for scale in cropped[0].scales] == [400, 500, 600]
    assert cropped[1].crop_size == (384, 600)
    model = cfg.model
    assert (model.num_queries, model.dn_cfg.group_cfg.num_dn_queries) == (900, 100)
    assert (model.dn_cfg.label_noise_scale, model.dn_cfg.box_noise_scale) == (0.5, 0.4)
    for part in (model.encoder, model.decoder):
        assert part.num_layers == 6
        assert part.layer_cfg.ffn_cfg.feedforward_channels == 2048
        assert part.layer_cfg.self_attn_cfg.dropout == part.layer_cfg.ffn_cfg.ffn_drop == 0.0


def test_in_dino_all_parameters_decay_and_the_backbone_learns_at_a_tenth():
    cfg = load_config("dino_faster_vit_0_4scale_1x_coco")
    model = build(cfg)
    assert set(decay_by_name(cfg, model).values()) == {1e-4}
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        wanted = 1e-5 if name.startswith("backbone.") else 1e-4
        assert rate[id(parameter)] == pytest.approx(wanted), name


@pytest.mark.parametrize("config", UPERNET)
def test_segmenters_train_as_ppma_is_published_to(config):
    cfg, (name, channels, rate) = load_config(config), UPERNET[config]
    check_backbone(cfg, name, rate)
    optimizer = dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.05)
    assert cfg.optim_wrapper.optimizer == optimizer
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys == {
        "rel_pos_bias.table": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0),
    }  # fmt: skip
    assert 8 * cfg.train_dataloader.batch_size == 16
    assert cfg.train_cfg.max_iters == 160000
    warmup, poly = cfg.param_scheduler
    assert (warmup.end, warmup.start_factor, poly.power, poly.eta_min) == (1500, 1e-6, 1.0, 0.0)
    assert cfg.model.test_cfg == dict(mode="slide", crop_size=(512, 512), stride=(341, 341))
    assert cfg.model.decode_head.in_channels == [channels * 2**i for i in range(4)]
    assert (cfg.model.auxiliary_head.in_index, cfg.model.auxiliary_head.in_channels) == (
        2, 4 * channels,
    )  # fmt: skip
    assert cfg.model.auxiliary_head.loss_decode.loss_weight == 0.4


def test_the_pages_and_the_registry_say_the_published_figures():
    rows = rows_of("classification")
    published = {}
    for config, name in SCRATCH.items():
        published[config] = (f"maxvit_{name}", "in1k", *MAXVIT[name][:2], 224)
    for config, (start, tag, rate, top1) in TUNED.items():
        name = f"maxvit_{start.removesuffix('_in21k')}"
        published[config] = (name, tag, rate, top1, int(tag[-3:]))
    for config, name in GC_CONFIGS.items():
        tag = "in1k" if name == "large" else ""
        published[config] = (f"gc_vit_{name}", tag, *GC_VIT[name][1:3], 224)
    published["gc_vit_large_384_8xb32_310e_in1k"] = (
        "gc_vit_large", "in21k_ft_in1k_384", 0.1, "87.4", 384,
    )  # fmt: skip
    for config, n in FASTER_CONFIGS.items():
        published[config] = (f"faster_vit_{n}", "", *FASTER_VIT[n][4:6], 224)
    for config, (name, tag, rate, top1, side) in published.items():
        assert rows[config] == [top1, str(rate), str(side)]
        assert BACKBONES[name].tags[tag].published.top1 == (float(top1),)
    larger = BACKBONES["gc_vit_large"].tags["in21k_ft_in1k_512"]
    assert larger.published.top1 == (87.6,)
    assert rows["gc_vit_large_512_8xb32_310e_in1k"] == [
        "87.6 (recipe not published)", "0.1", "512",
    ]  # fmt: skip
    rows = rows_of("detection")
    for head, table in (("mask_rcnn", MASK_RCNN), ("cascade_mask_rcnn", CASCADE)):
        for name, figures in table.items():
            rate = GC_VIT[name.removeprefix("gc_vit_")][1]
            assert rows[f"{head}_{name}_fpn_3x_coco"] == [*figures, str(rate)]
    for config, name in MAXVIT_DENSE.items():
        _, rate, *figures = MAXVIT_CASCADE[name]
        assert rows[config] == [*figures, str(rate)]
    for config, name in DINO_CONFIGS.items():
        assert rows[config][0] == ("55.16" if name == "4_21k_224" else "not published")
    rows = rows_of("segmentation")
    for config, (name, _, rate) in UPERNET.items():
        figure = "49.2" if name == "gc_vit_base" else "not published"
        assert rows[config] == [figure, str(rate)]
