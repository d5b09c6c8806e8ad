# Images of 32 x 32 in one local .npz with train_x, train_y, test_x, test_y (see NpzDataset). Say where it is:
#   CIFAR10_NPZ=/path/to/cifar10.npz python tools/train.py CONFIG
_base_ = ['../_base_/resnet18-tiny.py', '../_base_/small_cls_run.py']

data_preprocessor = dict(
    num_classes=10,
    mean=[125.307, 122.961, 113.8575],
    std=[51.5865, 50.847, 51.255],
    to_rgb=False)
train_pipeline = [
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs')
]
# Named in full, it needs no custom_imports, which the pruned twin brings.
dataset = dict(type='infobatch_mm.datasets.NpzDataset', ann_file='{{$CIFAR10_NPZ:data/cifar10.npz}}')
train_dataloader = dict(batch_size=128, dataset=dict(**dataset, split='train', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**dataset, split='test', pipeline=[dict(type='PackInputs')]))
test_dataloader = val_dataloader

param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=28, begin=2, end=30, convert_to_iter_based=True)
]
train_cfg = dict(by_epoch=True, max_epochs=30, val_interval=1)
