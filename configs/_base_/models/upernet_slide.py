"""UPerNet as ``upernet.py``, tested in windows of 512 pixels every 341."""

_base_ = "upernet.py"

model = dict(test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)))
