"""Runs of several processes: what they compute, what they write, and how they end."""

import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import timm
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from densezoo.tools.cli import main
from densezoo.tools.demo_data import CLASSES, make_dataset
from densezoo.tools.engine.config_files import load_config, shipped_configs, walk_dicts
from densezoo.tools.engine.cpu import adapt_to_cpu
from densezoo.tools.engine.runner import DurableRunner

CLASSIFIER = "cas_vit_xs_8xb128_300e_in1k"
DETECTOR = "retinanet_cas_vit_xs_fpn_1x_coco"
SEGMENTER = "fpn_cas_vit_xs_40k_ade20k"
STEPS = 5
_run_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Keep what a run writes beside itself out of the checkout, and let it find `rank_probe`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The embedded data set, small: 20 and 5 scenes of 64 pixels in the formats of all tasks."""
    return make_dataset(tmp_path_factory.mktemp("data") / "digits", images=20, size=64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file of ``cas_vit_xs`` weights whose BatchNorm has the statistics of data: with those that
    it starts with, evaluation mode lets activations explode.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("cas_vit_xs", num_classes=10, distillation=False).train()
        with torch.no_grad():
            for _ in range(20):
                model(torch.randn(8, 3, 64, 64))
    path = tmp_path_factory.mktemp("weights") / "cas_vit_xs.pth"
    torch.save(model.state_dict(), path)
    return path


def _write_config(path, base, **settings) -> Path:
    """Write a config that differs from a shipped one in `settings`."""
    settings["custom_imports"] = dict(imports=["densezoo", "rank_probe"])
    lines = [f"_base_ = {str(shipped_configs()[base])!r}"]
    lines += [f"{key} = {value!r}" for key, value in settings.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def _settings(task, digits, weights, folder, batch_size):
    """The settings that make a shipped config train 5 steps on `digits`, the same in each process:
    without augmentation, dropout and stochastic depth, and with BatchNorm in evaluation mode.

    AdamW has an eps well above the rounding of gradients: with one of 1e-8 its first step is the
    gradient's sign, which rounding decides where the gradient is all but zero. Without weight
    decay it moves by the gradients alone.
    """
    initial = dict(type="Pretrained", checkpoint=str(weights))
    loader = dict(batch_size=batch_size, num_workers=0, persistent_workers=False)
    settings = dict(
        optim_wrapper=dict(
            type="OptimWrapper", optimizer=dict(lr=5e-4, eps=1e-4, weight_decay=0.0)
        ),
        param_scheduler=None,
        train_cfg=dict(_delete_=True, type="IterBasedTrainLoop", max_iters=STEPS),
        default_hooks=dict(checkpoint=dict(by_epoch=False, interval=STEPS, save_best=None)),
        custom_hooks=[dict(type="RankProbe", folder=str(folder))],
        val_cfg=None,
        val_dataloader=None,
        val_evaluator=None,
    )
    if task == "classifier":
        settings["model"] = dict(num_classes=10, drop_path_rate=0.0, init_cfg=initial)
        settings["optim_wrapper"]["accumulative_counts"] = 1
        loader["dataset"] = dict(
            root=str(digits / "classes"), input_size=64, transform=dict(no_aug=True)
        )
    elif task == "detector":
        settings["model"] = dict(
            backbone=dict(init_cfg=initial), bbox_head=dict(num_classes=len(CLASSES))
        )
        loader["dataset"] = dict(
            data_root=str(digits),
            ann_file="annotations/instances_train.json",
            data_prefix=dict(img="images/train"),
            metainfo=dict(classes=CLASSES),
            filter_cfg=dict(min_size=1),
            pipeline=[
                dict(type="LoadImageFromFile"),
                dict(type="LoadAnnotations", with_bbox=True),
                dict(type="PackDetInputs"),
            ],
        )
    else:
        settings["model"] = dict(
            backbone=dict(init_cfg=initial),
            decode_head=dict(dropout_ratio=0.0),
            data_preprocessor=dict(size=(64, 64)),
        )
        loader["dataset"] = dict(
            data_root=str(digits),
            data_prefix=dict(img_path="images/train", seg_map_path="masks/train"),
            pipeline=[
                dict(type="LoadImageFromFile"),
                dict(type="LoadAnnotations", reduce_zero_label=True),
                dict(type="PackSegInputs"),
            ],
        )
    settings["train_dataloader"] = loader
    return settings


# Several processes on the CPU, also where there is one GPU.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _alone(*arguments) -> int:
    """Run the command in this process; mmengine keeps its logs apart by the experiment's name."""
    name = f"experiment_name=distributed{next(_run_numbers)}"
    arguments = [*map(str, arguments), "--cfg-options", name]
    if torch.cuda.is_available():
        return _run([sys.executable, "-m", "densezoo", *arguments]).returncode
    return main(arguments)


def _together(*arguments, script=("-m", "densezoo")) -> subprocess.CompletedProcess:
    """Run the command in two processes of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", *script, *map(str, arguments)]
    return _run(command)


def _run(command) -> subprocess.CompletedProcess:
    """Run a command on the CPU; its error output goes with the other."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)},
    )


def _steps(folder, ranks=1) -> list[dict]:
    """What `RankProbe` wrote, a dict for each step: the images of all ranks, sorted, and the mean
    of their losses.
    """
    texts = [Path(folder, f"rank{rank}.jsonl").read_text() for rank in range(ranks)]
    rows = [[json.loads(line) for line in text.splitlines()] for text in texts]
    return [
        {
            "images": sorted(image for part in step for image in part["images"]),
            "losses": {
                key: sum(part["losses"][key] for part in step) / ranks for key in step[0]["losses"]
            },
        }
        for step in zip(*rows, strict=True)
    ]


def _load(path) -> dict:
    return torch.load(path, weights_only=False)["state_dict"]


def _assert_same_training(one, two, steps_of_one, steps_of_two, iters_of_one=STEPS):
    """Losses agree to 1e-5 of their value, weights to 1e-5 of the largest of their layer (biases
    are small at first); half of the matrices have moved by 500 times that at least.
    """
    assert len(steps_of_one) == STEPS
    for mine, theirs in zip(steps_of_one, steps_of_two, strict=True):
        assert mine["images"] == theirs["images"]
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    initial = torch.load(one / "initial.pth")
    mine, theirs = _load(one / f"iter_{iters_of_one}.pth"), _load(two / f"iter_{STEPS}.pth")
    assert mine.keys() == theirs.keys() == initial.keys()
    largest = defaultdict(float)
    for key, value in mine.items():
        layer = key.rpartition(".")[0]
        largest[layer] = max(largest[layer], float(value.abs().max()))
    moves = []
    for key, value in mine.items():
        scale = largest[key.rpartition(".")[0]]
        assert (value - theirs[key]).abs().max() <= 1e-5 * scale, key
        if value.ndim > 1:
            moves.append(float((value - initial[key]).abs().max()) / scale)
    assert statistics.median(moves) > 500 * 1e-5


def _give_every_image_the_boxes_of_the_first(digits) -> str:
    """Write such an annotation file and return its name: RetinaNet divides the loss of a process
    by the number of anchors that match its boxes, here the same for every image.
    """
    annotations = json.loads((digits / "annotations" / "instances_train.json").read_text())
    images = annotations["images"]
    boxes = [box for box in annotations["annotations"] if box["image_id"] == images[0]["id"]]
    copies = [dict(box, image_id=image["id"]) for image in images for box in boxes]
    annotations["annotations"] = [dict(box, id=k) for k, box in enumerate(copies, start=1)]
    path = digits / "annotations" / "same_boxes.json"
    path.write_text(json.dumps(annotations))
    return f"annotations/{path.name}"


@pytest.mark.parametrize(
    "task, name",
    [
        pytest.param("classifier", CLASSIFIER, id="classifier"),
        pytest.param("detector", DETECTOR, marks=pytest.mark.slow, id="detector"),
        pytest.param("segmenter", SEGMENTER, marks=pytest.mark.slow, id="segmenter"),
    ],
)
def test_two_processes_take_the_steps_of_one_with_twice_the_batch(
    task, name, digits, weights, tmp_path
):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, batch_size in ((one, 4), (two, 2)):
        settings = _settings(task, digits, weights, folder, batch_size)
        if task == "detector":
            boxes = _give_every_image_the_boxes_of_the_first(digits)
            settings["train_dataloader"]["dataset"]["ann_file"] = boxes
        config = _write_config(folder / "config.py", name, **settings)
        arguments = ["train", config, "--seed", 0, "--work-dir", folder]
        if folder == one:
            assert _alone(*arguments) == 0
        else:
            done = _together(*arguments, "--launcher", "pytorch")
            assert done.returncode == 0, done.stdout[-3000:]
    _assert_same_training(one, two, _steps(one), _steps(two, ranks=2))
    _assert_the_first_alone_wrote(two, done.stdout)


def _assert_the_first_alone_wrote(work_dir, output):
    """Check that there is one file of each name, and that the run warned of nothing."""
    assert "warn" not in output.partition("Logs and checkpoints are in")[2].lower()
    written = [path for path in work_dir.rglob("*") if path.is_file()]
    kinds = Counter(path.name if path.suffix != ".log" else ".log" for path in written)
    assert kinds.pop(".log") == 1
    assert kinds.pop("config.py") == 2  # the work dir's, and the visualizer's
    assert set(kinds.values()) == {1}, kinds


@pytest.mark.slow
def test_processes_with_other_numbers_of_objects_weigh_the_same(digits, weights, tmp_path):
    """mmdet's RetinaNet divides by the matches of the process alone: two of them are one that
    accumulates their batches, in turn.
    """
    annotations = json.loads((digits / "annotations" / "instances_train.json").read_text())
    images = annotations["images"]
    for k in range(1, len(images), 4):  # rank 0 has images 0, 2 of each four, rank 1 the others
        images[k], images[k + 1] = images[k + 1], images[k]
    (digits / "annotations" / "by_rank.json").write_text(json.dumps(annotations))
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        settings = _settings("detector", digits, weights, folder, 2)
        settings["train_dataloader"]["sampler"] = dict(shuffle=False)
        if folder == one:
            settings["train_dataloader"]["dataset"]["ann_file"] = "annotations/by_rank.json"
            settings["train_cfg"]["max_iters"] = 2 * STEPS
            settings["optim_wrapper"]["accumulative_counts"] = 2
        config = _write_config(folder / "config.py", DETECTOR, **settings)
        if folder == one:
            assert _alone("train", config, "--seed", 0, "--work-dir", folder) == 0
        else:
            arguments = ["train", config, "--seed", 0, "--work-dir", folder]
            done = _together(*arguments, "--launcher", "pytorch")
            assert done.returncode == 0, done.stdout[-3000:]
    halves = _steps(one)
    steps = [
        {
            "images": sorted(first["images"] + second["images"]),
            "losses": {
                key: (value + second["losses"][key]) / 2 for key, value in first["losses"].items()
            },
        }
        for first, second in zip(halves[::2], halves[1::2], strict=True)
    ]
    _assert_same_training(one, two, steps, _steps(two, ranks=2), iters_of_one=2 * STEPS)


def _light(digits, folder, **changes):
    """The settings of a run of seconds: a small classifier, two images a process and step."""
    settings = _settings("classifier", digits, None, folder, 2)
    settings["model"] = dict(
        model_name="test_convnext", num_classes=10, drop_path_rate=0.0, model_kwargs=None
    )
    settings["train_dataloader"]["dataset"]["input_size"] = 32
    settings["test_dataloader"] = dict(
        batch_size=3,
        num_workers=0,
        persistent_workers=False,
        dataset=dict(root=str(digits / "classes"), input_size=32),
    )
    return {**settings, **changes}


def _root_cause(output) -> str:
    """What torchrun's summary says of the process that failed first."""
    return output.partition("Root Cause (first observed failure):")[2]


def _assert_gone(folder):
    """Check that no process of a run is left."""
    for path in Path(folder).glob("rank*.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_an_error_in_one_process_ends_all_and_is_said_once_with_its_rank(digits, tmp_path):
    settings = _light(digits, tmp_path)
    settings["custom_hooks"][0]["end"] = "raise"
    config = _write_config(tmp_path / "config.py", CLASSIFIER, **settings)
    done = _together("train", config, "--work-dir", tmp_path, "--launcher", "pytorch")
    assert done.returncode != 0
    assert done.stdout.count("rank 1: Traceback (most recent call last):\n") == 1
    assert "rank 0: Traceback" not in done.stdout
    assert "rank 1: densezoo train: ZeroDivisionError: a defect in" in _root_cause(done.stdout)
    _assert_gone(tmp_path)


@pytest.mark.slow
def test_a_killed_process_ends_all_and_is_named(digits, tmp_path):
    settings = _light(digits, tmp_path)
    settings["custom_hooks"][0]["end"] = "kill"
    config = _write_config(tmp_path / "config.py", CLASSIFIER, **settings)
    done = _together("train", config, "--work-dir", tmp_path, "--launcher", "pytorch")
    assert done.returncode != 0
    assert "rank 0: Traceback" not in done.stdout, "what the other one met is no news"
    cause = _root_cause(done.stdout)
    assert "rank      : 1 (local_rank: 1)" in cause and "SIGKILL" in cause
    _assert_gone(tmp_path)


def test_a_process_without_data_left_ends_all_within_the_timeout_of_the_config(digits, tmp_path):
    settings = _light(digits, tmp_path, env_cfg=dict(dist_cfg=dict(timeout=5)))
    settings["train_cfg"] = dict(max_epochs=2)
    settings["train_dataloader"].update(
        sampler=None,
        dataset=dict(
            _delete_=True,
            type="ShortStream",
            dataset=dict(
                type="TimmDataset",
                root=str(digits / "classes"),
                is_training=True,
                input_size=32,
                transform=dict(no_aug=True),
            ),
        ),
    )
    config = _write_config(tmp_path / "config.py", CLASSIFIER, **settings)
    done = _together("train", config, "--work-dir", tmp_path, "--launcher", "pytorch")
    assert done.returncode != 0
    assert "rank 0: densezoo train: RuntimeError: " in _root_cause(done.stdout)
    _assert_gone(tmp_path)


def test_data_of_another_length_in_one_process_is_named_before_the_run(digits, tmp_path):
    settings = _light(digits, tmp_path)
    config = _write_config(tmp_path / "config.py", CLASSIFIER, **settings)
    with config.open("a") as file:
        file.write("if __import__('os').environ['RANK'] == '1':\n")
        file.write("    train_dataloader['batch_size'] = 1\n")
    done = _together("train", config, "--work-dir", tmp_path, "--launcher", "pytorch")
    assert done.returncode != 0
    line = "the processes have different numbers of batches for IterBasedTrainLoop: rank 0 has "
    assert _own_errors(done.stdout)[0].count(line) == 1
    assert line in _root_cause(done.stdout)
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["data", "work_dir"])
def test_a_mistake_that_all_processes_meet_is_said_once(mistake, digits, tmp_path):
    settings = _light(digits, tmp_path)
    work_dir = tmp_path / "run"
    if mistake == "data":
        settings["train_dataloader"]["dataset"]["root"] = "nowhere"
        named = "data folder 'nowhere' does not exist"
    else:
        work_dir.write_text("a file in the place of the folder")
        named = f"work dir {str(work_dir)!r} can't be written"
    config = _write_config(tmp_path / "config.py", CLASSIFIER, **settings)
    done = _together("train", config, "--work-dir", work_dir, "--launcher", "pytorch")
    assert done.returncode != 0
    (line,) = _own_errors(done.stdout)
    assert named in line
    assert named in _root_cause(done.stdout)
    assert mistake == "work_dir" or not work_dir.exists()


def _own_errors(output) -> list[str]:
    """The lines with which processes end, without those of torchrun's summary."""
    return [line for line in output.splitlines() if line.startswith("rank ")]


def test_two_processes_test_as_one(digits, tmp_path):
    settings = _light(digits, tmp_path)
    config = _write_config(tmp_path / "config.py", CLASSIFIER, **settings)
    assert _alone("train", config, "--work-dir", tmp_path / "trained") == 0
    checkpoint = tmp_path / "trained" / f"iter_{STEPS}.pth"
    assert len(list((digits / "classes" / "val").rglob("*.*"))) % 2, "nothing to pad"
    figures = {}
    for count, run in (("one", _alone), ("two", _together)):
        out = tmp_path / f"{count}.json"
        arguments = ["test", config, checkpoint, "--out", out, "--work-dir", tmp_path / "test"]
        done = run(*arguments, *(["--launcher", "pytorch"] if count == "two" else []))
        assert (done if count == "one" else done.returncode) == 0
        figures[count] = json.loads(out.read_text())
    assert figures["one"] == figures["two"]


@pytest.mark.slow
def test_fully_sharded_training_takes_the_steps_of_one_process(digits, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, batch_size in ((one, 4), (two, 2)):
        settings = _light(digits, folder, work_dir=str(folder), randomness=dict(seed=0))
        settings["train_dataloader"]["batch_size"] = batch_size
        settings["optim_wrapper"]["optimizer"]["lr"] = 2e-3  # this model has small gradients
        config = _write_config(folder / "config.py", CLASSIFIER, **settings)
        if folder == one:
            assert _alone("train", config) == 0
        else:
            done = _together(config, script=[str(Path(__file__).with_name("sharded_run.py"))])
            assert done.returncode == 0, done.stdout[-3000:]
    assert _alone("test", config, two / f"iter_{STEPS}.pth") == 0
    _assert_same_training(one, two, _steps(one), _steps(two, ranks=2))


def test_this_runner_does_not_shard_parameters(digits, tmp_path, capsys):
    settings = _light(digits, tmp_path, model_wrapper_cfg=dict(type="MMFullyShardedDataParallel"))
    config = _write_config(tmp_path / "config.py", CLASSIFIER, **settings)
    assert _alone("train", config, "--work-dir", tmp_path) == 1
    assert "MMFullyShardedDataParallel is not supported" in capsys.readouterr().err


def test_runs_in_one_process_join_and_leave_a_group_each(digits, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for key, value in dict(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=0, LOCAL_RANK=0, WORLD_SIZE=1
    ).items():
        monkeypatch.setenv(key, str(value))
    for work_dir in ("first", "second"):
        settings = _light(digits, tmp_path)
        config = _write_config(tmp_path / "config.py", CLASSIFIER, **settings)
        assert _alone("train", config, "--work-dir", work_dir, "--launcher", "pytorch") == 0
        assert not torch.distributed.is_initialized()
        log = next(Path(work_dir).glob("*/*.log")).read_text()
        assert "Distributed launcher: pytorch" in log


@pytest.mark.parametrize(
    "launcher, variables, message",
    [
        ("none", dict(TORCHELASTIC_RUN_ID="a", RANK="0", WORLD_SIZE="2"), "add --launcher pytorch"),
        ("pytorch", {}, "no launcher started this process"),
        ("slurm", {}, "no launcher started this process"),
        ("slurm", dict(SLURM_PROCID="0", SLURM_NTASKS="2"), "--launcher slurm needs GPUs"),
    ],
)
def test_a_launcher_that_does_not_fit_is_named(
    launcher, variables, message, digits, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    config = _write_config(tmp_path / "config.py", CLASSIFIER, **_light(digits, tmp_path))
    assert _alone("train", config, "--work-dir", tmp_path, "--launcher", launcher) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", [DETECTOR, "mask_rcnn_cas_vit_xs_fpn_1x_coco"])
def test_images_without_objects_give_every_parameter_a_gradient(name):
    cfg = load_config(name)
    cfg.model.backbone.init_cfg = None
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).train()
    shapes = [[3, 64, 64]] * 2
    batch = demo_mm_inputs(2, image_shapes=shapes, num_items=[0, 0], with_mask=True)
    loss, _ = model.parse_losses(model(**model.data_preprocessor(batch, True), mode="loss"))
    loss.backward()
    assert not [key for key, value in model.named_parameters() if value.grad is None]


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_config_synchronises_the_norms_that_it_trains(name):
    cfg = load_config(name)
    assert cfg.sync_bn == "torch"
    norms = [part["norm_cfg"] for _, part in walk_dicts(cfg.model) if part.get("norm_cfg")]
    # A GroupNorm has no statistics of a batch.
    assert all(norm.type in ("SyncBN", "GN") for norm in norms)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_several_processes_without_a_gpu_have_norms_of_their_own(capsys):
    cfg = load_config(SEGMENTER)
    cfg.launcher = "pytorch"
    adapt_to_cpu(cfg)
    assert "SyncBatchNorm works on GPUs only" in capsys.readouterr().out
    assert cfg.sync_bn is None and cfg.model.decode_head.norm_cfg.type == "BN"
    assert cfg.model_wrapper_cfg.find_unused_parameters is False


class Unwrapped(torch.nn.Module):
    """A wrapper that needs no GPU for SyncBatchNorm, as that of PyTorch does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_synchronised_norms_keep_the_activations_of_timm():
    model = timm.create_model("test_efficientnet", num_classes=10).eval()
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = model(image)
    runner = DurableRunner.__new__(DurableRunner)  # one that thinks it is not alone
    runner.cfg, runner._distributed = Config(dict(sync_bn="torch")), True
    wrapped = runner.wrap_model(dict(type=Unwrapped), model).module.cpu().eval()
    kinds = {type(module).__name__ for module in wrapped.modules()}
    assert "SyncBatchNormAct" in kinds and not any(kind.startswith("BatchNorm") for kind in kinds)
    torch.testing.assert_close(wrapped(image), expected)
    assert runner.cfg.sync_bn == "torch", "the work dir's config says what was asked for"
