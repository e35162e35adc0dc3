"""Data sets that fit in memory. `DATA` is the catalogue: name -> the function that makes the `Source`, and what it is."""

from kdbench.catalogue import Entry

DATA: dict[str, Entry] = {
    "fashion_mnist": Entry(
        "kdbench.data.fashion_mnist:fashion_mnist",
        "grey clothes 28x28, 10 classes; 14,000 images ship, all 70,000 with size: full",
    ),
    "shapes": Entry("kdbench.data.shapes:shapes", "coloured geometric shapes on a noisy ground, drawn from a seed; masks or classes"),
}
