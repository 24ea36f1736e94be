_base_ = [
    "../_base_/models/cascade_mask_rcnn_fpn_levels_3_to_7.py",
    "../_base_/datasets/coco_instance_896.py",
    "../_base_/schedules/maxvit_200e_coco.py",
    "../_base_/runtime_detection.py",
]

optim_wrapper = dict(optimizer=dict(lr=1e-3))
model = dict(
    data_preprocessor=dict(pad_size_divisor=896),
    backbone=dict(
        model_name="maxvit_tiny",
        drop_path_rate=0.2,
        model_kwargs=dict(window_size=28, grid_size=28),
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/maxvit_tiny.pth"),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
