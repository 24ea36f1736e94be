_base_ = "gc_vit_xtiny_8xb128_310e_in1k.py"

model = dict(model_name="gc_vit_tiny2", drop_path_rate=0.25)
