"""Cut kdbench/data/fashion_mnist_embedded.parquet from the full Fashion-MNIST: the same images whenever it is run.

    python scripts/make_embedded_fashion_mnist.py

Prints the file's size and SHA-256, which belong into kdbench/data/fashion_mnist.py.
"""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq

from kdbench.data.batch import Part
from kdbench.data.fashion_mnist import EMBEDDED, SIDE, full_parts
from kdbench.data.splits import stratified

SEED = 0
SIZES = {"train": 12_000, "test": 2_000}
ORIGIN = {
    "title": "Fashion-MNIST, a stratified subset of 12,000 training and 2,000 test images",
    "origin": "https://github.com/zalandoresearch/fashion-mnist",
    "citation": "Xiao, Rasul & Vollgraf: Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, "
    "arXiv 1708.07747",
    "license": "MIT, Copyright (c) 2017 Zalando SE, https://tech.zalando.com; full text in FASHION_MNIST.md",
}


def rows_of(split: str, part: Part) -> pa.Table:
    images = pa.array([image.numpy().tobytes() for image in part.inputs], pa.binary(SIDE * SIDE))
    return pa.table(
        {
            "split": pa.array([split] * len(part)).dictionary_encode(),
            "source_index": pa.array(part.index.numpy(), pa.int32()),
            "label": pa.array(part.target.numpy(), pa.uint8()),
            "image": images,
        }
    )


def main() -> None:
    tables = []
    for (split, size), part in zip(SIZES.items(), full_parts(), strict=True):
        chosen, _ = stratified(part.target, size, SEED)
        tables.append(rows_of(split, part.select(chosen)))
    table = pa.concat_tables(tables, promote_options="permissive").replace_schema_metadata(ORIGIN)
    # One page for all pixels: Brotli then finds the likeness between images. Filtering each of them first, as PNG does, was no smaller.
    pq.write_table(
        table,
        EMBEDDED,
        compression="brotli",
        compression_level=11,
        use_dictionary=["split"],
        write_statistics=False,
        data_page_size=1 << 26,
        write_batch_size=len(table),
    )
    content = EMBEDDED.read_bytes()
    print(f"{EMBEDDED}: {len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
