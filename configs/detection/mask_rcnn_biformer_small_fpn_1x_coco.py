_base_ = [
    "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/biformer_mask_rcnn_1x_coco.py",
    "../_base_/runtime_detection.py",
]

train_dataloader = dict(batch_size=2)
model = dict(
    backbone=dict(
        model_name="biformer_small",
        drop_path_rate=0.2,
        norm_eval=True,
        out_norms=True,
        model_kwargs=dict(num_regions=16),
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/biformer_small.pth"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
