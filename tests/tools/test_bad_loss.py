"""A loss that is no number ends a run in one line, and no ruined weights are saved."""

import itertools
import subprocess
import sys

import pytest
import torch
from mmengine.hooks import RuntimeInfoHook
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch.utils._python_dispatch import TorchDispatchMode

from densezoo.backbones.checkpoints import read_checkpoint
from densezoo.tools.cli import main
from densezoo.tools.demo_data import make_dataset
from densezoo.tools.engine.bad_loss import StopOnBadLossHook

CONFIG = "cas_vit_xs_8xb128_300e_in1k"
_run_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def options(colours):
    """The options that make the ImageNet config a run of a second on the images of `colours`."""
    loaders = ("train_dataloader", "val_dataloader")
    return [
        "model.model_name=test_convnext",
        "model.num_classes=3",
        "model.drop_path_rate=0.0",
        "model.model_kwargs=None",
        "model.mixup=None",
        "model.loss=None",
        *(f"{loader}.dataset.root={colours / 'folder'}" for loader in loaders),
        *(f"{loader}.dataset.input_size=32" for loader in loaders),
        *(f"{loader}.num_workers=0" for loader in loaders),
        *(f"{loader}.persistent_workers=False" for loader in loaders),
        "train_dataloader.batch_size=4",
        "train_dataloader.dataset.transform.no_aug=True",
        "optim_wrapper.type=OptimWrapper",
        "optim_wrapper.accumulative_counts=1",
        "train_cfg.max_epochs=2",
        "param_scheduler=None",
    ]


def _train(config, work_dir, cfg_options, *arguments):
    name = f"experiment_name=bad_loss{next(_run_numbers)}"
    return main(
        ["train", config, "--seed", "0", "--work-dir", str(work_dir), *arguments]
        + ["--cfg-options", *cfg_options, name]
    )


def _stopped(capsys, *arguments):
    """Train, which has to stop, and return the one line that it says."""
    capsys.readouterr()
    assert _train(*arguments) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(errors)
    assert errors[-1].startswith("densezoo train: error: ")
    return errors[-1]


def test_a_loss_that_is_nan_stops_with_the_iteration_the_files_and_what_to_do(
    tmp_path, options, capsys, colours
):
    line = _stopped(capsys, CONFIG, tmp_path, [*options, "optim_wrapper.optimizer.lr=1e30"])
    assert "loss is nan at iteration 2 (epoch 1)" in line
    files = [word.rstrip(",;") for word in line.split() if word.rstrip(",;").endswith(".png")]
    assert len(files) == 4, line
    assert all((colours / "folder" / "train").joinpath(*f.split("/")[-2:]).exists() for f in files)
    assert "there is no checkpoint yet" in line and "optim_wrapper.optimizer.lr" in line
    assert not list(tmp_path.glob("*.pth"))


@OPTIM_WRAPPERS.register_module()
class RuiningOptimWrapper(OptimWrapper):
    """An optimizer whose every step leaves a weight that is no number, as a bad gradient does."""

    def step(self, **options):
        super().step(**options)
        with torch.no_grad():
            self.optimizer.param_groups[0]["params"][0].view(-1)[0] = float("nan")


def test_the_last_good_checkpoint_is_named_and_the_run_goes_on_from_it(tmp_path, options, capsys):
    half = [*options, "train_cfg.max_epochs=1"]
    assert _train(CONFIG, tmp_path, half) == 0
    spoiled = [*options, "optim_wrapper.type=RuiningOptimWrapper"]
    line = _stopped(capsys, CONFIG, tmp_path, spoiled, "--resume")
    assert "nan at iteration 7 (epoch 2)" in line
    assert f"the last good checkpoint is {tmp_path / 'epoch_1.pth'}" in line and "--resume" in line
    assert not (tmp_path / "epoch_2.pth").exists()
    assert _train(CONFIG, tmp_path, options, "--resume") == 0
    assert (tmp_path / "epoch_2.pth").exists()


@pytest.mark.parametrize("counts", [1, 2])
def test_an_iteration_based_loop_saves_nothing_of_the_bad_iteration(
    tmp_path, options, capsys, counts
):
    options += [
        "default_hooks.checkpoint.by_epoch=False",
        "default_hooks.checkpoint.save_best=None",
    ]
    options += ["optim_wrapper.optimizer.lr=1e30", f"optim_wrapper.accumulative_counts={counts}"]
    line = _stopped(capsys, CONFIG, tmp_path, options)
    saved = sorted(tmp_path.glob("iter_*.pth"))
    assert f"nan at iteration {counts + 1} (epoch 1)" in line
    assert [path.name for path in saved] == [f"iter_{i + 1}.pth" for i in range(counts)]
    assert str(saved[-1]) in line
    for path in saved:
        weights = read_checkpoint(path)["state_dict"].values()
        assert all(value.isfinite().all() for value in weights)


def test_weights_that_a_step_ruined_are_not_saved_though_its_loss_is_a_number(
    tmp_path, options, capsys
):
    options += ["default_hooks.checkpoint.by_epoch=False", "optim_wrapper.type=RuiningOptimWrapper"]
    line = _stopped(capsys, CONFIG, tmp_path, options)
    assert "not finite at iteration 1 (epoch 1), and were not saved" in line
    assert not list(tmp_path.glob("*.pth")) and not (tmp_path / "last_checkpoint").exists()


@OPTIM_WRAPPERS.register_module()
class OverflowingOptimWrapper(OptimWrapper):
    """An optimizer with PyTorch's gradient scaler, whose first scale is beyond float32."""

    def __init__(self, **options):
        super().__init__(**options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=3e38, backoff_factor=1e-38)
        self.skipped = 0

    def backward(self, loss, **options):
        super().backward(self.scaler.scale(loss), **options)

    def step(self, **options):
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer, **options)
        self.scaler.update()
        self.skipped += self.scaler.get_scale() < before
        print("steps skipped:", self.skipped)


def test_a_gradient_that_overflows_under_loss_scaling_does_not_stop_the_run(
    tmp_path, options, capsys
):
    options += ["optim_wrapper.type=OverflowingOptimWrapper", "train_cfg.max_epochs=1"]
    assert _train(CONFIG, tmp_path, options) == 0
    assert "steps skipped: 1" in capsys.readouterr().out
    assert (tmp_path / "epoch_1.pth").exists()


def test_a_segmenter_names_the_part_of_the_loss_and_its_files(tmp_path, capsys):
    root = make_dataset(tmp_path / "digits", images=16, size=64)
    options = [
        "model.backbone.init_cfg=None",
        "model.data_preprocessor.size=(64,64)",
        "train_dataloader.batch_size=2",
        "train_dataloader.dataset.pipeline.2.scale=(64,64)",
        "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
        "optim_wrapper.optimizer.lr=1e30",
        "param_scheduler=None",
        "default_hooks.checkpoint.interval=1",
    ]
    for loader, split in (("train", "train"), ("val", "val")):
        dataset = f"{loader}_dataloader.dataset"
        options += [
            f"{loader}_dataloader.num_workers=0",
            f"{loader}_dataloader.persistent_workers=False",
            f"{dataset}.data_root={root}",
            f"{dataset}.data_prefix.img_path=images/{split}",
            f"{dataset}.data_prefix.seg_map_path=masks/{split}",
        ]
    work_dir = tmp_path / "run"
    line = _stopped(capsys, "fpn_cas_vit_xs_40k_ade20k", work_dir, options)
    assert "decode.loss_ce is nan at iteration 2; images" in line
    assert line.count(f"{root}/images/train/") == 2
    assert str(work_dir / "iter_1.pth") in line
    assert not (work_dir / "iter_2.pth").exists()


@pytest.mark.slow
def test_the_process_that_stops_ends_the_job_of_two(tmp_path, options):
    options += ["optim_wrapper.optimizer.lr=1e30", "default_hooks.checkpoint.by_epoch=False"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "densezoo", "train", CONFIG, "--seed", "0"]
    command += ["--launcher", "pytorch", "--work-dir", tmp_path, "--cfg-options", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "densezoo train: error: loss is nan at iteration 2 (epoch 1); images" in done.stderr
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_1.pth"]


class _CopyCounter(TorchDispatchMode):
    """Count the values that are copied from tensors into Python, each a wait for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _runner(losses):
    """As much of a Runner as the hooks look at, and `losses` logged by mmengine's own hook."""
    from types import SimpleNamespace

    from mmengine.logging import MessageHub

    runner = SimpleNamespace(message_hub=MessageHub.get_instance(f"hub{next(_run_numbers)}"))
    RuntimeInfoHook().after_train_iter(runner, 0, None, losses)
    return runner


def test_looking_at_the_losses_copies_nothing_from_the_device():
    losses = {"loss": torch.tensor(1.5), "loss_cls": torch.tensor(1.5)}
    with _CopyCounter() as counter:
        runner = _runner(losses)
    assert counter.count == 2, "mmengine copies every loss, every iteration"
    with _CopyCounter() as counter:
        StopOnBadLossHook().after_train_iter(runner, 0, None, losses)
    assert counter.count == 0


def test_figures_that_are_no_losses_may_be_nan():
    losses = {"loss": torch.tensor(1.5), "acc_seg": torch.tensor(float("nan"))}
    StopOnBadLossHook().after_train_iter(_runner(losses), 0, None, losses)
