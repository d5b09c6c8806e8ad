# MMPretrain has CIFAR-100 for ResNet-50 only: its data and schedule, with ResNet-18.
_base_ = [__import__('infobatch_mm.zoo').zoo.config_path('mmpretrain', 'resnet/resnet50_8xb16_cifar100.py')]

model = dict(backbone=dict(depth=18), head=dict(in_channels=512))
