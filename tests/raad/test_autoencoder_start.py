import torch

from anomalib_raad.raad.autoencoder_start import train_autoencoder_


def test_only_the_autoencoder_learns(untrained) -> None:
    model, images = untrained
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(1)  # both times the same augmentation
    with torch.no_grad():
        random = sum(model.losses(image).ae for image in images)
    train_autoencoder_(model, images, map(model.teacher, images), seed=0, steps=8, batch_size=2)
    torch.manual_seed(1)
    with torch.no_grad():
        assert sum(model.losses(image).ae for image in images) < random
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("ae."), name


def test_autoencoder_learns_the_same_in_autocast(untrained) -> None:
    model, images = untrained
    start = {name: parameter.detach().clone() for name, parameter in model.ae.named_parameters()}
    moved = []
    for bfloat16 in (False, True):
        model.ae.load_state_dict(start, strict=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            # One image a step: emulated bfloat16 takes seconds for each.
            train_autoencoder_(model, images, map(model.teacher, images), seed=0, steps=4, batch_size=1)
        moved.append(torch.cat([(p - start[n]).flatten() for n, p in model.ae.named_parameters()]))
    assert torch.cosine_similarity(*moved, dim=0) > 0.9


def test_training_the_autoencoder_leaves_the_random_numbers_alone(untrained) -> None:
    model, images = untrained
    state = torch.get_rng_state()
    train_autoencoder_(model, images, map(model.teacher, images), seed=0, steps=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.ae.training
