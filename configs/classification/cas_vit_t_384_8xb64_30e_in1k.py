_base_ = "cas_vit_xs_384_8xb64_30e_in1k.py"

model = dict(
    model_name="cas_vit_t",
    init_cfg=dict(checkpoint="checkpoints/cas_vit_t.pth"),
)
