_base_ = "ppma_tiny_8xb128_300e_in1k.py"

model = dict(model_name="rmt_tiny", drop_path_rate=0.1)
