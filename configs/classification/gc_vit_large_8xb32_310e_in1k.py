_base_ = "gc_vit_small_8xb32_310e_in1k.py"

val_dataloader = dict(dataset=dict(transform=dict(crop_pct=1.0)))
test_dataloader = val_dataloader
model = dict(model_name="gc_vit_large", drop_path_rate=0.5)
