"""One file per published method. `METHODS` is the catalogue: name -> where it is and what it does, written out by hand."""

from kdbench.catalogue import Entry

METHODS: dict[str, Entry] = {
    "none": Entry("kdbench.methods.none:Undistilled", "the undistilled student: the control on every board"),
}
