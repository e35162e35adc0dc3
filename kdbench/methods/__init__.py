"""One file per published method. `METHODS` is the catalogue: name -> where it is and what it does, written out by hand."""

from kdbench.catalogue import Entry

METHODS: dict[str, Entry] = {
    "none": Entry("kdbench.methods.none:Undistilled", "the undistilled student: the control on every board"),
    "label_smoothing": Entry("kdbench.methods.label_smoothing:LabelSmoothing", "labels mixed with the uniform distribution; no teacher"),
    "kd": Entry("kdbench.methods.kd:KD", "the teacher's softened class probabilities (Hinton et al., 2015)"),
    "nkd": Entry("kdbench.methods.nkd:NKD", "the label's probability, and the other classes normalised among themselves (ICCV 2023)"),
    "dkd": Entry("kdbench.methods.dkd:DKD", "the label and the other classes as two losses with weights of their own (CVPR 2022)"),
    "fitnet": Entry("kdbench.methods.fitnet:FitNet", "the teacher's features at a middle stage, through a regressor (ICLR 2015)"),
    "adain": Entry(
        "kdbench.methods.adain:AdaIN", "the teacher judges its features in the student's channel statistics; after the paper (2020)"
    ),
    "kdsvd": Entry("kdbench.methods.kdsvd:KDSVD", "how the singular vectors of consecutive stages relate (ECCV 2018)"),
    "norm": Entry("kdbench.methods.norm:NORM", "the teacher's last map many times over, in a layer that is folded away (ICLR 2023)"),
    "ofd": Entry("kdbench.methods.ofd:OFD", "features before their activation, beyond a margin where they are negative (ICCV 2019)"),
    "srrl": Entry("kdbench.methods.srrl:SRRL", "the teacher's classifier reads the student's last features (ICLR 2021)"),
    "reviewkd": Entry("kdbench.methods.reviewkd:ReviewKD", "each stage of the teacher from the student's same and deeper ones (CVPR 2021)"),
    "tf_nkd": Entry("kdbench.methods.tf_nkd:TeacherFreeNKD", "the student's own confidence as a soft target; no teacher (2022)"),
}
