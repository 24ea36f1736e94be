"""mmseg's EncoderDecoder with sliding windows in bounded memory; apart for what it imports."""

from __future__ import annotations

import torch
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.models.utils import resize
from mmseg.structures import SegDataSample
from torch import Tensor

from .segmentor import check_test_cfg, slide_over


class DenseSegmentor(EncoderDecoder):
    """mmseg's EncoderDecoder, tested on whole images or on sliding windows in bounded memory.

    Training, weights and results are EncoderDecoder's. Beside the model and the image, a prediction
    in mode "slide" needs what one batch of windows needs and, for each pixel of the image, 4 bytes
    a class for the logits (on `accumulation_device`) and 8 for the label. Where the pipeline
    resized or flipped the image, the logits at its original size come on top of it, or with
    ``keep_logits=False`` 12 bytes a pixel. EncoderDecoder's own holds the logits more than twice.

    Args:
        backbone, decode_head: configs of mmseg's models.
        test_cfg: see :func:`~.segmentor.check_test_cfg`.
        options: further arguments of EncoderDecoder: neck, auxiliary_head, train_cfg,
            data_preprocessor, pretrained, init_cfg.

    Raises:
        ValueError: for what :func:`~.segmentor.check_test_cfg` refuses.
    """

    def __init__(
        self, backbone: dict, decode_head: dict, *, test_cfg: dict | None = None, **options
    ) -> None:
        # Before the model is built, which takes its time.
        test_cfg = check_test_cfg(test_cfg)
        super().__init__(backbone, decode_head, test_cfg=test_cfg, **options)

    def inference(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Predict logits: inputs (B, C, H, W) to (B, num_classes, H, W), as `test_cfg` says.

        Raises:
            ValueError: if `test_cfg` was changed to something that makes no sense.
        """
        self.test_cfg = check_test_cfg(self.test_cfg)
        return super().inference(inputs, batch_img_metas)

    def slide_inference(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Average the logits of overlapping windows.

        Args:
            inputs: (B, C, H, W).
            batch_img_metas: B dicts of mmseg's meta information.

        Returns:
            (B, num_classes, H, W) on `accumulation_device`.
        """

        def predict(windows: Tensor) -> Tensor:
            # Heads resize to the one or the other, some only if it is a torch.Size.
            sizes = {"img_shape": windows.shape[2:], "pad_shape": windows.shape[2:]}
            metas = [
                {**batch_img_metas[index % len(inputs)], **sizes} for index in range(len(windows))
            ]
            return self.encode_decode(windows, metas)

        return slide_over(
            inputs,
            predict,
            self.out_channels,
            crop_size=self.test_cfg.crop_size,
            stride=self.test_cfg.stride,
            device=self.test_cfg.accumulation_device,
            window_batch_size=self.test_cfg.window_batch_size,
        )

    def postprocess_result(
        self, seg_logits: Tensor, data_samples: list[SegDataSample] | None = None
    ) -> list[SegDataSample]:
        """Turn logits into labels at the size of the original images.

        Args:
            seg_logits: (B, num_classes, H, W).
            data_samples: B samples with mmseg's meta information, which get `pred_sem_seg`
                (1, height, width) and, with `keep_logits`, `seg_logits` (num_classes, height,
                width). Without them labels have the size of the logits.
        """
        if data_samples is None:
            data_samples = [SegDataSample() for _ in seg_logits]
        for logits, sample in zip(seg_logits, data_samples, strict=True):
            meta = sample.metainfo
            padding = meta.get("img_padding_size", meta.get("padding_size", (0, 0, 0, 0)))
            left, right, top, bottom = padding
            height, width = logits.shape[-2:]
            logits = logits[:, top : height - bottom, left : width - right]
            if len(logits) == 1:
                # One class against the background: mmseg gives its probability as the logit.
                logits = self._restore(logits, meta).sigmoid()
                labels = (logits > self.decode_head.threshold).to(logits)
            elif self.test_cfg.keep_logits:
                logits = self._restore(logits, meta)
                labels = logits.argmax(dim=0, keepdim=True)
            else:
                labels = self._label_class_by_class(logits, meta)
            if self.test_cfg.keep_logits:
                sample.set_data({"seg_logits": PixelData(data=logits)})
            sample.set_data({"pred_sem_seg": PixelData(data=labels)})
        return data_samples

    def _label_class_by_class(self, logits: Tensor, meta: dict) -> Tensor:
        """Return labels (1, height, width) of logits (C, h, w), restoring a channel at a time."""
        scores = self._restore(logits[:1], meta)
        labels = torch.zeros_like(scores, dtype=torch.int64)
        for index in range(1, len(logits)):
            others = self._restore(logits[index : index + 1], meta)
            labels.masked_fill_(others > scores, index)
            scores = torch.maximum(scores, others)
        return labels

    def _restore(self, logits: Tensor, meta: dict) -> Tensor:
        """Undo flip and resizing of logits (C, h, w); without either they are not copied."""
        if meta.get("flip"):
            logits = logits.flip(-1 if meta["flip_direction"] == "horizontal" else -2)
        size = tuple(meta.get("ori_shape", logits.shape[-2:]))
        if size == logits.shape[-2:]:
            return logits
        return resize(
            logits[None],
            size=size,
            mode="bilinear",
            align_corners=self.align_corners,
            warning=False,
        )[0]
