_base_ = "maxvit_tiny_512_8xb16_30e_in1k.py"

model = dict(
    model_name="maxvit_large.in1k_512",
    drop_path_rate=0.6,
    init_cfg=dict(checkpoint="checkpoints/maxvit_large.pth"),
)
