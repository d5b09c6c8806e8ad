# MMPretrain's own config of this name, wherever it is installed.
_base_ = [__import__('infobatch_mm.zoo').zoo.config_path('mmpretrain', 'swin_transformer/swin-tiny_16xb64_in1k.py')]
