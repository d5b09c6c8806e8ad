_base_ = './knet-s2_fcn_r18-tiny_1xb16-2k_nuclei-128x128.py'

custom_imports = dict(imports=['infobatch_mm.engine'], allow_failed_imports=False)
custom_hooks = [dict(type='InfoBatchHook', prune_ratio=0.5, delta=0.875)]
