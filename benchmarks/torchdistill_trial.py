"""torchdistill's side of the comparisons: a process of its own environment that does as it is told, a line of JSON at a time.

It reads a job (a JSON file named on the command line), builds what torchdistill's own example scripts build, a `DistillationBox` with
`KDLoss` over a DataLoader of PIL images, answers `ready`, and then obeys one order a line: `steps`, `threads`, `partial`, `sweep`, `stop`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.pil_images import PilImages, usual_transform
from kdbench.models.build import ModelSpec, build_model


class Peer:
    """One teacher, the images, and whatever box is being trained."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job = job
        arrays = np.load(job["images"])
        self.images = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        transform = usual_transform(self.images["train"].shape[-1], job["crop"], job["flip"], job["mean"], job["std"])
        self.train = PilImages(self.images["train"], self.images["train_labels"], transform)
        self.teacher = self.network(job["teacher"], job["teacher_weights"])
        self.box: Any = None
        self.batches: Iterator[Any] = iter(())

    def network(self, spec: Mapping[str, Any], weights: str | None = None) -> nn.Module:
        size = self.images["train"].shape[-1]
        described = ModelSpec.model_validate({**spec, "weights": weights})
        facts = {"num_classes": self.job["classes"], "in_channels": self.images["train"].shape[1], "image_size": size}
        return build_model(described, **facts, mean=self.job["mean"], std=self.job["std"])

    def begin(self, seed: int = 0, temperature: float = 4.0, kd_weight: float = 0.9) -> None:
        """A fresh student in a fresh box, as at the start of a trial."""
        from torch.utils.data import RandomSampler
        from torchdistill.core.distillation import DistillationBox

        torch.manual_seed(seed)
        job = self.job
        settings = {"lr": job["lr"], "momentum": job["momentum"], "weight_decay": job["weight_decay"]}
        steps = len(self.train) // job["batch_size"]
        loss = {
            "student_module_path": ".",
            "student_module_io": "output",
            "teacher_module_path": ".",
            "teacher_module_io": "output",
            "temperature": temperature,
            "alpha": job["task_weight"],
            "beta": kd_weight,
            "reduction": "batchmean",
        }
        config = {
            "num_epochs": job["epochs"],
            "train_data_loader": {
                "dataset_id": "train",
                "sampler": {"class_or_func": RandomSampler, "kwargs": {}},
                "kwargs": {"batch_size": job["batch_size"], "drop_last": True, "num_workers": 0},
            },
            "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
            "student": {"forward_proc": "forward_batch_only"},
            "optimizer": {"key": "SGD", "kwargs": settings},
            "scheduler": {"key": "CosineAnnealingLR", "kwargs": {"T_max": job["epochs"] * steps}, "scheduling_step": 1},
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {"sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": loss}, "weight": 1.0}}},
            },
        }
        self.teacher.eval()
        student = self.network(job["student"])
        self.box = DistillationBox(self.teacher, student, {"train": self.train}, config, torch.device("cpu"), None, False, 1.0)
        self.batches = iter(())

    def epoch(self, number: int) -> Iterator[None]:
        """torchdistill's example loop, a step at a time."""
        self.box.pre_epoch_process(epoch=number)
        self.teacher.eval()
        for images, labels, supplement in self.box.train_data_loader:
            loss = self.box.forward_process(images, labels, supplement)
            self.box.post_forward_process(loss)
            yield
        self.box.post_epoch_process()

    def steps(self, count: int) -> int:
        """`count` optimizer steps, over as many epochs as that takes. Returns the images seen."""
        for _ in range(count):
            while next(self.batches, self) is self:
                self.batches = self.epoch(0)
        return count * int(self.job["batch_size"])

    @torch.no_grad()
    def validate(self) -> float:
        """Accuracy in percent on the validation images, which come as tensors: to the peer's advantage."""
        student = self.box.student_model.eval()
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (self.job["mean"], self.job["std"]))
        images: Tensor = self.images["val"]
        right = 0
        for rows in torch.arange(len(images)).split(512):
            scores = student((images[rows].float() / 255 - mean) / std)
            right += int((scores.argmax(1) == self.images["val_labels"][rows]).sum())
        return 100 * right / len(images)

    def trial(self, seed: int, temperature: float, kd_weight: float) -> float:
        """A whole trial; returns the last epoch's validation accuracy."""
        self.begin(seed, temperature, kd_weight)
        value = float("nan")
        for number in range(self.job["epochs"]):
            for _ in self.epoch(number):
                pass
            value = self.validate()
        return value

    def sweep(self, trials: int, seed: int, space: Mapping[str, list[Any]]) -> list[float]:
        """Trials of an Optuna study with a TPE sampler; each one's validation accuracy."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        study.enqueue_trial({"temperature": 4.0, "kd_weight": 0.9})

        def objective(trial: Any) -> float:
            values = {name: trial.suggest_float(name, low, high, log=log) for name, (low, high, log) in space.items()}
            return self.trial(1000 * seed + trial.number, **values)

        study.optimize(objective, n_trials=trials)
        return [trial.value for trial in study.trials if trial.value is not None]


def obey(peer: Peer, order: Mapping[str, Any]) -> dict[str, Any]:
    """Do one order; the answer holds what it took and what came of it."""
    wall, cpu = time.perf_counter(), time.process_time()
    found: dict[str, Any] = {}
    match order["do"]:
        case "threads":
            torch.set_num_threads(order["count"])
        case "begin":
            peer.begin()
        case "steps":
            found["samples"] = peer.steps(order["count"])
        case "validate":
            found["accuracy"] = peer.validate()
        case "sweep":
            found["values"] = peer.sweep(order["trials"], order["seed"], order["space"])
        case unknown:
            raise ValueError(f"no such order: {unknown}")
    return found | {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def main() -> None:
    logging.disable(logging.WARNING)
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever torchdistill prints is not an answer
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    peer = Peer(job)
    peer.begin()
    peer.steps(1)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(obey(peer, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
