"""One file per task. `TASKS` is the catalogue."""

from kdbench.catalogue import Entry

TASKS: dict[str, Entry] = {
    "classification": Entry("kdbench.tasks.classification:Classification", "one label per image; accuracy"),
    "segmentation": Entry("kdbench.tasks.segmentation:Segmentation", "one label per pixel; mean intersection over union"),
}
