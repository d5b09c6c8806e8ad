_base_ = './mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py'

custom_imports = dict(imports=['infobatch_mm.engine'], allow_failed_imports=False)
custom_hooks = [dict(type='InfoBatchHook', prune_ratio=0.5, delta=0.875)]
