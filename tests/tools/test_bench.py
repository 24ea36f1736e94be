"""The benchmark's rows and refusals; times themselves are never asserted."""

import csv
import dataclasses
import json
import platform
import shlex

import pytest
import timm
import torch

from densezoo.kernels.runtime import requested_backend
from densezoo.tools import bench_throughput
from densezoo.tools.bench_throughput import Subject, list_subjects
from densezoo.tools.cli import build_parser, main
from densezoo.tools.count_macs import count_macs


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Arguments and rows of one run of the command."""
    path = tmp_path_factory.mktemp("bench") / "rows.csv"
    argv = ["bench", "cas_vit_xs", "--fuse", "--size", "33", "65", "--threads", "1"]
    argv += ["--device", "cpu"]
    threads = torch.get_num_threads()
    assert main([*argv, "--out", str(path)]) == 0
    assert torch.get_num_threads() == threads
    return argv, read_rows(path)


def test_rows_are_the_model_its_fused_form_and_the_yardstick(result):
    rows = result[1]
    assert [(row["model"], row["fused"]) for row in rows] == [
        ("cas_vit_xs", "False"),
        ("cas_vit_xs", "True"),
        ("resnet50", "False"),
    ]
    assert {(row["height"], row["width"]) for row in rows} == {("33", "65")}


def test_rows_hold_counted_parameters_and_macs_and_their_multiples_of_resnet50(result):
    models = [timm.create_model("cas_vit_xs"), timm.create_model("cas_vit_xs").eval().fuse()]
    reports = [count_macs(model, (33, 65)) for model in [*models, timm.create_model("resnet50")]]
    for row, report in zip(result[1], reports, strict=True):
        assert (int(row["params"]), int(row["macs"])) == (report.params, report.macs)
        assert float(row["x_resnet50_macs"]) == round(report.macs / reports[-1].macs, 4)
    assert float(result[1][-1]["x_resnet50"]) == 1


def test_times_are_ordered_percentiles_of_twenty_alternations(result):
    for row in result[1]:
        assert row["rounds"] == "20"
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["images_per_s"]) == pytest.approx(1000 / float(row["median_ms"]), rel=1e-3)


@pytest.mark.skipif(platform.system() != "Linux", reason="resident memory is read from /proc")
def test_memory_of_a_fresh_process_grows_by_the_weights_at_least(result):
    rows = result[1]
    assert {row["memory_kind"] for row in rows} == {"growth of resident size"}
    yardstick = rows[-1]
    assert float(yardstick["memory_mib"]) > 4 * int(yardstick["params"]) / 2**20
    assert 0 < float(rows[0]["memory_mib"]) < float(yardstick["memory_mib"])


def test_rows_say_machine_versions_and_the_command_that_repeats_them(result):
    argv, rows = result
    for row in rows:
        assert row["device"] and row["date"] and row["densezoo"]
        assert (row["torch"], row["timm"]) == (torch.__version__, timm.__version__)
        assert (row["batch"], row["dtype"], row["layout"]) == ("1", "float32", "contiguous")
        assert (row["mode"], row["threads"], row["compiled"]) == ("inference", "1", "False")
        program, *words = shlex.split(row["command"])
        parse = build_parser("bench").parse_args
        assert program == "densezoo" and parse(words) == parse(argv)


def test_training_steps_of_stage_maps_in_bfloat16_are_timed(tmp_path, capfd):
    argv = "bench resnet50 --train --features-only --dtype bfloat16 --channels-last --batch 2"
    argv += f" --device cpu --size 33 33 --out {tmp_path / 'rows.csv'}"
    assert main(argv.split()) == 0
    (row,) = read_rows(tmp_path / "rows.csv")
    assert (row["mode"], row["features_only"], row["batch"]) == ("training", "True", "2")
    assert (row["dtype"], row["layout"]) == ("bfloat16", "channels_last")
    features = timm.create_model("resnet50", features_only=True)
    assert int(row["params"]) == sum(p.numel() for p in features.parameters())
    assert "x-resnet50" in capfd.readouterr().out


def test_a_transcription_is_timed_beside_its_model_with_what_attention_saves(
    tmp_path, capfd, monkeypatch
):
    # As on systems that do not tell: other tests measure it, in a process a model.
    monkeypatch.setattr(bench_throughput, "_measure_growth_in_child", lambda *args: None)
    argv = "bench biformer_tiny --train --vs transcription:biformer_tiny --device cpu --size 33 65"
    argv += " --model-kwargs num_regions=2 topk=1,2,4 depths=(1,1,1,1)"
    assert main([*argv.split(), "--out", str(tmp_path / "rows.csv")]) == 0
    ours, theirs, yardstick = read_rows(tmp_path / "rows.csv")
    assert [row["model"] for row in (ours, theirs, yardstick)] == [
        "biformer_tiny",
        "transcription:biformer_tiny",
        "resnet50",
    ]
    assert ours["params"] == theirs["params"]
    assert ours["model_kwargs"] == theirs["model_kwargs"] != yardstick["model_kwargs"] == ""
    assert [row["x_model"] == "" for row in (ours, theirs, yardstick)] == [True, False, True]
    assert 0 < float(ours["saved_mib"]) < float(theirs["saved_mib"])
    assert all(float(row["peak_mib"]) > float(row["saved_mib"]) for row in (ours, theirs))
    assert yardstick["saved_mib"] == yardstick["memory_mib"] == ""
    assert "transcription:biformer_tiny takes " in capfd.readouterr().out


@pytest.mark.parametrize("features_only", [False, True])
def test_a_transcription_with_other_outputs_than_its_model_is_refused(features_only, monkeypatch):
    setup = bench_throughput.Setup(features_only=features_only)
    arguments = (("depths", (1, 1, 1, 1)),)
    subject = Subject("biformer_tiny", arguments=arguments, is_transcription=True)
    bench_throughput.check_transcription(subject, (64, 96), setup)
    transcribe = bench_throughput.transcribe

    def transcribe_wrongly(*args):
        model = transcribe(*args)
        model.stages[3][0].attn.scale *= 1.01
        return model

    monkeypatch.setattr(bench_throughput, "transcribe", transcribe_wrongly)
    with pytest.raises(RuntimeError, match="differ by"):
        bench_throughput.check_transcription(subject, (64, 96), setup)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_on_a_gpu_is_the_peak_of_the_allocator_and_holds_the_weights(tmp_path):
    path = tmp_path / "rows.csv"
    argv = ["bench", "cas_vit_xs", "--device", "cuda", "--size", "64", "64", "--out", str(path)]
    assert main(argv) == 0
    for row in read_rows(path):
        assert row["memory_kind"] == "peak of the allocator"
        assert float(row["memory_mib"]) > 4 * int(row["params"]) / 2**20
        assert row["device"] == torch.cuda.get_device_name()


@pytest.mark.slow
def test_compiled_models_are_timed(tmp_path):
    path = tmp_path / "rows.csv"
    argv = ["bench", "cas_vit_xs", "--compile", "--device", "cpu", "--size", "64", "64"]
    assert main([*argv, "--out", str(path)]) == 0
    assert [row["compiled"] for row in read_rows(path)] == ["True", "True"]


@pytest.mark.parametrize("train", [False, True])
def test_a_training_step_leaves_no_gradients_and_inference_no_graph(train):
    model = timm.create_model("cas_vit_xs", depths=(1, 1, 1, 1))
    setup = bench_throughput.Setup(batch=2, train=train)
    outputs = []
    model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    statistics = model.norm.running_mean.clone()
    bench_throughput._make_step(model, Subject("cas_vit_xs"), (32, 32), setup)()
    assert outputs[0].requires_grad is train
    assert torch.equal(model.norm.running_mean, statistics) is not train
    assert all(p.grad is None for p in model.parameters())


def test_the_yardstick_is_timed_once_and_peers_follow_the_models():
    assert list_subjects(["resnet50", "cas_vit_s"], fuse=True, peers=["timm:resnet18"]) == [
        Subject("resnet50"),
        Subject("cas_vit_s"),
        Subject("cas_vit_s", fused=True),
        Subject("resnet18"),
    ]
    assert list_subjects(["resnet50", "nat_mini"], backends=["reference", "cpu"]) == [
        Subject("resnet50"),
        Subject("nat_mini"),
        Subject("nat_mini", backend="reference"),
        Subject("nat_mini", backend="cpu"),
    ]
    kwargs = dict(num_regions=16)
    arguments = (("num_regions", 16),)
    assert list_subjects(
        ["biformer_tiny", "resnet18"], peers=["transcription:biformer_small"], model_kwargs=kwargs
    ) == [
        Subject("biformer_tiny", arguments=arguments),
        Subject("resnet18"),
        Subject("biformer_small", arguments=arguments, is_transcription=True),
        Subject("resnet50"),
    ]


def test_a_subject_reaches_the_process_that_measures_its_memory_as_it_is():
    arguments = (("num_regions", 16), ("topk", (1, 4, 16)))
    for subject in (
        Subject("biformer_tiny", backend="cpu", arguments=arguments),
        Subject("biformer_tiny", arguments=arguments, is_transcription=True),
    ):
        fields = json.loads(json.dumps(dataclasses.asdict(subject)))
        assert bench_throughput._read_subject(fields) == subject


def test_a_model_is_run_on_the_backend_of_its_subject():
    model = torch.nn.Conv2d(3, 4, 1)
    asked = []
    model.register_forward_hook(lambda *args: asked.append(requested_backend()[0]))
    for subject in (Subject("nat_mini"), Subject("nat_mini", backend="reference")):
        bench_throughput._make_step(model, subject, (8, 8), bench_throughput.Setup())()
    assert asked == [None, "reference"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("cas_vit_sx", "did you mean"),
        ("cas_vit_xs --vs timm:resnet5", "did you mean"),
        ("cas_vit_xs --vs resnet18", "--vs takes timm:NAME"),
        ("resnet18 --fuse", "--fuse takes models of densezoo"),
        ("resnet18 --backends cpu", "--backends takes models of densezoo"),
        ("cas_vit_xs --backends fast", "--backends is 'fast': one of triton, cpu, reference"),
        ("cas_vit_xs --fuse --train", "--fuse is for inference"),
        ("cas_vit_xs --vs transcription:cas_vit_xs", "transcription:NAME for biformer_tiny, "),
        ("resnet18 --model-kwargs depths=1", "--model-kwargs takes models of densezoo"),
        ("biformer_tiny --model-kwargs num_regions", "--model-kwargs takes KEY=VALUE"),
        ("cas_vit_xs --size 0 32", "the size is 0 32"),
        ("cas_vit_xs --batch 0", "batch is 0"),
        ("cas_vit_xs --threads 0", "threads is 0"),
        ("cas_vit_xs --repeats 19", "at least 20 alternations"),
        ("cas_vit_xs --dtype int8", "float32, bfloat16, float16"),
        ("cas_vit_xs --device meta", "device 'meta' cannot be used"),
        ("cas_vit_xs --device nonsense", "device 'nonsense' cannot be used"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured_or_written(
    arguments, message, tmp_path, capfd
):
    path = tmp_path / "rows.csv"
    assert main(["bench", *arguments.split(), "--out", str(path)]) == 1
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err
    assert not path.exists()


def test_a_model_that_cannot_run_so_is_named_and_leaves_no_file(tmp_path, capfd):
    path = tmp_path / "rows.csv"
    argv = "bench cas_vit_xs --device cpu --train --size 32 32 --out".split()
    assert main([*argv, str(path)]) == 1
    assert "cas_vit_xs does not run at batch 1, 32x32 pixels" in capfd.readouterr().err
    assert not path.exists()


def test_arguments_that_a_model_has_not_are_named_and_leave_no_file(tmp_path, capfd):
    path = tmp_path / "rows.csv"
    argv = ["bench", "cas_vit_xs", "--model-kwargs", "num_regions=16", "--out", str(path)]
    assert main(argv) == 1
    assert "cas_vit_xs cannot be built with num_regions=16" in capfd.readouterr().err
    assert not path.exists()


def test_a_file_that_is_there_is_left_as_it_was(tmp_path, capfd):
    path = tmp_path / "rows.csv"
    path.write_text("kept")
    assert main(["bench", "cas_vit_xs", "--out", str(path)]) == 1
    assert "is there already" in capfd.readouterr().err
    assert path.read_text() == "kept"


def test_an_unwritable_file_is_found_before_the_measuring(tmp_path, capfd):
    assert main(["bench", "cas_vit_xs", "--out", str(tmp_path / "none" / "rows.csv")]) == 1
    err = capfd.readouterr().err
    assert "cannot be written" in err and len(err.splitlines()) == 1
