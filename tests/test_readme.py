"""The README's code does what it says."""

import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_timm_lines_run(capsys):
    (block,) = [b for b in BLOCKS if "cas_vit_xs" in b and "features_only" in b]
    exec(block, {})
    assert capsys.readouterr().out.splitlines()[0] == "torch.Size([1, 48, 120, 160])"


def test_the_lines_on_windows_run():
    (block,) = [b for b in BLOCKS if "set_window_size" in b]
    variables = {}
    exec(block, variables)
    assert variables["model"].window_size == (10, 14)
    maps = variables["gc_vit"](torch.zeros(1, 3, 65, 97))
    assert [tuple(m.shape[2:]) for m in maps] == [(17, 25), (9, 13), (5, 7), (3, 4)]


def test_the_lines_on_neighborhood_attention_run(capsys):
    (block,) = [b for b in BLOCKS if "neighborhood_attention" in b]
    variables = {}
    exec(block, variables)
    assert "backend='cpu'" in capsys.readouterr().out
    assert variables["out"].shape == (1, 56, 56, 2, 32) and variables["lse"].shape == (1, 56, 56, 2)


def test_the_lines_on_routing_attention_run(capsys):
    (block,) = [b for b in BLOCKS if "routing_attention" in b]
    variables = {}
    exec(block, variables)
    assert "backend='cpu'" in capsys.readouterr().out
    assert variables["routes"].shape == (1, 256, 16)
    assert variables["out"].shape == (1, 50, 76, 8, 32)


def test_the_lines_on_polyline_attention_run():
    (block,) = [b for b in BLOCKS if "polyline_attention" in b]
    variables = {}
    exec(block, variables)
    assert variables["out"].shape == (1, 32, 42, 8, 32)


@pytest.mark.parametrize("scope, base", [("mmdet", "mask_rcnn"), ("mmseg", "sem_fpn")])
def test_the_config_lines_build_a_model_that_runs(scope, base, tmp_path):
    (block,) = [b for b in BLOCKS if f"../{base}/" in b]
    shipped = Path(import_module(scope).__file__).parent / ".mim" / "configs"
    shutil.copytree(shipped, tmp_path / "configs")
    path = tmp_path / "configs" / "mine" / "config.py"
    path.parent.mkdir()
    path.write_text(block)
    cfg = Config.fromfile(path)
    assert cfg.model.backbone.init_cfg.checkpoint == "cas_vit_xs.pth"
    cfg.model.backbone.init_cfg = None
    register = import_module(f"{scope}.utils").register_all_modules
    register(init_default_scope=False)
    with DefaultScope.overwrite_default_scope(scope):
        model = import_module(f"{scope}.registry").MODELS.build(cfg.model).eval()
    with torch.no_grad():
        assert len(model.backbone(torch.zeros(1, 3, 64, 96))) == 4
        assert model.neck(model.backbone(torch.zeros(1, 3, 64, 96)))[0].shape == (1, 256, 16, 24)
