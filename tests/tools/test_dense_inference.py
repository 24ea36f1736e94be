"""Segmenters on whole images and on windows, and test-time augmentation of both dense tasks."""

import copy
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, init_default_scope
from oracles import PeakMemory
from PIL import Image

from densezoo.tools.cli import main
from densezoo.tools.demo_data import CLASSES, make_dataset
from densezoo.tools.engine.config_files import load_config
from densezoo.tools.engine.segmentor import check_test_cfg, slide_over, window_starts
from densezoo.tools.evaluate import augment

CLASSIFIER = "cas_vit_xs_8xb128_300e_in1k"
SEGMENTER = "fpn_cas_vit_xs_40k_ade20k"
DETECTOR = "retinanet_cas_vit_xs_fpn_1x_coco"
MASK_DETECTOR = "mask_rcnn_cas_vit_xs_fpn_1x_coco"
WHOLE = dict(mode="whole")
_run_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Keep what a run writes beside itself out of the checkout."""
    monkeypatch.chdir(tmp_path)


def make_images(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def spread(model):
    """Make the scores of random weights differ between places and classes, as trained ones do."""
    model.eval()
    outputs = []
    for name, layer in model.named_modules():
        if name.endswith(("conv_seg", "retina_cls")):
            handle = layer.register_forward_hook(lambda *call: outputs.append(call[-1]))
            model(make_images(2, 3, 64, 96), mode="tensor")
            handle.remove()
            # Logits of mean 0 and standard deviation 1 for each class.
            std, mean = torch.std_mean(outputs[0], dim=(0, 2, 3))
            layer.weight /= std[:, None, None, None]
            layer.bias.copy_((layer.bias - mean) / std)
    return model


def build_segmentor(kind="DenseSegmentor", num_classes=5, test_cfg=WHOLE):
    """Build a narrow Semantic FPN on the smallest backbone, with the same weights every time."""
    cfg = load_config(SEGMENTER).model
    cfg.type, cfg.test_cfg = kind, ConfigDict(test_cfg)
    cfg.neck.out_channels = 16
    cfg.decode_head.update(in_channels=[16] * 4, channels=16, num_classes=num_classes)
    cfg.decode_head.norm_cfg.type = "BN"
    init_default_scope("mmseg")
    torch.manual_seed(0)
    return spread(MODELS.build(cfg))


@pytest.fixture(scope="module")
def segmentor():
    return build_segmentor()


@torch.no_grad()
def predict(model, images, test_cfg, **meta):
    """Return the samples that `model` predicts for images (B, 3, H, W)."""
    from mmseg.structures import SegDataSample

    model.test_cfg = ConfigDict(test_cfg)
    size = tuple(images.shape[2:])
    meta = {"ori_shape": size, "img_shape": size, "pad_shape": size, **meta}
    return model.predict(images, [SegDataSample(metainfo=meta) for _ in images])


def slide(crop_size, stride, **options):
    return dict(mode="slide", crop_size=crop_size, stride=stride, **options)


def assert_near(actual, expected, relative=1e-5):
    """Compare logits relative to the largest."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=relative, atol=relative * scale)


@pytest.mark.parametrize("size", [(64, 96), (97, 131), (33, 40)], ids=str)
@pytest.mark.parametrize("crop_size", [None, (160, 192)], ids=["image", "larger"])
def test_one_window_over_the_image_equals_the_whole_image(segmentor, size, crop_size):
    images = make_images(2, 3, *size)
    crop_size = crop_size or size
    whole = predict(segmentor, images, WHOLE)
    windows = predict(segmentor, images, slide(crop_size, crop_size))
    for one, two in zip(windows, whole, strict=True):
        assert one.seg_logits.data.std() > 0.1
        assert_near(one.seg_logits.data, two.seg_logits.data)
        assert torch.equal(one.pred_sem_seg.data, two.pred_sem_seg.data)


@pytest.mark.parametrize(
    "size, crop_size, stride",
    [
        ((96, 160), (64, 64), (42, 42)),
        ((97, 131), (64, 64), (64, 64)),
        ((97, 131), (64, 48), (33, 21)),
        ((40, 150), (64, 64), (42, 42)),
        ((64, 64), (64, 64), (10, 10)),
    ],
    ids=str,
)
@pytest.mark.parametrize("window_batch_size", [1, 4])
def test_windows_give_the_logits_of_mmsegs_own(
    segmentor, size, crop_size, stride, window_batch_size
):
    from mmseg.models import EncoderDecoder

    images = make_images(2, 3, *size)
    options = slide(crop_size, stride, window_batch_size=window_batch_size)
    segmentor.test_cfg = check_test_cfg(options)
    metas = [dict(ori_shape=size, img_shape=size, pad_shape=size) for _ in images]
    with torch.no_grad():
        # Its own changes the metas that it is given.
        expected = EncoderDecoder.slide_inference(segmentor, images, copy.deepcopy(metas))
        actual = segmentor.slide_inference(images, metas)
    assert metas[0]["img_shape"] == size
    assert_near(actual, expected)


def test_windows_are_full_end_with_the_image_and_cover_it():
    generator = np.random.default_rng(0)
    for _ in range(500):
        size, window = (int(number) for number in generator.integers(1, 200, 2))
        stride = int(generator.integers(1, window + 1))
        starts = window_starts(size, window, stride)
        case = f"{size=} {window=} {stride=} {starts=}"
        assert starts[0] == 0 and starts == sorted(set(starts)), case
        assert max(size - window, 0) == starts[-1], case
        assert all(two - one <= stride for one, two in itertools.pairwise(starts)), case


def test_the_average_of_windows_weighs_each_of_them_alike():
    # Each window predicts its own number, so that a slow loop over pixels can say what is right.
    numbers = itertools.count(1)
    images = make_images(1, 3, 11, 14)
    actual = slide_over(
        images,
        lambda window: torch.full((1, 2, *window.shape[2:]), float(next(numbers))),
        2,
        crop_size=(5, 6),
        stride=(3, 4),
    )
    expected = np.zeros((11, 14))
    for row, column in itertools.product(range(11), range(14)):
        corners = itertools.product((0, 3, 6), (0, 4, 8))
        over = [
            number
            for number, (top, left) in enumerate(corners, start=1)
            if top <= row < top + 5 and left <= column < left + 6
        ]
        expected[row, column] = np.mean(over)
    np.testing.assert_allclose(actual[0, 0], expected, rtol=1e-6)
    assert torch.equal(actual[0, 0], actual[0, 1])


def test_logits_of_low_precision_are_summed_in_float32():
    third = torch.tensor(1 / 3, dtype=torch.bfloat16)
    images = make_images(1, 3, 40, 40).bfloat16()
    logits = slide_over(
        images,
        lambda windows: third.expand(len(windows), 1, *windows.shape[2:]),
        1,
        crop_size=(16, 16),
        stride=(1, 1),
    )
    assert logits.dtype == torch.float32
    # 256 windows: bfloat16 would stop growing after 2 ** 8 steps of the last digit.
    torch.testing.assert_close(logits, torch.full_like(logits, float(third)))


def test_float64_stays_float64():
    images = make_images(1, 3, 9, 9).double()
    logits = slide_over(images, lambda x: x, 3, crop_size=(4, 4), stride=(2, 3))
    torch.testing.assert_close(logits, images, rtol=1e-15, atol=1e-15)


def test_logits_are_summed_on_the_device_that_is_asked_for(segmentor):
    images = make_images(1, 3, 64, 64)
    (sample,) = predict(segmentor, images, slide(64, 64, accumulation_device="cpu"))
    assert sample.seg_logits.data.device.type == "cpu"
    # On any machine "meta" is another device than the one that predicts.
    logits = slide_over(
        images, lambda x: x, 3, crop_size=(32, 32), stride=(32, 32), device=torch.device("meta")
    )
    assert logits.device.type == "meta" and logits.shape == images.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_keeps_no_logits_that_are_summed_on_the_cpu():
    model = build_segmentor(num_classes=64).cuda()
    images = make_images(1, 3, 1024, 1024).cuda()
    size = 64 * 4 * 1024**2
    peaks, labels = {}, {}
    for device in ("cuda", "cpu"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (sample,) = predict(model, images, slide(256, 256, accumulation_device=device))
        assert sample.seg_logits.data.device.type == device
        peaks[device] = torch.cuda.max_memory_allocated() - before
        labels[device] = sample.pred_sem_seg.data.cpu()
        del sample
    assert peaks["cpu"] < peaks["cuda"] - size / 2
    assert torch.equal(labels["cpu"], labels["cuda"])


@pytest.mark.parametrize(
    "test_cfg, message",
    [
        (dict(mode="sliding"), r"test_cfg.mode='sliding' must be one of whole, slide"),
        (slide((64, 64), (65, 64)), r"test_cfg.stride=\(65, 64\) is larger than test_cfg.crop_s"),
        (slide((0, 64), (1, 1)), r"test_cfg.crop_size=\(0, 64\) must be \(height, width\)"),
        (slide((64, 64, 64), 1), r"test_cfg.crop_size=\(64, 64, 64\) must be"),
        (slide(64, -1), r"test_cfg.stride=-1 must be"),
        (slide(64, 42.7), r"test_cfg.stride=42.7 must be"),
        (slide("64", 42), r"test_cfg.crop_size='64' must be"),
        (dict(mode="slide", crop_size=64), r"test_cfg.stride=None must be"),
        (slide(64, 42, window_batch_size=0), r"test_cfg.window_batch_size=0 must be"),
        (slide(64, 42, accumulation_device="gpu"), r"test_cfg.accumulation_device='gpu' must be"),
        (slide(64, 42, accumulation_device="meta"), r"test_cfg.accumulation_device='meta' must"),
        (slide(64, 42, accumulation_device=1.5), r"test_cfg.accumulation_device=1.5 must be"),
        (slide(64, 42, accumulation_device="cuda:99"), r"is not a GPU of this machine"),
        (slide(64, 42, acumulation_device="cpu"), r"did you mean accumulation_device\?"),
        (dict(keep_logits="no"), r"test_cfg.keep_logits='no' must be True or False"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:28],
)
def test_settings_that_make_no_sense_are_refused_at_construction(test_cfg, message):
    with pytest.raises(ValueError, match=message):
        build_segmentor(test_cfg=test_cfg)


def test_settings_changed_later_are_checked_too_and_those_of_heads_are_left(segmentor):
    assert check_test_cfg(dict(scale_factor=2)).scale_factor == 2
    assert check_test_cfg(None).mode == "whole"
    with pytest.raises(ValueError, match="larger than"):
        predict(segmentor, make_images(1, 3, 32, 32), slide(16, 17))


def test_a_missing_mmseg_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmseg.models", None)
    monkeypatch.delitem(sys.modules, "densezoo.tools.engine.dense_segmentor", raising=False)
    with pytest.raises(ImportError, match=r"DenseSegmentor needs mmseg.*densezoo\[openmmlab\]"):
        MODELS.build(dict(type="DenseSegmentor"))


def test_it_is_one_of_mmsegs_segmentors_and_can_be_copied(segmentor):
    import mmseg.registry
    from mmseg.models import BaseSegmentor, EncoderDecoder

    assert isinstance(segmentor, EncoderDecoder) and isinstance(segmentor, BaseSegmentor)
    assert mmseg.registry.MODELS.get("DenseSegmentor") is MODELS.get("DenseSegmentor")
    assert mmseg.registry.MODELS.get("EncoderDecoder") is EncoderDecoder
    images = make_images(1, 3, 48, 64)
    (expected,) = predict(segmentor, images, WHOLE)
    for copied in (copy.deepcopy(segmentor), pickle.loads(pickle.dumps(segmentor))):
        assert type(copied) is type(segmentor)
        (actual,) = predict(copied, images, WHOLE)
        assert torch.equal(actual.seg_logits.data, expected.seg_logits.data)


@pytest.mark.parametrize("num_classes", [5, 1])
def test_weights_and_results_are_those_of_mmsegs_encoder_decoder(num_classes):
    model = build_segmentor(num_classes=num_classes)
    other = build_segmentor("EncoderDecoder", num_classes=num_classes)
    assert type(other).__module__.startswith("mmseg.")
    other.load_state_dict(model.state_dict())
    images = make_images(2, 3, 64, 96)
    if num_classes == 1:  # a threshold with pixels on both sides of it
        (sample, _) = predict(other, images, WHOLE)
        middle = sample.seg_logits.data.mean().item()
        model.decode_head.threshold = other.decode_head.threshold = middle
    cases = [
        dict(),
        dict(ori_shape=(150, 201)),
        dict(ori_shape=(31, 45), flip=True, flip_direction="horizontal"),
        dict(flip=True, flip_direction="vertical"),
        dict(ori_shape=(60, 90), img_padding_size=(4, 2, 0, 4)),
    ]
    for meta in cases:
        expected = predict(other, images, WHOLE, **meta)
        kept = predict(model, images, WHOLE, **meta)
        without = predict(model, images, dict(keep_logits=False), **meta)
        for one, two, three in zip(expected, kept, without, strict=True):
            torch.testing.assert_close(one.seg_logits.data, two.seg_logits.data)
            assert len(one.pred_sem_seg.data.unique()) > 1
            for sample in (two, three):
                assert sample.pred_sem_seg.data.dtype == one.pred_sem_seg.data.dtype
                assert torch.equal(sample.pred_sem_seg.data, one.pred_sem_seg.data), meta
            assert "seg_logits" not in three
    with torch.no_grad():
        assert torch.equal(
            model.predict(images)[1].pred_sem_seg.data, other.predict(images)[1].pred_sem_seg.data
        )


MEMORY = """
import sys
from pathlib import Path

import torch
from test_dense_inference import build_segmentor, predict

torch.set_num_threads(1)
size, num_classes = int(sys.argv[1]), 16


def resident(key):
    # Of this program alone, which getrusage's figure is not.
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(key)]
    return int(line.split()[1]) * 1024


def slide(stride, **options):
    return dict(mode="slide", crop_size=512, stride=stride, **options)


model = build_segmentor(num_classes=num_classes)
images = torch.zeros(1, 3, size, size).uniform_()
predict(model, images[..., :64, :64], slide(64))  # what the first call of all sets up
before = resident("VmRSS")
peaks = {}
for name, image, test_cfg in (
    ("window", images[..., :512, :512], dict(mode="whole")),
    ("slide", images, slide(512)),
    ("slide, more windows", images, slide(int(sys.argv[2]))),
    ("whole", images, dict(mode="whole")),
):
    if name == "whole" and len(sys.argv) > 3:
        break
    sample = predict(model, image, test_cfg)
    peaks[name] = resident("VmHWM") - before
    del sample
print(num_classes * 4 * size**2, 8 * size**2, *peaks.values())
"""


def measure_memory(*arguments):
    """Return bytes: logits, labels, then peak growth of one window, few, many, the whole image."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(word) for word in done.stdout.split()[-(6 - (len(arguments) > 2)) :]]


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="resident memory is read from /proc"
)


def test_windows_hold_the_logits_the_labels_and_one_window_whatever_their_number():
    """By the bytes of tensors; resident memory is measured by the slow tests."""
    model, images = build_segmentor(num_classes=16), make_images(1, 3, 256, 256)
    peaks = []
    for image, test_cfg in (
        (images[..., :128, :128], WHOLE),
        (images, slide(128, 128)),
        (images, slide(128, 64)),
        (images, WHOLE),
    ):
        with PeakMemory() as memory:
            predict(model, image, test_cfg)
        peaks.append(memory.peak)
    window, few, many, whole = peaks
    logits, labels = 16 * 4 * 256**2, 8 * 256**2
    assert few < logits + labels + window
    assert many == few
    assert whole > few + window


@needs_proc
@pytest.mark.slow
def test_windows_need_the_logits_the_labels_and_one_window_whatever_their_number():
    logits, labels, window, few, many, whole = measure_memory(1536, 384)
    assert few < logits + labels + 1.5 * window
    assert many - few < 0.1 * window
    assert whole > few + window


@needs_proc
@pytest.mark.slow
def test_an_image_of_4096_pixels_needs_one_map_of_logits():
    logits, labels, window, few, many = measure_memory(4096, 341, "windows only")
    assert few < logits + labels + 1.5 * window
    assert many - few < 0.1 * window


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """The embedded data set, small: 4 held-out scenes of 64 pixels."""
    return make_dataset(tmp_path_factory.mktemp("data") / "digits", images=16, size=64)


def tta_options(name, scenes):
    """The options that put the small data set in the place of a config's own."""
    dataset = "test_dataloader.dataset"
    options = [
        "test_dataloader.num_workers=0",
        "test_dataloader.persistent_workers=False",
        "model.backbone.init_cfg=None",
        f"{dataset}.data_root={scenes}",
        f"{dataset}.pipeline.1.scale=(64,64)",
    ]
    views = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) if name == SEGMENTER else (1.0, 0.5, 1.5)
    for index, ratio in enumerate(views):
        side = int(64 * ratio)
        options += [f"tta_pipeline.1.transforms.0.{index}.scale=({side},{side})"]
    if name == SEGMENTER:
        return [
            *options,
            f"{dataset}.data_prefix.img_path=images/val",
            f"{dataset}.data_prefix.seg_map_path=masks/val",
        ]
    annotations = "annotations/instances_val.json"
    if name == DETECTOR:
        options += ["model.bbox_head.num_classes=10", "model.test_cfg.score_thr=0.0"]
    else:
        options += ["model.roi_head.bbox_head.num_classes=10"]
    classes = ",".join(f'"{name}"' for name in CLASSES)
    return [
        *options,
        f"{dataset}.data_prefix.img=images/val",
        f"{dataset}.ann_file={annotations}",
        f"test_evaluator.ann_file={scenes / annotations}",
        f"{dataset}.metainfo.classes=({classes})",
    ]


def random_checkpoint(name, options, path):
    """Write seeded random weights of a config's model."""
    cfg = load_config(name, options)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    torch.save({"state_dict": spread(MODELS.build(cfg.model)).state_dict()}, path)
    return path


def densezoo(*arguments, cfg_options=()):
    """Run the command in this process; mmengine keeps its logs apart by the experiment's name."""
    name = f"experiment_name=dense{next(_run_numbers)}"
    return main([*map(str, arguments), "--cfg-options", *cfg_options, name])


@pytest.mark.parametrize("name, figure", [(SEGMENTER, "mIoU"), (DETECTOR, "coco/bbox_mAP")])
def test_the_command_tests_with_the_views_of_the_shipped_config(name, figure, scenes, tmp_path):
    options = tta_options(name, scenes)
    checkpoint = random_checkpoint(name, options, tmp_path / "random.pth")
    figures = {}
    for extra in ([], ["--tta"]):
        out = tmp_path / f"figures{len(extra)}.json"
        words = ["test", name, checkpoint, "--out", out, *extra]
        assert densezoo(*words, cfg_options=options) == 0
        figures[len(extra)] = json.loads(out.read_text())
    assert figures[0].keys() == figures[1].keys() and figure in figures[1]
    if name == SEGMENTER:  # boxes of random weights find nothing, so their figures are all 0
        assert figures[0] != figures[1]
    assert not list(tmp_path.glob("*.partial"))


class Inference:
    """A config's model and test data, plain or as ``--tta`` makes them, on single images.

    Args:
        views: (sizes, flips), the sizes in pixels and the flip probabilities; None is plain.
    """

    def __init__(self, name, scenes, views=None):
        self.name = name
        cfg = load_config(name, tta_options(name, scenes))
        dataset = cfg.test_dataloader.dataset
        if views:
            sizes, flips = views
            choices = cfg.tta_pipeline[1].transforms
            choices[0] = [dict(type="Resize", scale=size, keep_ratio=True) for size in sizes]
            # These images have no annotations.
            del choices[[choice[0]["type"] for choice in choices].index("LoadAnnotations")]
            place = [choice[0]["type"] for choice in choices].index("RandomFlip")
            choices[place] = [dict(type="RandomFlip", prob=prob) for prob in flips]
            augment(cfg)
        else:
            del dataset.pipeline[[step.type for step in dataset.pipeline].index("LoadAnnotations")]
            dataset.pipeline[1].scale = (96, 64)
        init_default_scope(cfg.default_scope)
        self.pipeline = Compose(dataset.pipeline)
        torch.manual_seed(0)
        self.model = MODELS.build(cfg.model).eval()
        spread(getattr(self.model, "module", self.model))

    @torch.no_grad()
    def __call__(self, path):
        """Return labels (H, W), or boxes (N, 4), scores and labels, most certain first."""
        data = self.pipeline(dict(img_path=str(path), img_id=0))
        (sample,) = self.model.test_step(pseudo_collate([data]))
        if self.name == SEGMENTER:
            return (sample.pred_sem_seg.data.squeeze(),)
        found = sample.pred_instances
        return found.bboxes, found.scores, found.labels


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    """An image of 96 x 64 pixels and its mirror image."""
    folder = tmp_path_factory.mktemp("mirrored")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((96, 64), Image.Resampling.BICUBIC)
    image.save(folder / "image.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "mirror.png")
    return folder / "image.png", folder / "mirror.png"


def mirror(prediction):
    """Mirror a prediction of an image that is 96 pixels wide."""
    if len(prediction) == 1:
        return (prediction[0].flip(-1),)
    boxes, scores, labels = prediction
    flipped = torch.stack([96 - boxes[:, 2], boxes[:, 1], 96 - boxes[:, 0], boxes[:, 3]], dim=1)
    return flipped, scores, labels


def is_equal(one, two):
    try:
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", [SEGMENTER, DETECTOR])
def test_with_flips_the_mirror_image_gets_the_mirrored_prediction(name, scenes, mirrored):
    image, mirror_image = mirrored
    plain = Inference(name, scenes)
    # Sizes at which resizing commutes with mirroring to the last digit.
    augmented = Inference(name, scenes, views=(((96, 64), (192, 128)), (0.0, 1.0)))
    prediction = augmented(image)
    assert len(prediction[0]) > 20 and len(prediction[-1].unique()) > 1
    torch.testing.assert_close(augmented(mirror_image), mirror(prediction), rtol=1e-4, atol=1e-3)
    assert not is_equal(plain(mirror_image), mirror(plain(image)))
    assert not is_equal(plain(image), prediction)


@pytest.mark.parametrize("name", [SEGMENTER, DETECTOR])
def test_one_view_without_a_flip_is_plain_testing(name, scenes, mirrored):
    plain = Inference(name, scenes)
    one_view = Inference(name, scenes, views=(((96, 64),), (0.0,)))
    for image in mirrored:
        torch.testing.assert_close(one_view(image), plain(image))


def test_views_of_sliding_windows_are_averaged_too(scenes, mirrored):
    inference = Inference(SEGMENTER, scenes, views=(((96, 64), (192, 128)), (0.0, 1.0)))
    whole = inference(mirrored[0])
    inference.model.module.test_cfg = ConfigDict(slide((128, 192), (128, 192)))
    torch.testing.assert_close(inference(mirrored[0]), whole)


@pytest.mark.parametrize(
    "name, options, message",
    [
        (CLASSIFIER, [], "can't be tested with --tta: it lacks tta_model and tta_pipeline"),
        (SEGMENTER, ["tta_pipeline=None"], "it lacks tta_pipeline"),
        (MASK_DETECTOR, [], "merges boxes, not masks"),
        (SEGMENTER, ["model.test_cfg.keep_logits=False"], "set it to True"),
    ],
    ids=["classifier", "no pipeline", "masks", "no logits"],
)
def test_what_cannot_be_augmented_is_one_line_before_any_work(
    name, options, message, tmp_path, capsys
):
    words = ["test", name, tmp_path / "none.pth", "--tta", "--work-dir", tmp_path / "work"]
    assert densezoo(*words, cfg_options=options) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("densezoo test: error: ") and message in line
    assert not (tmp_path / "work").exists()


def test_data_without_a_pipeline_cannot_be_augmented():
    cfg = load_config(DETECTOR)
    del cfg.test_dataloader.dataset["pipeline"]
    with pytest.raises(ValueError, match="test_dataloader.dataset has no pipeline"):
        augment(cfg)


def test_the_boxes_of_a_detector_with_masks_are_merged_as_the_error_says(scenes, tmp_path, capsys):
    options = tta_options(MASK_DETECTOR, scenes)
    checkpoint = random_checkpoint(MASK_DETECTOR, options, tmp_path / "random.pth")
    words = ["test", MASK_DETECTOR, checkpoint, "--tta", "--out", tmp_path / "figures.json"]
    assert densezoo(*words, cfg_options=options) == 1
    line = capsys.readouterr().err.strip()
    options += line.partition("--cfg-options ")[2].split()
    assert densezoo(*words, cfg_options=options) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert "coco/bbox_mAP" in figures and not any("segm" in key for key in figures)


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs a folder that cannot be written")
def test_an_unwritable_file_of_figures_is_found_before_the_work(tmp_path, capsys):
    words = ["test", CLASSIFIER, tmp_path / "none.pth", "--out", "/proc/figures.json"]
    assert densezoo(*words) == 1
    assert "--out /proc/figures.json can't be written" in capsys.readouterr().err


def test_figures_are_written_whole_or_not_at_all(tmp_path):
    script = """
import resource, sys
from pathlib import Path
from densezoo.tools.evaluate import write_figures

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # the disk is as good as full
out = Path(sys.argv[1])
write_figures({"mIoU": 1.0}, out)
try:
    write_figures({str(number): 0.0 for number in range(1000)}, out)
except OSError:
    print(out.read_text())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "figures.json"], capture_output=True, text=True
    )
    assert json.loads(done.stdout) == {"mIoU": 1.0}, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
