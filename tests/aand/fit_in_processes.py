"""Fit a small Aand in two processes: FOLDER_OF_CELLS RESULTS STRATEGY."""

import sys
from pathlib import Path

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import seed_everything

from anomalib_raad import Aand

if __name__ == "__main__":
    cells, results = sys.argv[1], Path(sys.argv[2])
    seed_everything(7)
    data = Folder(
        name="cells", root=cells, normal_dir="train", normal_test_dir="good", abnormal_dir="bad",
        train_batch_size=1, eval_batch_size=2, num_workers=0, val_split_mode="same_as_test", seed=0,
    )  # fmt: skip
    model = Aand(pre_processor=Aand.configure_pre_processor((64, 64)), visualizer=False, amplify=True)
    engine = Engine(
        max_steps=5, devices=2, strategy=sys.argv[3], accelerator="cpu", logger=False,
        default_root_dir=results, enable_progress_bar=False,
    )  # fmt: skip
    engine.fit(model, datamodule=data)
    torch.save([model.state_dict(), list(model.record.stages)], results / f"rank{engine.trainer.global_rank}.pt")
