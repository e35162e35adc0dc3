"""Data sets, in memory or in files. `DATA` is the catalogue: name -> the function that makes the `Source`, and what it is."""

from kdbench.catalogue import Entry

DATA: dict[str, Entry] = {
    "fashion_mnist": Entry(
        "kdbench.data.fashion_mnist:fashion_mnist",
        "grey clothes 28x28, 10 classes; 14,000 images ship, all 70,000 with size: full",
    ),
    "cifar100": Entry("kdbench.data.cifar:cifar100", "colour photographs 32x32, 100 classes, 60,000 images; from disk or downloaded"),
    "shapes": Entry("kdbench.data.shapes:shapes", "coloured geometric shapes on a noisy ground, drawn from a seed; every target by option"),
    "stamps": Entry(
        "kdbench.data.stamps:stamps", "cut-outs of real objects on photographs, drawn from a seed; from the Debian packages that have them"
    ),
    "imagenet": Entry("kdbench.data.imagenet:imagenet", "ILSVRC 2012: photographs in 1000 classes, 1,331,167 images; from your own copy"),
    "image_folder": Entry(
        "kdbench.data.image_folder:image_folder", "your image files in ImageNet's layout: train/<class>/* and val/<class>/*"
    ),
    "coco": Entry(
        "kdbench.data.coco:coco", "pictures annotated in COCO's JSON: boxes, masks, keypoints or several labels; from your own copy"
    ),
    "voc": Entry("kdbench.data.voc:voc", "pictures in PASCAL VOC's layout: boxes, labels per pixel or several labels; from your own copy"),
    "yolo": Entry("kdbench.data.yolo:yolo", "your own boxes in YOLO's text folders: images/, labels/ and data.yaml"),
    "masks_folder": Entry(
        "kdbench.data.masks_folder:masks_folder",
        "your pictures with a file of labels per pixel each; label maps of Cityscapes, ADE20K, CamVid and COCO-Stuff",
    ),
    "parquet": Entry("kdbench.data.parquet:parquet", "your images in Parquet files: a column of encoded images and one of labels"),
}
