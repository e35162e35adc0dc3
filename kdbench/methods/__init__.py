"""One file per published method. `METHODS` is the catalogue: name -> where it is and what it does, written out by hand."""

from kdbench.catalogue import Entry

METHODS: dict[str, Entry] = {
    "none": Entry("kdbench.methods.none:Undistilled", "the undistilled student: the control on every board"),
    "label_smoothing": Entry("kdbench.methods.label_smoothing:LabelSmoothing", "labels mixed with the uniform distribution; no teacher"),
    "kd": Entry("kdbench.methods.kd:KD", "the teacher's softened class probabilities (Hinton et al., 2015)"),
    "nkd": Entry("kdbench.methods.nkd:NKD", "the label's probability, and the other classes normalised among themselves (ICCV 2023)"),
    "dkd": Entry("kdbench.methods.dkd:DKD", "the label and the other classes as two losses with weights of their own (CVPR 2022)"),
    "fitnet": Entry("kdbench.methods.fitnet:FitNet", "the teacher's features at a middle stage, through a regressor (ICLR 2015)"),
    "ofa": Entry(
        "kdbench.methods.ofa:OneForAll",
        "exits of any student learn the logits of any teacher (NeurIPS 2023)",
    ),
    "scalekd": Entry("kdbench.methods.scalekd:ScaleKD", "features in two views, as the teacher itself goes on with them (NeurIPS 2024)"),
    "vitkd": Entry("kdbench.methods.vitkd:ViTKD", "a transformer's first blocks imitated, its last features generated (2022)"),
    "tf_nkd": Entry("kdbench.methods.tf_nkd:TeacherFreeNKD", "the student's own confidence as a soft target; no teacher (2022)"),
}
