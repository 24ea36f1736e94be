"""A classifier learns from the average of its own weights, by the formula, from an epoch on."""

import copy

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from oracles import relative_error
from small_run import make_runner

from densezoo.tools.engine.self_distillation import SelfDistillationHook

EMA = dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.5, update_buffers=True)


def make_classifier_runner(work_dir, **options):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    torch.manual_seed(0)
    return Runner(
        MODELS.build(dict(type="ImageClassifier", model_name="test_resnet", num_classes=3)),
        str(work_dir),
        train_dataloader=dict(
            batch_size=2,
            sampler=dict(type="DefaultSampler", shuffle=False),
            collate_fn=dict(type="default_collate"),
            dataset=[dict(inputs=image, labels=i % 3) for i, image in enumerate(pixels)],
        ),
        train_cfg=dict(by_epoch=True, max_epochs=3),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        custom_hooks=[EMA, dict(type="SelfDistillationHook", **options)],
        default_scope="mmengine",
        log_level="ERROR",
        experiment_name=f"{work_dir.name}_distilled",
    )


def test_the_term_is_the_published_one_from_its_epoch_on(tmp_path):
    seen = []

    class Watcher(Hook):
        """Note what a step returned, and what its teacher was."""

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            (hook,) = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
            self.teacher = copy.deepcopy(hook.ema_model.module)
            self.student = copy.deepcopy(runner.model.backbone)

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            images = runner.model.data_preprocessor(data_batch)["inputs"]
            with torch.no_grad():
                teacher = (self.teacher.backbone.eval()(images) / 3).softmax(-1)
                student = (self.student.train()(images) / 3).softmax(-1)
            distance = (teacher * (teacher / student).log()).sum(-1).mean()
            seen.append((runner.epoch, outputs, distance))

    runner = make_classifier_runner(tmp_path, weight=0.5, begin_epoch=1)
    runner.register_hook(Watcher(), priority="VERY_LOW")
    runner.train()
    assert [epoch for epoch, _, _ in seen] == [0, 0, 1, 1, 2, 2]
    for epoch, outputs, distance in seen:
        if not epoch:
            assert outputs.keys() == {"loss"}
            continue
        assert outputs["loss_teacher"].item() == pytest.approx(25 * distance.item(), rel=1e-3)
        parts = outputs["loss_labels"] + outputs["loss_teacher"]
        assert outputs["loss"].item() == pytest.approx(parts.item(), rel=1e-6)
    assert seen[-1][1]["loss_teacher"] > 0
    assert runner.model.distillation is None


def test_the_student_alone_has_a_gradient(tmp_path):
    """That of the divergence by the student's logits: the difference of the two predictions."""
    runner = make_classifier_runner(tmp_path, weight=0.5, begin_epoch=0)
    runner.train()
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, SelfDistillationHook)]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    logits = torch.randn(2, 3, generator=generator).requires_grad_()
    hook.compute_loss(images, [logits]).backward()
    with torch.no_grad():
        teacher = (hook.teacher.backbone(images) / 3).softmax(-1)
        expected = 50 * 0.5 / 3 * ((logits / 3).softmax(-1) - teacher) / len(images)
    assert relative_error(logits.grad, expected) < 1e-5
    assert all(p.grad is None for p in hook.teacher.parameters())


def test_another_model_is_refused(tmp_path):
    hook = dict(type="SelfDistillationHook", weight=1.0, begin_epoch=0)
    with pytest.raises(ValueError, match="takes an ImageClassifier, and Line is none"):
        make_runner(tmp_path, hooks=[EMA, hook]).train()


def test_a_run_without_an_average_is_refused(tmp_path):
    runner = make_classifier_runner(tmp_path, weight=1.0, begin_epoch=0)
    runner._hooks = [hook for hook in runner.hooks if not isinstance(hook, EMAHook)]
    with pytest.raises(ValueError, match="custom_hooks has none: add one"):
        runner.train()


def test_a_run_that_counts_iterations_is_refused_where_the_term_would_never_come(tmp_path):
    runner = make_classifier_runner(tmp_path, weight=1.0, begin_epoch=1)
    runner._train_loop = dict(type="IterBasedTrainLoop", max_iters=3)
    with pytest.raises(ValueError, match="is 1, and the run counts iterations: set it to 0"):
        runner.train()


@pytest.mark.parametrize("name, value", [
    ("weight", -1), ("begin_epoch", 0.25), ("temperature", 0), ("temperature", "3"),
])  # fmt: skip
def test_a_wrong_argument_is_named(name, value):
    options = {**dict(weight=1.0, begin_epoch=0), name: value}
    with pytest.raises(ValueError, match=f"{name} of SelfDistillationHook is {value!r}"):
        HOOKS.build(dict(type="SelfDistillationHook", **options))
