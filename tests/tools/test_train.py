"""`densezoo train` and `densezoo test` on real files: what a run does, and what stops it."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from densezoo.tools.cli import main

CONFIG = "cas_vit_xs_8xb128_300e_in1k"
_run_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Keep what a run writes beside itself out of the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def options(colours):
    """The options that make the ImageNet config a run of a second on the images of `colours`."""
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    return [
        "model.model_name=test_convnext",
        "model.num_classes=3",
        "model.drop_path_rate=0.0",
        "model.model_kwargs=None",
        *(f"{loader}.dataset.root={colours / 'folder'}" for loader in loaders),
        *(f"{loader}.dataset.input_size=32" for loader in loaders),
        *(f"{loader}.num_workers=0" for loader in loaders),
        *(f"{loader}.persistent_workers=False" for loader in loaders),
        "train_dataloader.batch_size=4",
        # Loading may draw no random numbers where runs of other lengths are compared.
        "train_dataloader.dataset.transform.no_aug=True",
        "optim_wrapper.type=OptimWrapper",
        "optim_wrapper.optimizer.lr=1e-2",
        "train_cfg.max_epochs=2",
        "param_scheduler=None",
    ]


def _densezoo(*arguments, cfg_options):
    """Run the command in this process; mmengine keeps its logs apart by the experiment's name."""
    name = f"experiment_name=run{next(_run_numbers)}"
    return main([*map(str, arguments), "--cfg-options", *cfg_options, name])


def _weights(path):
    return torch.load(path, weights_only=False)["state_dict"]


def _assert_equal_weights(path, other):
    one, two = _weights(path), _weights(other)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], msg=lambda text, key=key: f"{key}: {text}")


def test_a_trained_classifier_is_better_than_chance_and_tests_as_it_validated(
    tmp_path, options, capsys
):
    options += ["train_cfg.max_epochs=8", "default_hooks.logger.interval=2"]
    assert _densezoo("train", CONFIG, "--work-dir", tmp_path, "--seed", 0, cfg_options=options) == 0
    log = next(tmp_path.glob("*/vis_data/scalars.json"))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    figures = [line["accuracy/top1"] for line in lines if "accuracy/top1" in line]
    assert len(figures) == 8
    assert losses[-1] < losses[0]
    assert figures[-1] > 60
    assert list(tmp_path.glob("*/vis_data/events.out.tfevents*")), "TensorBoard got nothing"
    assert "eta: " in capsys.readouterr().out

    out = tmp_path / "figures.json"
    arguments = [CONFIG, tmp_path / "epoch_8.pth", "--work-dir", tmp_path / "test", "--out", out]
    assert _densezoo("test", *arguments, cfg_options=options) == 0
    assert json.loads(out.read_text()) == {"accuracy/top1": pytest.approx(figures[-1])}
    assert _densezoo("test", *arguments, cfg_options=options) == 1, "--out was overwritten"


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, options):
    # A last batch that does not fill an accumulation is used at the end of a run only.
    options += ["optim_wrapper.accumulative_counts=1"]
    arguments = ["train", CONFIG, "--seed", 3, "--work-dir"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert _densezoo(*arguments, whole, cfg_options=options) == 0
    half = [*options, "train_cfg.max_epochs=1"]
    assert _densezoo(*arguments, parts, "--resume", cfg_options=half) == 0, "nothing to resume yet"
    _assert_equal_weights(parts / "epoch_1.pth", whole / "epoch_1.pth")
    assert _densezoo(*arguments, parts, "--resume", cfg_options=options) == 0
    _assert_equal_weights(parts / "epoch_2.pth", whole / "epoch_2.pth")
    copy = tmp_path / "copy"
    checkpoint = parts / "epoch_1.pth"
    assert _densezoo(*arguments, copy, "--resume", checkpoint, cfg_options=options) == 0
    _assert_equal_weights(copy / "epoch_2.pth", whole / "epoch_2.pth")


def test_two_accumulated_batches_are_one_batch_of_twice_the_size(tmp_path, options):
    # 20 of the 21 images are used in both cases.
    options += ["custom_hooks=None", "train_dataloader.sampler.shuffle=False"]
    options += ["optim_wrapper.optimizer.eps=1e-3", "train_cfg.max_epochs=1"]
    for batch_size, counts in ((2, 2), (4, 1)):
        arguments = ["train", CONFIG, "--seed", 0, "--work-dir", tmp_path / str(counts)]
        own = [
            f"train_dataloader.batch_size={batch_size}",
            f"optim_wrapper.accumulative_counts={counts}",
        ]
        assert _densezoo(*arguments, cfg_options=options + own) == 0
    _assert_equal_weights(tmp_path / "2" / "epoch_1.pth", tmp_path / "1" / "epoch_1.pth")


def test_the_average_of_the_weights_is_what_a_checkpoint_gives(tmp_path, options):
    options += ["optim_wrapper.accumulative_counts=1", "custom_hooks.0.interval=1"]
    options += ["custom_hooks.0.momentum=0.25", "default_hooks.checkpoint.by_epoch=False"]
    options += ["default_hooks.checkpoint.max_keep_ckpts=-1", "train_cfg.max_epochs=1"]
    assert _densezoo("train", CONFIG, "--work-dir", tmp_path, "--seed", 0, cfg_options=options) == 0
    key = "backbone.stem.0.weight"
    average = None
    for iteration in range(1, 6):
        path = tmp_path / f"iter_{iteration}.pth"
        raw = torch.load(path, weights_only=False)["ema_state_dict"][f"module.{key}"]
        average = raw if average is None else 0.75 * average + 0.25 * raw
        assert iteration == 1 or not torch.equal(average, raw)
        torch.testing.assert_close(_weights(path)[key], average)


def test_a_detector_starts_from_the_average_of_a_classifier(tmp_path, options):
    options += ["model.model_name=cas_vit_xs", "train_cfg.max_epochs=1"]
    options += ["optim_wrapper.accumulative_counts=1", "custom_hooks.0.interval=1"]
    assert _densezoo("train", CONFIG, "--work-dir", tmp_path, cfg_options=options) == 0
    path = tmp_path / "epoch_1.pth"
    backbone = MODELS.build(
        dict(
            type="DenseBackbone",
            model_name="cas_vit_xs",
            init_cfg=dict(type="Pretrained", checkpoint=str(path)),
        )
    )
    backbone.init_weights()
    trained = _weights(path)
    for name, value in backbone.model.state_dict().items():
        own = f"backbone.{name.removeprefix('model.')}"
        assert torch.equal(value, trained[own]), name


def test_mixed_precision_trains_on_the_cpu(tmp_path, options):
    arguments = ["train", CONFIG, "--amp", "--work-dir", tmp_path]
    assert _densezoo(*arguments, cfg_options=options) == 0
    used = Config.fromfile(tmp_path / f"{CONFIG}.py", import_custom_modules=False)
    on_gpu = torch.cuda.is_available()
    assert used.optim_wrapper.type == ("AmpOptimWrapper" if on_gpu else "CpuAmpOptimWrapper")
    weights = _weights(tmp_path / "epoch_2.pth").values()
    assert all(value.isfinite().all() and value.dtype != torch.bfloat16 for value in weights)


def test_the_learning_rate_is_scaled_to_the_batch_and_weights_are_loaded(tmp_path, options):
    options += ["train_cfg.max_epochs=1", "default_hooks.logger.interval=1"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert _densezoo("train", CONFIG, "--work-dir", first, cfg_options=options) == 0
    arguments = ["train", CONFIG, "--auto-scale-lr", "--work-dir", second]
    options += [f"load_from={first / 'epoch_1.pth'}", "optim_wrapper.optimizer.lr=1e-9"]
    assert _densezoo(*arguments, cfg_options=options) == 0
    lines = next(second.glob("*/vis_data/scalars.json")).read_text().splitlines()
    assert json.loads(lines[0])["lr"] == pytest.approx(1e-9 * 4 / 1024)
    _assert_equal_weights(second / "epoch_1.pth", first / "epoch_1.pth")


def test_shards_are_trained_on_with_a_name_and_a_split(tmp_path, colours, options):
    options += [
        "train_cfg.max_epochs=1",
        *(
            f"{loader}.dataset.{key}"
            for loader in ("train_dataloader", "val_dataloader")
            for key in ("name=wds/", f"root={colours / 'shards'}", "split=colours-{0..2}.tar|21")
        ),
    ]
    assert _densezoo("train", CONFIG, "--work-dir", tmp_path, cfg_options=options) == 0
    lines = next(tmp_path.glob("*/vis_data/scalars.json")).read_text().splitlines()
    assert "accuracy/top1" in json.loads(lines[-1])


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path, options):
    """By the command of the README; test_distributed.py holds what such a run computes."""
    options += ["train_cfg.max_epochs=1", "custom_hooks=None"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "densezoo", "train", CONFIG, "--seed", "0"]
    command += ["--launcher", "pytorch", "--work-dir", tmp_path, "--cfg-options", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert "GPU number: 2" in log
    assert (tmp_path / "epoch_1.pth").exists()


def _stopped(capsys, *arguments, cfg_options=()):
    """Run a command that has to stop, and return the one line that it says."""
    capsys.readouterr()
    assert _densezoo(*arguments, cfg_options=cfg_options) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    line = errors[-1]
    assert line.startswith(f"densezoo {arguments[0]}: error: ")
    assert "Traceback" not in "".join(errors)
    return line


def test_a_run_does_not_overwrite_the_checkpoints_of_another(tmp_path, options, capsys):
    (tmp_path / "epoch_1.pth").write_bytes(b"precious")
    line = _stopped(capsys, "train", CONFIG, "--work-dir", tmp_path, cfg_options=options)
    assert "--resume" in line and "--work-dir" in line
    assert (tmp_path / "epoch_1.pth").read_bytes() == b"precious"


def test_missing_things_are_named_with_what_sets_them(tmp_path, options, capsys):
    line = _stopped(capsys, "train", "cas_vit_xs_8xb128_300e_in10k")
    assert CONFIG in line
    line = _stopped(capsys, "train", CONFIG)
    assert "data/imagenet" in line and "train_dataloader.dataset.root=PATH" in line
    line = _stopped(capsys, "train", "mask_rcnn_cas_vit_xs_fpn_1x_coco")
    assert "data/coco" in line and "train_dataloader.dataset.data_root=PATH" in line
    line = _stopped(capsys, "test", CONFIG, "none.pth", cfg_options=options)
    assert "none.pth" in line
    line = _stopped(capsys, "train", CONFIG, "--resume", "none.pth", cfg_options=options)
    assert "none.pth" in line
    line = _stopped(
        capsys,
        "train",
        "cas_vit_xs_384_8xb64_30e_in1k",
        cfg_options=[o for o in options if "scheduler" not in o],
    )
    assert "checkpoints/cas_vit_xs.pth" in line and "model.init_cfg.checkpoint=FILE" in line
    assert not (tmp_path / "work_dirs").exists(), "a run that can't start left a folder"


def test_mistakes_in_the_config_are_named(tmp_path, options, capsys):
    arguments = ["train", CONFIG, "--work-dir", tmp_path]
    for option, message in [
        ("model.model_name=cas_vit_xss", "cas_vit_xs"),
        ("model.num_classes=4", "the data has 3 classes"),
        ("model.type=ImageClasifier", "ImageClasifier"),
        ("model.loss.type=FocalLoss", "LabelSmoothingCrossEntropy"),
        ("train_dataloader.dataset.rot=here", "rot"),
        ("optim_wrappr.type=OptimWrapper", "optim_wrapper"),
    ]:
        line = _stopped(capsys, *arguments, cfg_options=[*options, option])
        assert message in line, line


def test_a_checkpoint_of_another_model_is_refused(tmp_path, options, capsys):
    assert _densezoo("train", CONFIG, "--work-dir", tmp_path, cfg_options=options) == 0
    checkpoint = tmp_path / "epoch_2.pth"
    other = [*options, "model.model_name=test_vit", *(f"{k}=160" for k in _sizes())]
    line = _stopped(capsys, "test", CONFIG, checkpoint, cfg_options=other)
    assert "is not of this ImageClassifier" in line
    line = _stopped(
        capsys,
        "train",
        CONFIG,
        "--resume",
        checkpoint,
        "--work-dir",
        tmp_path / "new",
        cfg_options=other,
    )
    assert "is not of this ImageClassifier" in line
    published = tmp_path / "published.pth"
    torch.save({"state_dict": {"stem.weight": torch.zeros(3)}}, published)
    line = _stopped(capsys, "test", CONFIG, published, cfg_options=options)
    assert "does not hold weights of test_convnext" in line
    line = _stopped(capsys, "train", CONFIG, "--resume", published, cfg_options=options)
    assert "no state of an optimizer" in line


def _sizes():
    return [f"{split}_dataloader.dataset.input_size" for split in ("train", "val", "test")]


def test_a_work_dir_that_cannot_be_written_is_named(tmp_path, options, capsys):
    (tmp_path / "file").write_text("")
    work_dir = tmp_path / "file" / "run"
    line = _stopped(capsys, "train", CONFIG, "--work-dir", work_dir, cfg_options=options)
    assert str(work_dir) in line and "--work-dir" in line


def test_the_command_itself_ends_with_one_line_and_an_exit_code():
    command = [sys.executable, "-m", "densezoo", "test", "no_such_config", "none.pth"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("densezoo test: error: config 'no_such_config'")
    assert len(done.stderr.strip().splitlines()) == 1
