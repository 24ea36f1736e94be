"""UPerNet as ``upernet.py`` for Cityscapes, tested in windows of 1024 pixels every 341."""

_base_ = "upernet.py"

model = dict(
    data_preprocessor=dict(size=(1024, 1024)),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
    test_cfg=dict(mode="slide", crop_size=(1024, 1024), stride=(341, 341)),
)
