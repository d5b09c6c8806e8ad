_base_ = './mae_vit-tiny-p8_1xb64-coslr-100e_demo-64px.py'

custom_imports = dict(imports=['infobatch_mm.engine'], allow_failed_imports=False)
custom_hooks = [dict(type='InfoBatchHook', prune_ratio=0.5, delta=0.875)]
