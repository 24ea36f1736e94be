"""RMT-large: not trained by PPMA's authors; here their recipe, with the variant's own drop path."""

_base_ = "ppma_tiny_8xb128_300e_in1k.py"

model = dict(model_name="rmt_large", drop_path_rate=0.5)
