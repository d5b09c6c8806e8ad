# What the small classification runs share: epochs, SGD, validation by accuracy, MMPretrain's own runtime with
# fewer checkpoints. A config that inherits it adds its data sets, its batch size, its schedule and its epochs.
_base_ = [__import__('infobatch_mm.zoo').zoo.config_path('mmpretrain', '_base_/default_runtime.py')]

train_dataloader = dict(num_workers=0, persistent_workers=False, sampler=dict(type='DefaultSampler', shuffle=True))
val_dataloader = dict(
    batch_size=200,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, ))
test_evaluator = val_evaluator
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.0005))
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=5, max_keep_ckpts=2))
randomness = dict(seed=0)
