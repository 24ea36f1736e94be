"""What tests read a recipe with: its model, rates and weight decays, and the tables of its page."""

import math

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope
from timm.scheduler import CosineLRScheduler

from densezoo.tools.engine.config_files import CONFIG_ROOT


def build(cfg):
    """Build a config's model without memory for its weights."""
    init_default_scope(cfg.default_scope)
    with torch.device("meta"):
        return MODELS.build(cfg.model)


def rates(cfg, epoch_length, iterations):
    """Give the learning rate of each iteration, as mmengine's training loops step schedulers."""
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=cfg.optim_wrapper.optimizer.lr)
    by_iteration, by_epoch = [], []
    for options in cfg.param_scheduler:
        options = dict(options)
        kind = PARAM_SCHEDULERS.get(options.pop("type"))
        if options.pop("convert_to_iter_based", False):
            scheduler = kind.build_iter_from_epoch(
                optimizer=optimizer, epoch_length=epoch_length, **options
            )
        else:
            scheduler = kind(optimizer, **options)
        (by_epoch if scheduler.by_epoch else by_iteration).append(scheduler)
    seen = []
    for iteration in range(iterations):
        seen.append(optimizer.param_groups[0]["lr"])
        for scheduler in by_iteration:
            scheduler.step()
        if (iteration + 1) % epoch_length == 0:
            for scheduler in by_epoch:
                scheduler.step()
    return seen


def check_that_rates_follow_timm(ours, length, *, lr, epochs, warmup, lowest=5e-6):
    """Compare rates by iteration with timm's cosine to `lowest`, warm-up from 1e-6 inside.

    Args:
        ours: what `rates` gave; epochs after the last are not looked at.
        length: iterations of an epoch.
        lr: the highest rate, but for the cosine in the warm-up.
        epochs: length of the cosine.
        warmup: epochs of warm-up.
    """
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=lr)
    timm_scheduler = CosineLRScheduler(
        optimizer, t_initial=epochs * length, lr_min=lowest, t_in_epochs=False,
        warmup_t=warmup * length, warmup_lr_init=1e-6,
    )  # fmt: skip
    for iteration, rate in enumerate(ours[: epochs * length]):
        timm_scheduler.step_update(iteration)
        wanted = optimizer.param_groups[0]["lr"]
        if iteration < warmup * length:
            # Ours is a factor on the cosine, and complete an iteration before timm's.
            wanted *= (1 + math.cos(math.pi * iteration / (epochs * length))) / 2
            assert rate == pytest.approx(wanted, abs=1.2 * lr / (warmup * length)), iteration
        else:
            assert rate == pytest.approx(wanted, rel=5e-4), iteration


def decay_by_name(cfg, model):
    """{name of a parameter: weight decay} of a config's optimizer."""
    wrapper = dict(cfg.optim_wrapper, type="OptimWrapper")  # mixed precision needs a GPU
    wrapper.pop("loss_scale", None)
    groups = build_optim_wrapper(model, wrapper).optimizer.param_groups
    found = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters()}


def rows_of(task):
    """{config: cells} of the tables of a task's page."""
    text = (CONFIG_ROOT / task / "README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}
