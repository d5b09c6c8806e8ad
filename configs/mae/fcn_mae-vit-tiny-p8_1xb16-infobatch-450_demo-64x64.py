_base_ = './fcn_mae-vit-tiny-p8_1xb16-450_demo-64x64.py'

custom_imports = dict(imports=['infobatch_mm.engine'], allow_failed_imports=False)
custom_hooks = [dict(type='InfoBatchHook', prune_ratio=0.5, delta=0.875)]
