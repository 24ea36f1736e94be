"""GC ViT-xxtiny with UPerNet: not published; here the recipe of PPMA."""

_base_ = [
    "../_base_/models/upernet_slide.py",
    "../_base_/datasets/ade20k_keep_ratio.py",
    "../_base_/schedules/ppma_160k_ade20k.py",
    "../_base_/runtime_segmentation.py",
]

model = dict(
    backbone=dict(
        model_name="gc_vit_xxtiny",
        drop_path_rate=0.2,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/gc_vit_xxtiny.pth"),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
