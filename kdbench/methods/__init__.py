"""One file per published method. `METHODS` is the catalogue: name -> where it is and what it does, written out by hand."""

from kdbench.catalogue import Entry

METHODS: dict[str, Entry] = {
    "none": Entry("kdbench.methods.none:Undistilled", "the undistilled student: the control on every board"),
    "label_smoothing": Entry("kdbench.methods.label_smoothing:LabelSmoothing", "labels mixed with the uniform distribution; no teacher"),
    "kd": Entry("kdbench.methods.kd:KD", "the teacher's softened class probabilities (Hinton et al., 2015)"),
    "nkd": Entry("kdbench.methods.nkd:NKD", "the label's probability, and the other classes normalised among themselves (ICCV 2023)"),
    "dkd": Entry("kdbench.methods.dkd:DKD", "the label and the other classes as two losses with weights of their own (CVPR 2022)"),
    "wsld": Entry("kdbench.methods.wsld:WSLD", "soft labels, more of them where the teacher knows more than the student (ICLR 2021)"),
    "dist": Entry("kdbench.methods.dist:DIST", "the teacher's ranking of classes and of samples, by correlation (NeurIPS 2022)"),
    "ctkd": Entry("kdbench.methods.ctkd:CTKD", "kd at a temperature that learns to make it harder (AAAI 2023)"),
    "logit_std": Entry("kdbench.methods.logit_std:LogitStandardisation", "kd between z-scores of the logits (CVPR 2024)"),
    "fitnet": Entry("kdbench.methods.fitnet:FitNet", "the teacher's features at a middle stage, through a regressor (ICLR 2015)"),
    "at": Entry("kdbench.methods.at:AT", "where the teacher looks: attention maps of every stage (ICLR 2017)"),
    "ab": Entry("kdbench.methods.ab:AB", "for which inputs the teacher's units are active, at every stage (AAAI 2019)"),
    "cwd": Entry("kdbench.methods.cwd:CWD", "where each channel of a dense prediction, or of features, has its weight (ICCV 2021)"),
    "fgd": Entry("kdbench.methods.fgd:FGD", "a detector's features at its objects and behind them, and how positions relate (CVPR 2022)"),
    "fsp": Entry("kdbench.methods.fsp:FSP", "how the teacher's features change from stage to stage (CVPR 2017)"),
    "ft": Entry("kdbench.methods.ft:FT", "a paraphrase of the teacher's features that an autoencoder learns (NeurIPS 2018)"),
    "mgd": Entry("kdbench.methods.mgd:MGD", "the teacher's features generated from the student's, a part of them hidden (ECCV 2022)"),
    "nst": Entry("kdbench.methods.nst:NST", "which places of an image the teacher's channels select, at every stage (2017)"),
    "pkd": Entry("kdbench.methods.pkd:PKD", "the teacher's features by their correlation, at every stage (NeurIPS 2022)"),
    "vid": Entry("kdbench.methods.vid:VID", "information about the teacher's features, as a learned Gaussian around them (CVPR 2019)"),
    "sp": Entry("kdbench.methods.sp:SP", "which samples of a batch look alike (ICCV 2019)"),
    "rkd": Entry("kdbench.methods.rkd:RKD", "distances and angles between the samples of a batch (CVPR 2019)"),
    "pkt": Entry("kdbench.methods.pkt:PKT", "which samples of a batch are each other's neighbours, as probabilities (ECCV 2018)"),
    "cc": Entry("kdbench.methods.cc:CC", "embeddings of samples that follow each other in a batch (ICCV 2019)"),
    "crd": Entry("kdbench.methods.crd:CRD", "telling a sample's embedding from those of other classes, kept in a memory (ICLR 2020)"),
    "ofa": Entry(
        "kdbench.methods.ofa:OneForAll",
        "exits of any student learn the logits of any teacher (NeurIPS 2023)",
    ),
    "scalekd": Entry("kdbench.methods.scalekd:ScaleKD", "features in two views, as the teacher itself goes on with them (NeurIPS 2024)"),
    "vitkd": Entry("kdbench.methods.vitkd:ViTKD", "a transformer's first blocks imitated, its last features generated (2022)"),
    "adain": Entry(
        "kdbench.methods.adain:AdaIN", "the teacher judges its features in the student's channel statistics; after the paper (2020)"
    ),
    "kdsvd": Entry("kdbench.methods.kdsvd:KDSVD", "how the singular vectors of consecutive stages relate (ECCV 2018)"),
    "norm": Entry("kdbench.methods.norm:NORM", "the teacher's last map many times over, in a layer that is folded away (ICLR 2023)"),
    "ofd": Entry("kdbench.methods.ofd:OFD", "features before their activation, beyond a margin where they are negative (ICCV 2019)"),
    "srrl": Entry("kdbench.methods.srrl:SRRL", "the teacher's classifier reads the student's last features (ICLR 2021)"),
    "reviewkd": Entry("kdbench.methods.reviewkd:ReviewKD", "each stage of the teacher from the student's same and deeper ones (CVPR 2021)"),
    "tf_nkd": Entry("kdbench.methods.tf_nkd:TeacherFreeNKD", "the student's own confidence as a soft target; no teacher (2022)"),
    "ffsd": Entry("kdbench.methods.ffsd:FFSD", "a leader and students that learn together, and a fusion of them; no teacher (2021)"),
    "uskd": Entry("kdbench.methods.uskd:USKD", "soft labels from the student and from a weak head on its middle; no teacher (ICCV 2023)"),
}
