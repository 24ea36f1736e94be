_base_ = "cas_vit_xs_8xb128_300e_in1k.py"

model = dict(model_name="cas_vit_m")
