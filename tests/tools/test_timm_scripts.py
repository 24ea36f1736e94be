"""Scripts that know timm alone run on the zoo's names through the README's line.

timm's benchmark.py and train.py are in no distribution, so a script made of what they are made of
stands for them: timm's factory, data loaders, optimizers, schedulers, averages and savers.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

README = Path(__file__).parents[2] / "README.md"

BENCHMARK = """
import argparse, json
import timm, torch
from timm.data import resolve_data_config
from timm.layers import set_fast_norm
from timm.models import is_model, list_models
from timm.utils import decay_batch_step, reparameterize_model

parser = argparse.ArgumentParser()
parser.add_argument("--model"), parser.add_argument("--batch-size", type=int, default=2)
parser.add_argument("--channels-last", action="store_true")
args = parser.parse_args()
assert is_model(args.model) and args.model in list_models(args.model)
set_fast_norm()
model = timm.create_model(args.model, num_classes=10, drop_rate=0.1, exportable=True).eval()
config = resolve_data_config(vars(args), model=model, use_test_size=True)
x = torch.randn(args.batch_size, *config["input_size"])
fused = reparameterize_model(model)
with torch.inference_mode():
    torch.testing.assert_close(fused(x), model(x), atol=1e-4, rtol=1e-4)
assert len(fused.state_dict()) < len(model.state_dict())
model = fused
if args.channels_last:
    model, x = (part.to(memory_format=torch.channels_last) for part in (model, x))
with torch.inference_mode():
    assert model(x).shape == (args.batch_size, 10)
print(json.dumps(dict(model=args.model, input_size=config["input_size"], mean=config["mean"])))
"""

TRAIN = """
import argparse
import timm, torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import load_checkpoint, model_parameters, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, dispatch_clip_grad

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data"), parser.add_argument("--model"), parser.add_argument("--output")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=3, in_chans=3, drop_path_rate=0.1)
    model.set_grad_checkpointing()
    config = resolve_data_config(dict(input_size=(3, 64, 64)), model=model)
    data = create_dataset("", root=args.data, split="train", is_training=True)
    loader = create_loader(
        data, config["input_size"], 6, is_training=True, device=torch.device("cpu"),
        use_prefetcher=False, num_workers=1, no_aug=True, mean=config["mean"], std=config["std"])
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, layer_decay=0.9, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=2, warmup_epochs=0)
    average = ModelEmaV3(model, decay=0.9)
    saver = CheckpointSaver(
        model, optimizer, args=args, model_ema=average, checkpoint_dir=args.output,
        recovery_dir=args.output, max_history=2)
    for epoch in range(2):
        for images, labels in loader:
            loss = torch.nn.functional.cross_entropy(model.train()(images), labels)
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(model_parameters(model, exclude_head=True), 1.0, mode="agc")
            optimizer.step()
            average.update(model, step=epoch)
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=float(loss))
    again = timm.create_model(args.model, num_classes=3)
    load_checkpoint(again, args.output + "/last.pth.tar", use_ema=True, weights_only=False)
    for one, two in zip(again.state_dict().values(), average.module.state_dict().values()):
        assert torch.equal(one, two)
    assert resume_checkpoint(model, args.output + "/last.pth.tar", optimizer) == 2
    print("trained")
"""


@pytest.fixture
def run_script(tmp_path):
    """Run a script by the README's line, with arguments for it, and return what it prints."""
    (line,) = re.findall(
        r'^ {4}(python -c "import densezoo.*) benchmark\.py ', README.read_text(), re.M
    )
    command = [sys.executable, *shlex.split(line)[1:]]

    def run(text, *arguments):
        (tmp_path / "script.py").write_text(text)
        command_ = [*command, "script.py", *map(str, arguments)]
        done = subprocess.run(command_, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_benchmark_knows_the_names_and_settings(run_script):
    """By an official name; the training script has ours."""
    printed = run_script(BENCHMARK, "--model", "rcvit_xs", "--channels-last")
    assert '"model": "rcvit_xs", "input_size": [3, 224, 224], "mean": [0.485' in printed


def test_a_training_script_trains_saves_and_resumes(run_script, colours, tmp_path):
    data = colours / "folder"
    assert "trained" in run_script(TRAIN, data, "--model", "cas_vit_xs", "--output", tmp_path)
    overlay = dict(file=str(tmp_path / "last.pth.tar"))
    model = timm.create_model(
        "cas_vit_xs", num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay
    )
    saved = torch.load(overlay["file"], weights_only=False)["state_dict_ema"]
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
