_base_ = [
    "../_base_/datasets/imagenet_384.py",
    "../_base_/schedules/cas_vit_30e_384_in1k.py",
    "../_base_/runtime_classification.py",
]

# What this starts from: the published file, or a checkpoint of the 300-epoch config.
model = dict(
    type="ImageClassifier",
    model_name="cas_vit_xs",
    num_classes=1000,
    drop_path_rate=0.0,
    model_kwargs=dict(distillation=False),
    loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.1),
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/cas_vit_xs.pth"),
)
