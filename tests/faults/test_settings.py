"""Any settings: a model trains two steps, or an error names one of them. FAULT_ROUNDS=5 tries five times as many."""

import os
from pathlib import Path

import torch
from anomalib.models import Raad
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "1"))
WITHOUT_CHANCE = {"derandomize": True, "deadline": None, "database": None}
UNSHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

number = st.floats() | st.integers(-1, 10**9)
rate = st.sampled_from([1e-30, 1e-6, 1e-3, 1.0])
weight = st.sampled_from([0.0, 1e-30, 1.0, 1e30])
steps = st.integers(1, 100)
bits = st.sampled_from([2, 3, 4, 8])
VALID = {
    "padding": st.booleans(),
    "lr": rate,
    "lr_decay": st.floats(0, 1),
    "finetune_lr": rate,
    "weight_decay": weight,
    "train_steps": steps,
    "finetune_steps": steps,
    "p_hard": st.floats(0, 0.9999),
    "lambdas": st.tuples(weight, weight, weight),
    "normalize_maps": st.booleans(),
    "bits": st.none() | bits | st.dictionaries(st.sampled_from(["conv1", "conv2", "conv3", "conv4"]), bits),
    "average_bits": st.floats(2, 8),
    "first_last_bits": bits,
    "autoencoder_bits": bits,
    "hqs_thresholds": st.lists(st.floats(0.001, 0.999), min_size=3, max_size=3, unique=True).map(sorted).map(tuple),
    "reconstruction_iterations": st.integers(0, 1),
    "closed_form": st.booleans(),
    "held_out": st.floats(1e-9, 0.9999),
    "calibration_images": st.integers(1, 10),
}
ANY = {
    **{name: number for name in VALID if name not in {"bits", "hqs_thresholds", "lambdas"}},
    "model_size": st.text(max_size=8),
    "bits": number | st.dictionaries(st.sampled_from(["conv1", "conv2", "conv9"]), number),
    "hqs_thresholds": st.tuples(number, number, number),
    "lambdas": st.tuples(number, number, number),
}


def names_a_setting(error: Exception, options: dict) -> bool:
    return any(name in str(error) for name in options)


@settings(max_examples=20 * ROUNDS, **WITHOUT_CHANCE)
@given(options=st.fixed_dictionaries({}, optional=ANY))
def test_any_settings(options: dict) -> None:
    try:
        Raad(**options, visualizer=False)
    except ValueError as error:
        if not names_a_setting(error, options):
            raise


@settings(max_examples=2 * ROUNDS, suppress_health_check=UNSHARED, **WITHOUT_CHANCE)
@given(options=st.fixed_dictionaries({}, optional=VALID))
def test_valid_settings_train(cell_data, small_raad, engine, tmp_path, options: dict) -> None:
    runner = engine(max_steps=2, logger=False, default_root_dir=tmp_path / f"{len(list(tmp_path.iterdir()))}")
    try:
        runner.fit(small_raad(**options), datamodule=cell_data(val_split_mode="from_train", val_split_ratio=0.2))
    except (ValueError, FloatingPointError) as error:
        if not names_a_setting(error, VALID):
            raise
    for path in Path(runner.trainer.default_root_dir).rglob("*.ckpt"):
        state = Raad.load_from_checkpoint(path).model.state_dict()
        assert all(value.isfinite().all() for value in state.values() if isinstance(value, torch.Tensor)), path
