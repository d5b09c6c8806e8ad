# MMPretrain's own config of this name, wherever it is installed.
_base_ = [__import__('infobatch_mm.zoo').zoo.config_path('mmpretrain', 'resnet/resnet50_8xb32_in1k.py')]
