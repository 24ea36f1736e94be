_base_ = "gc_vit_small_8xb32_310e_in1k.py"

model = dict(model_name="gc_vit_small2", drop_path_rate=0.35)
