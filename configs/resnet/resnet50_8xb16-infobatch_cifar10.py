_base_ = './resnet50_8xb16_cifar10.py'

custom_imports = dict(imports=['infobatch_mm.engine'], allow_failed_imports=False)
custom_hooks = [dict(type='InfoBatchHook', prune_ratio=0.5, delta=0.875)]
