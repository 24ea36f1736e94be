_base_ = [
    "../_base_/datasets/imagenet.py",
    "../_base_/schedules/ppma_300e_in1k.py",
    "../_base_/runtime_classification.py",
]

# Colour jitter of 0.4 is a part of the recipe too; timm leaves it out beside RandAugment.
train_dataloader = dict(sampler=dict(_delete_=True, type="RepeatedAugmentationSampler"))
model = dict(
    type="ImageClassifier",
    model_name="ppma_tiny",
    num_classes=1000,
    drop_path_rate=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, label_smoothing=0.1),
    random_erasing=dict(probability=0.25, mode="pixel"),
)
