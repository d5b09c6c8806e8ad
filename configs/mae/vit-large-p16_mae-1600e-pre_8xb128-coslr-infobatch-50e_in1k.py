_base_ = './vit-large-p16_mae-1600e-pre_8xb128-coslr-50e_in1k.py'

custom_imports = dict(imports=['infobatch_mm.engine'], allow_failed_imports=False)
custom_hooks = [dict(type='InfoBatchHook', prune_ratio=0.5, delta=0.875)]
