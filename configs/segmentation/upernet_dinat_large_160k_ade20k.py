_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_640.py",
    "../_base_/schedules/nat_160k_ade20k.py",
    "../_base_/runtime_segmentation.py",
]

# No mixed precision, as published.
optim_wrapper = dict(type="OptimWrapper")
model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(
        model_name="dinat_large",
        drop_path_rate=0.3,
        out_norms=True,
        model_kwargs=dict(dilations="ade20k_640"),
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/dinat_large.pth"),
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
