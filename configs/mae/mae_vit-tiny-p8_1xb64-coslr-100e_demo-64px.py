# The unpruned twin: crops of 64 x 64 from the scenes that `make demo-data` draws (480 of them, no labels used).
_base_ = ['../_base_/mae_vit-tiny.py', '../_base_/small_mae_run.py']

train_dataloader = dict(batch_size=64, dataset=dict(data_root='data/demo', data_prefix='images/training'))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, begin=0, end=10, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=90, begin=10, end=100, convert_to_iter_based=True)
]
train_cfg = dict(by_epoch=True, max_epochs=100)
