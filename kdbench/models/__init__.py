"""Networks. `MODELS` is the catalogue of our own, written out by hand: name -> its builder and what it is. timm's names work beside it.

Every target is a builder `f(*, num_classes, in_channels, **options) -> nn.Module`.
"""

from kdbench.catalogue import Entry

MODELS: dict[str, Entry] = {
    "tiny_cnn": Entry("kdbench.models.tiny:tiny_cnn", "three convolutions, 24 k parameters; options width, stem_stride"),
    "tiny_fcn": Entry("kdbench.models.tiny:tiny_fcn", "segmentation, 5 k parameters"),
    "small_fcn": Entry("kdbench.models.tiny:small_fcn", "segmentation, 120 k parameters"),
    "tiny_fcos": Entry("kdbench.models.detectors.fcos:tiny_fcos", "detection, 30 k parameters; options width, levels"),
    "deeplabv3": Entry(
        "kdbench.models.segmenters.by_name:deeplabv3", "segmentation, DeepLabV3 on any backbone; options backbone, width, rate"
    ),
    "deeplabv3_resnet18": Entry(
        "kdbench.models.segmenters.by_name:deeplabv3_resnet18", "segmentation, DeepLabV3, 16 M; options width, rate"
    ),
    "deeplabv3_resnet50": Entry(
        "kdbench.models.segmenters.by_name:deeplabv3_resnet50", "segmentation, DeepLabV3, 40 M; options width, rate"
    ),
    "deeplabv3_mobilenet_v3_large": Entry(
        "kdbench.models.segmenters.by_name:deeplabv3_mobilenet_v3_large", "segmentation, DeepLabV3, 11 M; options width, rate"
    ),
    "fcn": Entry("kdbench.models.segmenters.by_name:fcn", "segmentation, FCN on any backbone; options backbone, width"),
    "fcn_resnet50": Entry("kdbench.models.segmenters.by_name:fcn_resnet50", "segmentation, FCN, 33 M; option width"),
    "lraspp": Entry("kdbench.models.segmenters.by_name:lraspp", "segmentation, LR-ASPP on any backbone; options backbone, width"),
    "lraspp_mobilenet_v3_large": Entry(
        "kdbench.models.segmenters.by_name:lraspp_mobilenet_v3_large", "segmentation, LR-ASPP, 3 M; option width"
    ),
    "unet": Entry("kdbench.models.segmenters.unet:unet", "segmentation, U-Net, 2 M; options width, depth"),
    "fcos": Entry(
        "kdbench.models.detectors.one_stage:fcos", "detection, FCOS on any backbone; options backbone, width, finest, levels, preset"
    ),
    "fcos_resnet18_fpn": Entry(
        "kdbench.models.detectors.one_stage:fcos_resnet18_fpn", "detection, FCOS, 19 M; options width, finest, levels, preset"
    ),
    "fcos_resnet50_fpn": Entry(
        "kdbench.models.detectors.one_stage:fcos_resnet50_fpn", "detection, FCOS, 32 M; options width, finest, levels, preset"
    ),
    "retinanet": Entry(
        "kdbench.models.detectors.one_stage:retinanet",
        "detection, RetinaNet on any backbone; options backbone, width, finest, levels, anchor, preset",
    ),
    "retinanet_resnet18_fpn": Entry(
        "kdbench.models.detectors.one_stage:retinanet_resnet18_fpn",
        "detection, RetinaNet, 21 M; options width, finest, levels, anchor, preset",
    ),
    "retinanet_resnet50_fpn": Entry(
        "kdbench.models.detectors.one_stage:retinanet_resnet50_fpn",
        "detection, RetinaNet, 34 M; options width, finest, levels, anchor, preset",
    ),
    "faster_rcnn": Entry(
        "kdbench.models.detectors.two_stage:faster_rcnn",
        "detection, Faster R-CNN on any backbone; options backbone, width, finest, levels, anchor, hidden, proposals, learned, preset",
    ),
    "fasterrcnn_resnet18_fpn": Entry(
        "kdbench.models.detectors.two_stage:fasterrcnn_resnet18_fpn",
        "detection, Faster R-CNN, 29 M; options width, finest, levels, anchor, hidden, proposals, learned, preset",
    ),
    "fasterrcnn_resnet50_fpn": Entry(
        "kdbench.models.detectors.two_stage:fasterrcnn_resnet50_fpn",
        "detection, Faster R-CNN, 42 M; options width, finest, levels, anchor, hidden, proposals, learned, preset",
    ),
    "mask_rcnn": Entry(
        "kdbench.models.detectors.mask_rcnn:mask_rcnn",
        "instance masks, Mask R-CNN on any backbone; "
        "options backbone, width, finest, levels, anchor, hidden, proposals, learned, drawn, preset",
    ),
    "maskrcnn_resnet50_fpn": Entry(
        "kdbench.models.detectors.mask_rcnn:maskrcnn_resnet50_fpn",
        "instance masks, Mask R-CNN, 44 M; options width, finest, levels, anchor, hidden, proposals, learned, drawn, preset",
    ),
    "ssdlite": Entry("kdbench.models.detectors.ssd:ssdlite", "detection, SSDLite on any backbone; options backbone, width, levels, preset"),
    "ssdlite320_mobilenet_v3_large": Entry(
        "kdbench.models.detectors.ssd:ssdlite320_mobilenet_v3_large", "detection, SSDLite, 3 M; options width, levels, preset"
    ),
    "tiny_text": Entry("kdbench.models.towers:tiny_text", "classifier of words, 20 k parameters; options width, depth, heads"),
    "tiny_towers": Entry(
        "kdbench.models.towers:tiny_towers", "images and texts, 60 k parameters; options width, depth, heads, patch, stem, embedding"
    ),
    "cifar_resnet8": Entry("kdbench.models.cifar_resnet:cifar_resnet8", "ResNet for small images, 0.08 M; options width, stem_stride"),
    "cifar_resnet14": Entry("kdbench.models.cifar_resnet:cifar_resnet14", "ResNet for small images, 0.18 M; options width, stem_stride"),
    "cifar_resnet20": Entry("kdbench.models.cifar_resnet:cifar_resnet20", "ResNet for small images, 0.28 M; options width, stem_stride"),
    "cifar_resnet32": Entry("kdbench.models.cifar_resnet:cifar_resnet32", "ResNet for small images, 0.47 M; options width, stem_stride"),
    "cifar_resnet44": Entry("kdbench.models.cifar_resnet:cifar_resnet44", "ResNet for small images, 0.67 M; options width, stem_stride"),
    "cifar_resnet56": Entry("kdbench.models.cifar_resnet:cifar_resnet56", "ResNet for small images, 0.86 M; options width, stem_stride"),
    "cifar_resnet110": Entry("kdbench.models.cifar_resnet:cifar_resnet110", "ResNet for small images, 1.74 M; options width, stem_stride"),
    "resnet8x4": Entry("kdbench.models.cifar_resnet:resnet8x4", "ResNet-8 four times as wide, 1.23 M; options width, stem_stride"),
    "resnet32x4": Entry("kdbench.models.cifar_resnet:resnet32x4", "ResNet-32 four times as wide, 7.43 M; options width, stem_stride"),
    "wrn_16_1": Entry("kdbench.models.cifar_resnet:wrn_16_1", "wide ResNet-16-1, 0.18 M; option stem_stride"),
    "wrn_16_2": Entry("kdbench.models.cifar_resnet:wrn_16_2", "wide ResNet-16-2, 0.70 M; option stem_stride"),
    "wrn_40_1": Entry("kdbench.models.cifar_resnet:wrn_40_1", "wide ResNet-40-1, 0.57 M; option stem_stride"),
    "wrn_40_2": Entry("kdbench.models.cifar_resnet:wrn_40_2", "wide ResNet-40-2, 2.26 M; option stem_stride"),
    "vgg8": Entry("kdbench.models.cifar_vgg:vgg8", "VGG-8 with batch norm for small images, 3.97 M"),
    "vgg13": Entry("kdbench.models.cifar_vgg:vgg13", "VGG-13 with batch norm for small images, 9.46 M"),
    "mobilenetv2_half": Entry("kdbench.models.cifar_mobile:mobilenetv2_half", "MobileNetV2 of width 0.5 for small images, 0.81 M"),
    "shufflenetv1": Entry("kdbench.models.cifar_mobile:shufflenetv1", "ShuffleNetV1 for small images, 0.95 M"),
    "shufflenetv2": Entry("kdbench.models.cifar_mobile:shufflenetv2", "ShuffleNetV2 for small images, 1.36 M"),
}
