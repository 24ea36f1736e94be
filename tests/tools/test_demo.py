"""The demo: its commands, its record, its report; the whole of it in a slow test."""

import base64
import io
import json
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from densezoo.tools import demo, demo_report
from densezoo.tools.cli import build_parser, main
from densezoo.tools.demo_data import CLASSES, SEGMENTATION_CLASSES, make_dataset
from densezoo.tools.engine.checks import check_data
from densezoo.tools.engine.config_files import load_config

TINY = demo.Schedule(
    images=16, size=64, class_size=32, class_epochs=2, detection_epochs=2, segmentation_iterations=4
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return an empty folder that the demo would write, named relative to the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "demo"


@pytest.fixture
def steps(folder):
    """Return all commands of a tiny demo whose data is there."""
    make_dataset(folder / "data", images=TINY.images, size=TINY.size)
    out_dir = folder.relative_to(folder.parent)
    steps = [demo.make_data_step(out_dir, 0, TINY)]
    for task in demo.make_tasks(out_dir, TINY):
        steps += demo.make_task_steps(task, out_dir, 0)
    return steps


def test_steps_come_in_the_order_in_which_they_need_each_other(steps):
    assert [step.name for step in steps] == [
        "data",
        *(
            f"{task} {part}"
            for task in ("classification", "detection", "segmentation")
            for part in ("untrained test", "training", "trained test", "pictures")
        ),
    ]
    trained = set()
    for step in steps:
        if step.words[0] == "train":
            work_dir = step.words[step.words.index("--work-dir") + 1]
            starts = re.findall(r"init_cfg\.checkpoint=(\S+)/", " ".join(step.words))
            assert trained.issuperset(starts) and len(starts) == (1 if trained else 0)
            trained.add(work_dir)
        elif step.words[0] in ("test", "predict") and "untrained" not in step.name:
            assert step.words[2].rpartition("/")[0] in trained


def test_commands_are_ones_that_densezoo_takes(steps):
    for step in steps:
        words = shlex.split(step.command)
        assert words[0] == "densezoo"
        args = build_parser(words[1]).parse_args(words[1:])
        assert args.command == step.words[0]


def test_options_fit_the_configs_to_the_data(steps):
    # Each option replaces something: none adds a key that the config does not know.
    for step in steps:
        if step.words[0] != "train":
            continue
        options = step.words[step.words.index("--cfg-options") + 1 :]
        cfg = load_config(step.words[1], options)
        check_data(cfg, "train")
        check_data(cfg, "test")
        assert cfg.train_dataloader.num_workers == 0
        assert "coco" not in cfg.train_dataloader.dataset.get("data_root", "")
        if "detection" in step.name:
            assert tuple(cfg.train_dataloader.dataset.metainfo.classes) == CLASSES
            assert cfg.train_cfg.max_epochs == TINY.detection_epochs
            assert cfg.test_dataloader.dataset.pipeline[1]["scale"] == (64, 64)
        elif "segmentation" in step.name:
            assert tuple(cfg.test_dataloader.dataset.metainfo.classes) == SEGMENTATION_CLASSES
            assert cfg.param_scheduler[0].end == cfg.train_cfg.max_iters == 4
        else:
            assert cfg.train_dataloader.dataset.transform.hflip == 0
            assert cfg.param_scheduler[1].T_max == TINY.class_epochs - 1


def test_examples_show_each_class_and_the_first_scenes(steps, folder):
    crops = demo.list_examples(folder / "data", "classification")
    assert [path.parent.name for path in crops] == list(CLASSES)
    scenes = demo.list_examples(folder / "data", "detection")
    assert [path.name for path in scenes] == [f"{n:06d}.jpg" for n in range(1, 5)]


@pytest.mark.parametrize(
    ("line", "epochs", "share"),
    [
        ("INFO - Epoch(train) [2][25/100]  lr: 1e-4  eta: 0:01:00", 4, 0.3125),
        ("INFO - Epoch(train)   [1][ 50/100]  lr: 1e-4", 1, 0.5),
        ("INFO - Iter(train) [ 30/120]  lr: 1e-4", 1, 0.25),
        ("INFO - Epoch(test) [20/25]    eta: 0:00:01", 1, 0.8),
        ("INFO - Epoch(val) [1][20/25]    eta: 0:00:01", 4, 0.0),
        ("Loads checkpoint by local backend", 1, 0.0),
    ],
)
def test_progress_is_read_from_the_log(line, epochs, share):
    step = demo.Step("step", (), 1, epochs)
    assert demo._read_share(line, step) == pytest.approx(share)


class Progress:
    """What the demo uses of tqdm."""

    n, initial = 0, 0

    def update(self, count):
        self.n += count

    def write(self, text):
        pass

    set_description_str = write


def run_steps(folder, record, *steps):
    folder.mkdir(exist_ok=True)
    demo._run_steps(steps, folder, record, Progress())


def test_a_finished_step_is_noted_and_not_run_again(folder):
    words = ("data", "make", str(folder / "data"), "--images", "16", "--size", "32")
    record = {"seconds": {}}
    run_steps(folder, record, demo.Step("data", words, 1))
    assert json.loads((folder / demo.MARKER).read_text()) == record
    assert record["seconds"]["data"] > 0
    (folder / "data" / "densezoo-data.json").unlink()  # a second run would refuse the folder
    run_steps(folder, record, demo.Step("data", words, 1))


def test_a_failing_step_says_why_and_where_its_log_is(folder):
    step = demo.Step("data", ("data", "make", str(folder / "data"), "--images", "1"), 1)
    record = {"seconds": {}}
    with pytest.raises(ChildProcessError, match="images is 1; .*the whole log is .*data.log"):
        run_steps(folder, record, step)
    assert record == {"seconds": {}}
    assert "images is 1" in (folder / "logs" / "data.log").read_text()


def test_a_demo_continues_only_with_its_own_settings(folder):
    folder.mkdir()
    demo._write_record(folder, {"settings": {"seed": 1}, "seconds": {"data": 2.0}})
    assert demo._read_record(folder, {"seed": 1})["seconds"] == {"data": 2.0}
    with pytest.raises(FileExistsError, match="'seed': 1.*not.*'seed': 2"):
        demo._read_record(folder, {"seed": 2})


def test_a_folder_that_it_did_not_write_is_refused(folder, capsys):
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    assert main(["demo", "--out", str(folder)]) == 1
    assert "not written by 'densezoo demo'" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    (folder / demo.MARKER).write_text("{")
    assert main(["demo", "--out", str(folder)]) == 1
    assert "damaged" in capsys.readouterr().err
    assert main(["demo", "--out", str(folder / "thesis.txt")]) == 1
    assert "is a file" in capsys.readouterr().err


def test_bad_arguments_are_refused_before_anything_is_written(folder, capsys):
    assert main(["demo", "--out", str(folder), "--seed", "-1"]) == 1
    assert "seed is -1" in capsys.readouterr().err
    assert main(["demo", "--out", "my demo, 2"]) == 1
    assert "--cfg-options can't carry" in capsys.readouterr().err
    assert not list(folder.parent.iterdir())


def test_curves_are_read_from_the_logs_of_all_runs(tmp_path):
    runs = {
        "20260101_000000": [
            {"loss": 2.0, "epoch": 1, "step": 10},
            {"coco/bbox_mAP_50": 0.25, "step": 1},
            {"loss": 1.5, "epoch": 2, "step": 20},  # interrupted here, and done again
        ],
        "20260101_000001": [
            {"loss": 1.0, "epoch": 2, "step": 20},
            {"coco/bbox_mAP_50": 0.5, "step": 2},
        ],
    }
    for name, entries in runs.items():
        path = tmp_path / name / "vis_data" / "scalars.json"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(json.dumps(entry) for entry in entries))
    loss, held_out = demo_report.read_curves(tmp_path, "coco/bbox_mAP_50", "box AP50", 100)
    assert (loss.x, loss.y, loss.unit) == ([10, 20], [2.0, 1.0], "iteration")
    assert (held_out.x, held_out.y, held_out.unit) == ([1, 2], [25.0, 50.0], "epoch")
    assert held_out.name == "held-out box AP50, %"


def test_the_truth_is_drawn_where_it_is_annotated(tmp_path):
    data = make_dataset(tmp_path / "data", images=16, size=64)
    scene = data / "images" / "val" / "000001.jpg"
    zoom = 6
    boxes = np.asarray(demo_report.draw_truth("detection", data, scene))
    content = json.loads((data / "annotations" / "instances_val.json").read_text())
    palette = demo_report.make_palette(len(CLASSES))
    for annotation in content["annotations"]:
        if annotation["image_id"] == 1:
            left, top, width, height = (zoom * value for value in annotation["bbox"])
            row = min(top + height // 2, boxes.shape[0] - 1)
            colour = palette[annotation["category_id"] - 1]
            assert (boxes[row, min(left, boxes.shape[1] - 1)] == colour).all()

    labels = np.asarray(Image.open(data / "masks" / "val" / "000001.png"))
    plain = np.asarray(Image.open(scene).resize((64 * zoom,) * 2, Image.Resampling.BICUBIC))
    drawn = np.asarray(demo_report.draw_truth("segmentation", data, scene))[: 64 * zoom]
    is_changed = (drawn != plain).any(axis=2)[zoom // 2 :: zoom, zoom // 2 :: zoom]
    np.testing.assert_array_equal(is_changed, (labels > 0) & (labels < 255))


@pytest.fixture
def section():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    return demo_report.Section(
        name="detection",
        model="RetinaNet",
        figures=[
            demo_report.Figure("box AP50", 0.0, 39.96, aim=40),
            demo_report.Figure("box AP", 0.0, 20.0),
        ],
        curves=[
            demo_report.Curve("training loss", "iteration", [10, 20], [2.0, 1.0]),
            demo_report.Curve("held-out box AP50, %", "epoch", [], []),
        ],
        pictures=[("truth", picture), ("prediction", picture)],
        commands=[("densezoo train retinanet --cfg-options 'a=<b>'", 61.0)],
    )


def test_the_report_is_one_page_that_needs_no_other_file(section, tmp_path):
    page = tmp_path / "report.html"
    demo_report.write_report(page, [section], ("densezoo data make d", 4.0), seed=7)
    text = page.read_text()
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 3 and "http" not in re.sub(r"base64,[^\"]*", "", text)
    for source in sources:
        head, _, content = source.partition(",")
        assert head == "data:image/png;base64"
        assert min(Image.open(io.BytesIO(base64.b64decode(content))).size) > 100
    assert "a=&lt;b&gt;" in text and "densezoo data make d" in text
    assert "1:05 min" in text  # both commands together
    assert re.search(r"missed[^>]*>40\.0<", text) and "20.0" in text


def test_the_terminal_shows_the_figures_as_a_table(section):
    assert demo_report.format_figures([section]).splitlines() == [
        "           held-out figure  untrained  trained  aim",
        "RetinaNet  box AP50               0.0     40.0   40",
        "RetinaNet  box AP                 0.0     20.0",
    ]


@pytest.mark.slow
def test_the_demo_trains_three_tasks_and_continues_where_it_stopped(folder, capsys):
    report = demo.run_demo(folder, schedule=TINY)
    text = report.read_text()
    # Curves of three tasks, ten digits, four held-out scenes and their truth for two tasks.
    assert text.count("data:image/png;base64") == 3 + 10 + 2 * 2 * 4
    assert "Semantic FPN" in capsys.readouterr().out
    record = json.loads((folder / demo.MARKER).read_text())
    assert len(record["seconds"]) == 13

    # As if interrupted at the end of the detector's training, before that was noted.
    for name in list(record["seconds"])[list(record["seconds"]).index("detection training") :]:
        del record["seconds"][name]
    demo._write_record(folder, record)
    report.unlink()
    assert demo.run_demo(folder, schedule=TINY) == report
    assert report.exists()
    log = (folder / "logs" / "detection-training.log").read_text()
    assert "resumed epoch: 2, iter: 4" in log
