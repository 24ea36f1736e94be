_base_ = [
    "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/ppma_1x_coco.py",
    "../_base_/runtime_detection.py",
]

train_dataloader = dict(batch_size=2)
model = dict(
    backbone=dict(
        model_name="ppma_tiny",
        drop_path_rate=0.1,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/ppma_tiny.pth"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
