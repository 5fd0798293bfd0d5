import torch

from anomalib_raad.initialization import start_in_closed_form_, train_autoencoder_


def test_losses_start_lower_and_inner_layers_stay(untrained) -> None:
    model, images = untrained
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        torch.manual_seed(1)  # both times the same augmentation
        random = [model.losses(image) for image in images]
        start_in_closed_form_(model, images, seed=0, autoencoder_steps=8)
        torch.manual_seed(1)
        solved = [model.losses(image) for image in images]
        energy = sum(model.autoencode(image, (24, 24)).square().mean() for image in images)
    st, ae = ([sum(getattr(losses, name) for losses in runs) for runs in (random, solved)] for name in ("st", "ae"))
    assert st[1] < 0.5 * st[0]
    assert ae[1] < ae[0]
    assert sum(losses.stae for losses in solved) < 0.5 * energy
    for name, parameter in model.named_parameters():
        changed = name.startswith(("student.conv4", "ae."))
        assert torch.equal(parameter, before[name]) != changed, name


def test_autoencoder_learns_the_same_in_autocast(untrained, monkeypatch) -> None:
    monkeypatch.setattr("anomalib_raad.initialization._AE_BATCH", 1)  # emulated bfloat16 takes seconds an image
    model, images = untrained
    start = {name: parameter.detach().clone() for name, parameter in model.ae.named_parameters()}
    moved = []
    for bfloat16 in (False, True):
        model.ae.load_state_dict(start, strict=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            train_autoencoder_(model, images, seed=0, steps=4)
        moved.append(torch.cat([(p - start[n]).flatten() for n, p in model.ae.named_parameters()]))
    assert torch.cosine_similarity(*moved, dim=0) > 0.9


def test_training_the_autoencoder_leaves_the_random_numbers_alone(untrained) -> None:
    model, images = untrained
    state = torch.get_rng_state()
    train_autoencoder_(model, images, seed=0, steps=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.ae.training
