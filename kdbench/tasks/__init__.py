"""One file per task. `TASKS` is the catalogue."""

from kdbench.catalogue import Entry

TASKS: dict[str, Entry] = {
    "classification": Entry("kdbench.tasks.classification:Classification", "one label per image; accuracy"),
    "detection": Entry("kdbench.tasks.detection:Detection", "boxes of the objects in an image; average precision"),
    "instance_masks": Entry("kdbench.tasks.instance_masks:InstanceMasks", "the pixels of each object in an image; average precision"),
    "image_text": Entry("kdbench.tasks.image_text:ImageText", "images and texts that find each other; recall at 1"),
    "multi_label": Entry("kdbench.tasks.multi_label:MultiLabel", "any number of labels an image; mean average precision"),
    "segmentation": Entry("kdbench.tasks.segmentation:Segmentation", "one label per pixel; mean intersection over union"),
}
