"""Fit a small Raad in one or two processes: FOLDER_OF_CELLS RESULTS PROCESSES IMAGES_PER_PROCESS [CLOSED_FORM]."""

import sys
from copy import deepcopy
from pathlib import Path

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import LambdaCallback

import anomalib_raad.raad.torch_model
from anomalib_raad import Raad

if __name__ == "__main__":
    cells, results, processes, batch_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    seed_everything(7)
    # Without anything random in a step, the number of processes makes no difference.
    anomalib_raad.raad.torch_model.augment = lambda images: images
    data = Folder(
        name="cells", root=cells, normal_dir="train", normal_test_dir="good", abnormal_dir="bad",
        train_batch_size=batch_size, eval_batch_size=2, num_workers=0, val_split_mode="same_as_test", seed=0,
    )  # fmt: skip
    model = Raad(
        pre_processor=Raad.configure_pre_processor((64, 64)), visualizer=False, closed_form=bool(sys.argv[5:]),
        lr=1e-4, finetune_lr=1e-4, bits=8,
    )  # fmt: skip
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    students = []  # before each step; the third is the first of stage 3
    keep = LambdaCallback(on_before_backward=lambda _, model, __: students.append(deepcopy(model.model.student)))
    engine = Engine(
        max_steps=4, devices=processes, strategy="ddp" if processes > 1 else "auto", accelerator="cpu", logger=False,
        default_root_dir=results, enable_progress_bar=False, callbacks=[keep],
    )  # fmt: skip
    engine.fit(model, datamodule=data)
    moved = {name: parameter.detach() - start[name] for name, parameter in model.named_parameters()}
    result = {"state": model.state_dict(), "moved": moved, "fine_tuned_from": students[2].state_dict()}
    torch.save(result, results / f"rank{engine.trainer.global_rank}.pt")
