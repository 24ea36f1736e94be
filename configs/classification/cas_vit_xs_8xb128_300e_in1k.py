_base_ = [
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/cas_vit_300e_in1k.py",
    "../_base_/runtime_classification.py",
]

model = dict(
    type="ImageClassifier",
    model_name="cas_vit_xs",
    num_classes=1000,
    drop_path_rate=0.1,
    model_kwargs=dict(distillation=False),
    loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.1),
)
