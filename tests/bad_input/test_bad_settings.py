"""A mistake in a setting of a config is one line that names it, before any work.

A table of cases: a setting, and parts of the line that `train` says of it.
"""

import pytest
from mistakes import CONFIG, classifier_options, snapshot

from densezoo.tools.engine.config_files import shipped_configs

# Options beside those of a good run, and parts of the line that `train` says.
OPTIONS = {
    "no-equals": ("model", "KEY=VALUE", "'model'"),
    "no-key": ("=3", "KEY=VALUE"),
    "empty-part": ("model..x=1", "KEY=VALUE", "model..x"),
    "brackets": ("model.num_classes=[1,", "model.num_classes=[1,", "brackets"),
    "top-level-key": ("modl.a=1", "no 'modl'", "did you mean model"),
    "index": ("custom_hooks.9.interval=3", "custom_hooks.9.interval=3", "Index 9 exceeds"),
    "no-index": ("custom_hooks.x.interval=3", "custom_hooks.x", "integers"),
    "nested-key": ("model.backbone.modl_name=1", "'backbone'"),
    "model-key": ("model.num_clases=3", "'num_clases'"),
    "model-int": ("model=3", "model is 3: a dict"),
    "model-none": ("model=None", "lacks model"),
    "model-type": ("model.type=ImageClasifier", "ImageClasifier"),
    "model-name": ("model.model_name=cas_vit_xss", "did you mean cas_vit_xs"),
    "model-classes": ("model.num_classes=abc", "num_classes is 'abc': a whole number"),
    "model-other-classes": ("model.num_classes=4", "10 classes", "model.num_classes=10"),
    "model-drop-path": ("model.drop_path_rate=3", "drop_path_rate is 3", "from 0 to 1"),
    "optimizer-key": ("optim_wrapper.optimizer.typ=SGD", "'typ'"),
    "optimizer-type": ("optim_wrapper.optimizer.type=Adamm", "'Adamm'", "did you mean Adam"),
    "optimizer-lr": ("optim_wrapper.optimizer.lr=fast", "optimizer.lr is 'fast': a number"),
    "optimizer-lr-negative": ("optim_wrapper.optimizer.lr=-1", "optimizer.lr is -1", "at least 0"),
    "batch-word": ("train_dataloader.batch_size=abc", "batch_size is 'abc': a whole number"),
    "batch-0": ("train_dataloader.batch_size=0", "train_dataloader.batch_size is 0", "at least 1"),
    "batch-float": ("val_dataloader.batch_size=2.5", "val_dataloader.batch_size is 2.5"),
    "batch-large": (
        "train_dataloader.batch_size=4000",
        "TrainLoop has no batch",
        "lower batch_size",
    ),
    "workers": ("train_dataloader.num_workers=-1", "num_workers is -1", "at least 0"),
    "loader-key": ("train_dataloader.batch_siz=3", "'batch_siz'"),
    "loader-int": ("train_dataloader=3", "train_dataloader is 3: a dict"),
    "loader-none": ("train_dataloader=None", "lacks train_dataloader"),
    "epochs-0": ("train_cfg.max_epochs=0", "max_epochs is 0", "at least 1"),
    "epochs-negative": ("train_cfg.max_epochs=-1", "max_epochs is -1", "at least 1"),
    "epochs-word": ("train_cfg.max_epochs=ten", "max_epochs is 'ten': a whole number"),
    "interval-0": ("train_cfg.val_interval=0", "val_interval is 0", "at least 1"),
    "accumulation": ("optim_wrapper.accumulative_counts=0", "accumulative_counts is 0"),
    "train-cfg": ("train_cfg=3", "train_cfg is 3: a dict"),
    "train-cfg-key": ("train_cfg.max_epoch=3", "'max_epoch'"),
    "hook-key": ("default_hooks.checkpoint.intervall=3", "'intervall'"),
    "hook-type": ("default_hooks.logger.type=LogerHook", "LogerHook"),
    "data-root": ("train_dataloader.dataset.root=none", "'none' does not exist", "root=PATH"),
    "data-root-int": ("train_dataloader.dataset.root=3", "root is 3: a path"),
    "data-key": ("train_dataloader.dataset.rot=x", "'rot'"),
    "data-size": ("val_dataloader.dataset.input_size=0", "input_size of the data set is 0"),
    "data-transform": ("val_dataloader.dataset.transform.interpolation=x", "KeyError: 'x'"),
    "metric-topk": ("val_evaluator.topk=5", "topk is 5: a list"),
    "seed": ("randomness.seed=-1", "seed is -1", "at least 0"),
    "load-from": ("load_from=none.pth", "'none.pth' does not exist"),
    "init": ("model.init_cfg.checkpoint=none.pth", "none.pth"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_mistake_in_a_config_is_one_line_before_any_work(case, run, stage, tmp_path):
    option, *parts = OPTIONS[case]
    before = snapshot(stage)
    options = [*classifier_options(stage), "model.init_cfg.type=Pretrained", option]
    if case != "init":
        options.remove("model.init_cfg.type=Pretrained")
    code, said = run(f"train {CONFIG} --work-dir work", options)
    line = said.strip().splitlines()[-1]
    assert code == 1, said
    assert "Traceback" not in said
    assert line.startswith("densezoo train: error: ")
    for part in parts:
        assert part in line, line
    assert not list(tmp_path.rglob("*.pth"))
    assert snapshot(stage) == before


def test_a_hook_that_needs_another_is_named_before_any_work(run, stage, tmp_path):
    config = tmp_path / "alone.py"
    config.write_text(
        f"_base_ = {str(shipped_configs()[CONFIG])!r}\n"
        "custom_hooks = [dict(type='SelfDistillationHook', weight=1.0, begin_epoch=0)]\n"
    )
    code, said = run(f"train {config} --work-dir work", classifier_options(stage))
    assert code == 1, said
    assert "Traceback" not in said
    line = said.strip().splitlines()[-1]
    assert line.startswith("densezoo train: error: SelfDistillationHook learns from the average")
    assert not list(tmp_path.rglob("*.pth"))
