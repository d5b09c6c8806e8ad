# What the small pre-training runs share: MAE's augmentation and optimizer, MMPretrain's own runtime with fewer
# checkpoints. A config that inherits it adds its data_root and data_prefix, its batch size, its schedule and its
# epochs.
_base_ = [__import__('infobatch_mm.zoo').zoo.config_path('mmpretrain', '_base_/default_runtime.py')]

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=64, crop_ratio_range=(0.2, 1.0)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs')
]
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='CustomDataset', with_label=False, pipeline=train_pipeline))
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            'ln': dict(decay_mult=0.0),
            'bias': dict(decay_mult=0.0),
            'pos_embed': dict(decay_mult=0.),
            'mask_token': dict(decay_mult=0.),
            'cls_token': dict(decay_mult=0.)
        }))
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=5, max_keep_ckpts=1),
    # Named in full, it needs no custom_imports, which the pruned twins bring.
    reconstruction=dict(type='infobatch_mm.engine.ReconstructionHook', interval=10))
randomness = dict(seed=0)
