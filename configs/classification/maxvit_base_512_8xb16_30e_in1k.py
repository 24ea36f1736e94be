_base_ = "maxvit_tiny_512_8xb16_30e_in1k.py"

model = dict(
    model_name="maxvit_base.in1k_512",
    drop_path_rate=0.4,
    init_cfg=dict(checkpoint="checkpoints/maxvit_base.pth"),
)
