_base_ = './resnet18-tiny_1xb32-16e_demo-32px.py'

custom_imports = dict(imports=['infobatch_mm.engine'], allow_failed_imports=False)
custom_hooks = [dict(type='InfoBatchHook', prune_ratio=0.5, delta=0.875)]
