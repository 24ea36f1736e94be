_base_ = "maxvit_tiny_384_8xb16_30e_in1k.py"

model = dict(
    model_name="maxvit_xlarge.in21k_ft_in1k_384",
    drop_path_rate=0.9,
    init_cfg=dict(checkpoint="checkpoints/maxvit_xlarge_in21k.pth"),
)
