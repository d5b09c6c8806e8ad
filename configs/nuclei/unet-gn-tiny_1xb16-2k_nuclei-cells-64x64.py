# Quarters of nuclei tiles, four of five of them empty: 4,000 training and 1,600 test cells, as benchmarks/nuclei_cells.py
# cuts them. GroupNorm: its statistics are each sample's own, so that losses separate over samples.
_base_ = ['../_base_/unet-tiny.py', '../_base_/small_run.py', '../_base_/default_runtime.py']

data_root = '{{$NUCLEI_CELLS_ROOT:data/nuclei-cells}}'
metainfo = dict(
    classes=('background', 'nucleus', 'nucleus_boundary'),
    palette=[[0, 0, 0], [220, 220, 120], [200, 60, 60]])
norm_cfg = dict(type='GN', num_groups=4, requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(56, 56)),
    backbone=dict(norm_cfg=norm_cfg),
    decode_head=dict(norm_cfg=norm_cfg, num_classes=3))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(56, 56)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomFlip', prob=0.5, direction='vertical'),
    dict(type='PackSegInputs')
]
dataset = dict(type='BaseSegDataset', img_suffix='.png', data_root=data_root, metainfo=metainfo)
train_dataloader = dict(batch_size=16, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(batch_size=16, dataset=dataset)
test_dataloader = val_dataloader

# 2000 iterations of 16 are 8 passes over 4,000 cells.
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.002, weight_decay=0.01))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=0, T_max=1900, by_epoch=False, begin=100, end=2000)
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2000, val_interval=1000)
