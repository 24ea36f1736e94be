_base_ = [
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/maxvit_300e_in1k.py",
    "../_base_/runtime_classification.py",
]

train_dataloader = dict(
    batch_size=64, dataset=dict(transform=dict(auto_augment="rand-m15-n2-p1.0"))
)
model = dict(
    type="ImageClassifier",
    model_name="maxvit_tiny",
    num_classes=1000,
    drop_path_rate=0.2,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=0.0, label_smoothing=0.1),
)
