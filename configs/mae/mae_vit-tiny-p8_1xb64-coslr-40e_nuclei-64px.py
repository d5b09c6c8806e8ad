# Crops of 64 x 64 from microscopy tiles (4,107 of them, no labels used). Say where they are:
#   NUCLEI_ROOT=/path/to/nuclei python tools/train.py CONFIG
_base_ = ['../_base_/mae_vit-tiny.py', '../_base_/small_mae_run.py']

train_dataloader = dict(
    batch_size=64,
    dataset=dict(data_root='{{$NUCLEI_ROOT:data/nuclei}}', data_prefix='images/training'))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, begin=0, end=4, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=36, begin=4, end=40, convert_to_iter_based=True)
]
train_cfg = dict(by_epoch=True, max_epochs=40)
