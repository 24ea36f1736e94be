"""Training data as a function of seed, epoch, rank and position, from wherever it is started."""

import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch.utils.data import Dataset

import densezoo  # noqa: F401
from densezoo.tools.engine.image_data import fit_stream_loaders
from densezoo.tools.engine.seeding import (
    ITERATION,
    SAMPLE,
    EndlessBatches,
    SeededSamples,
    mix,
    replayed,
    seed_process,
)

AUGMENTED = dict(auto_augment="rand-m9-mstd0.5-inc1", scale=(0.3, 1.0))
SHARDS = dict(name="wds/", split="colours-{0..2}.tar|21")


def _loader(colours, *, num_workers=0, seed=0, rank=0, **options):
    """Build a replayable loader of five batches of four of the 21 augmented images."""
    dataset = dict(
        type="TimmDataset",
        root=str(colours / "folder"),
        is_training=True,
        input_size=32,
        transform=AUGMENTED,
    )
    cfg = dict(
        batch_size=4,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        drop_last=True,
        collate_fn=dict(type="default_collate"),
        sampler=dict(type="DefaultSampler", shuffle=True),
        dataset={**dataset, **options.pop("dataset", {})},
    )
    cfg.update(options)
    fit_stream_loaders({"train_dataloader": cfg})
    built = Runner.build_dataloader(cfg, seed=seed)
    return replayed(built, cfg, built.dataset, seed, rank)


def _epochs(loader, epochs=(0, 1)):
    batches = []
    for epoch in epochs:
        loader.set_epoch(epoch)
        batches.append(list(loader))
    return batches


def _equal(one, two):
    return one["img_path"] == two["img_path"] and torch.equal(one["inputs"], two["inputs"])


def _assert_equal_batches(one, two):
    assert len(one) == len(two) > 0
    for first, second in zip(one, two, strict=True):
        assert _equal(first, second)


def test_samples_do_not_depend_on_workers(colours):
    alone = _epochs(_loader(colours))
    torch.manual_seed(1)  # what else the process draws does not matter
    shared = _epochs(_loader(colours, num_workers=2))
    for one, two in zip(alone, shared, strict=True):
        _assert_equal_batches(one, two)
    # A later epoch is the same without the one before.
    _assert_equal_batches(_epochs(_loader(colours, num_workers=2), [1])[0], alone[1])


def test_samples_differ_by_seed_rank_epoch_and_place(colours):
    unshuffled = dict(
        sampler=dict(type="DefaultSampler", shuffle=False), dataset=dict(split="train")
    )
    first = _epochs(_loader(colours, **unshuffled), [0, 1, 0])
    others = [first[1]]
    others += _epochs(_loader(colours, seed=1, **unshuffled), [0])
    others += _epochs(_loader(colours, rank=1, **unshuffled), [0])
    for batches in others:
        for one, two in zip(first[0], batches, strict=True):
            assert one["img_path"] == two["img_path"]
            assert not torch.equal(one["inputs"], two["inputs"])
    _assert_equal_batches(first[0], first[2])


def test_loading_leaves_the_generators_of_the_process_alone(colours):
    loader = _loader(colours)
    batches = iter(loader)
    next(batches)  # PyTorch draws a seed for workers when an iteration begins
    seed_process(ITERATION, 0, 0, 0)
    expected = random.random(), np.random.random(), torch.rand(1)
    seed_process(ITERATION, 0, 0, 0)
    next(batches)
    assert (random.random(), np.random.random(), torch.rand(1)) == expected
    seed_process(ITERATION, 0, 1, 0)
    assert (random.random(), np.random.random()) != expected[:2]


def test_places_of_a_run_have_seeds_of_their_own():
    keys = list(itertools.product((SAMPLE, ITERATION), (0, 1, 2**31), (0, 1, 2), (0, 1), range(20)))
    assert len({mix(*key) for key in keys}) == len(keys)


SAMPLERS = {
    "default": dict(),
    "not_shuffled": dict(sampler=dict(type="DefaultSampler", shuffle=False)),
    "repeated": dict(sampler=dict(type="RepeatedAugmentationSampler")),
    "endless": dict(sampler=dict(type="InfiniteSampler", shuffle=True)),
    "workers": dict(sampler=dict(type="InfiniteSampler", shuffle=True), num_workers=2),
    "shards": dict(dataset=dict(SHARDS), num_workers=2),
}


@pytest.mark.parametrize("num_skipped", [0, 3, 5, 7, 11])
@pytest.mark.parametrize("name", SAMPLERS)
def test_skipping_gives_what_comes_after(colours, name, num_skipped):
    options = SAMPLERS[name]
    if name == "shards":
        options = {**options, "dataset": {**SHARDS, "root": str(colours / "shards")}}
    expected = list(itertools.islice(EndlessBatches(_loader(colours, **options)), 14))
    batches = EndlessBatches(_loader(colours, **options))
    batches.skip_iter(num_skipped)
    _assert_equal_batches(list(itertools.islice(batches, 14 - num_skipped)), expected[num_skipped:])
    assert not _equal(expected[0], expected[6])


class Shapes(Dataset):
    """Indices as samples, of two shapes and three classes, as mmdet's samplers ask for them."""

    metainfo = dict(classes=("a", "b", "c"))

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return dict(index=index, draw=random.random())

    def get_data_info(self, index):
        return dict(width=1 + index % 2, height=1)

    def get_cat_ids(self, index):
        return [index % 3]


@pytest.mark.parametrize(
    "sampler",
    [
        dict(type="DefaultSampler", shuffle=True),
        dict(type="InfiniteSampler", shuffle=True),
        dict(type="mmdet.ClassAwareSampler"),
    ],
    ids=lambda sampler: sampler["type"],
)
def test_samplers_of_mmdet_are_replayed(sampler):
    import mmdet.datasets  # noqa: F401  registers

    cfg = dict(
        batch_size=3,
        sampler=sampler,
        batch_sampler=dict(type="mmdet.AspectRatioBatchSampler"),
        dataset=Shapes(),
    )

    def draw(num_skipped):
        built = Runner.build_dataloader(cfg, seed=0)
        batches = EndlessBatches(replayed(built, cfg, built.dataset, 0, 0))
        batches.skip_iter(num_skipped)
        return list(itertools.islice(batches, 10 - num_skipped))

    whole = draw(0)
    assert draw(4) == whole[4:] and draw(8) == whole[8:]


def test_an_epoch_of_shards_is_the_same_whatever_came_before(colours):
    options = dict(dataset={**SHARDS, "root": str(colours / "shards")}, num_workers=2)
    first, second = _epochs(_loader(colours, **options))
    (alone,) = _epochs(_loader(colours, **options), [1])
    _assert_equal_batches(alone, second)
    assert not all(_equal(one, two) for one, two in zip(first, second, strict=True))
    assert all(".tar: " in name for batch in first for name in batch["img_path"])


def test_a_wrapped_data_set_reads_and_writes_through(colours):
    dataset = Shapes()
    wrapped = pickle.loads(pickle.dumps(SeededSamples(dataset)))
    assert wrapped.metainfo == dataset.metainfo and len(wrapped) == 20
    assert wrapped[3]["index"] == 3
    shared = SeededSamples(dataset)
    shared.pipeline = "new"
    assert dataset.pipeline == "new"
    with pytest.raises(AttributeError, match="missing"):
        _ = shared.missing


def test_a_config_builds_the_runner_by_its_name(tmp_path):
    cfg = dict(
        runner_type="DurableRunner",
        model=dict(type="ImageClassifier", model_name="test_vit", num_classes=3),
        work_dir=str(tmp_path),
        experiment_name="by_name",
        default_hooks=dict(sampler_seed=dict(type="ReseedHook")),
    )
    runner = RUNNERS.build(cfg)
    assert type(runner).__name__ == "DurableRunner"
    hooks = [type(hook).__name__ for hook in runner.hooks]
    assert hooks[-1] == "ReseedHook" and "DistSamplerSeedHook" not in hooks


@pytest.mark.parametrize("options", [{}, dict(dataset=SHARDS)], ids=["images", "shards"])
def test_an_epoch_that_was_done_is_not_trained_again(colours, options):
    if options:
        options["dataset"] = {**SHARDS, "root": str(colours / "shards")}
    loader = _loader(colours, **options)
    loader.set_epoch(1)
    loader.skip(len(loader), is_within_epoch=True)
    assert list(loader) == []
    loader.set_epoch(2)
    assert len(list(loader)) == len(loader)


def test_configs_without_densezoos_hooks_get_them(colours, tmp_path):
    """With mmengine's hook alone every epoch would have the augmentations of the first."""
    cfg = dict(
        runner_type="DurableRunner",
        default_scope="mmengine",
        work_dir=str(tmp_path),
        log_level="ERROR",
        model=dict(type="ImageClassifier", model_name="test_convnext", num_classes=3),
        default_hooks=dict(
            sampler_seed=dict(type="DistSamplerSeedHook"),
            checkpoint=dict(type="CheckpointHook", interval=2, max_keep_ckpts=7),
            timer=None,
        ),
    )
    hooks = {type(hook).__name__: hook for hook in RUNNERS.build(cfg).hooks}
    assert {"ReseedHook", "DurableCheckpointHook", "StopOnBadLossHook"} <= hooks.keys()
    assert not {"DistSamplerSeedHook", "CheckpointHook", "IterTimerHook"} & hooks.keys()
    checkpoint = hooks["DurableCheckpointHook"]
    assert (checkpoint.interval, checkpoint.max_keep_ckpts) == (2, 7)
