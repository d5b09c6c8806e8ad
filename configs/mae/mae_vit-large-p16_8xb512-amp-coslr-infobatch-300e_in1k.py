_base_ = './mae_vit-large-p16_8xb512-amp-coslr-300e_in1k.py'

custom_imports = dict(imports=['infobatch_mm.engine'], allow_failed_imports=False)
custom_hooks = [dict(type='InfoBatchHook', prune_ratio=0.5, delta=0.875)]
