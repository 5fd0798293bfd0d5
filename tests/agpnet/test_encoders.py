import pytest
import timm
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_raad.agpnet.attention import received_attention
from anomalib_raad.agpnet.encoders import CnnEncoder, VitEncoder, build_encoder, is_vit, layer_norm, without_border
from anomalib_raad.teacher.backbones import OFFLINE_BACKBONE

TINY = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def vit() -> VitEncoder:
    torch.manual_seed(0)
    return VitEncoder(TINY, (1, 4), (64, 96)).eval()


@pytest.fixture(scope="module")
def cnn() -> CnnEncoder:
    encoder = CnnEncoder(OFFLINE_BACKBONE, (1, 2, 3)).eval()
    encoder.load_(None)
    return encoder


@torch.no_grad()
def test_features_are_the_sum_of_normalized_blocks(vit) -> None:
    torch.manual_seed(1)
    image = torch.rand(2, 3, 64, 96)
    outputs = []
    hooks = [vit.net.blocks[n].register_forward_hook(lambda module, args, out: outputs.append(out)) for n in (1, 4)]
    found = vit(image)
    for hook in hooks:
        hook.remove()
    expected = sum(F.layer_norm(tokens[:, 1:], (192,), eps=1e-6) for tokens in outputs)
    torch.testing.assert_close(found, expected.mT.reshape(2, 192, 4, 6), rtol=1e-4, atol=1e-4)
    assert 2 < found.var(1, correction=0).mean() <= 4 + 1e-3  # two levels of variance 1, alike to some extent


@torch.no_grad()
def test_the_prior_is_the_class_tokens_attention_to_the_patches(vit) -> None:
    image, tokens = torch.rand(1, 3, 64, 96), []
    hooks = [
        vit.net.blocks[n].attn.register_forward_pre_hook(lambda module, args: tokens.append(args[0])) for n in (1, 4)
    ]
    features, prior = vit.encode(image, with_prior=True)
    for hook in hooks:
        hook.remove()
    rows = [received_attention(vit.net.blocks[n].attn, t, slice(1)) for n, t in zip((1, 4), tokens, strict=True)]
    expected = torch.stack(rows).mean(0)
    torch.testing.assert_close(prior.flatten(), expected[0, 1:])  # dropped, not normalised again
    assert prior.sum() < 1
    torch.testing.assert_close(features, vit(image))
    assert not any(block.attn._forward_pre_hooks for block in vit.net.blocks)


@torch.no_grad()
def test_rows_and_columns_of_the_prior(vit) -> None:
    image = torch.zeros(1, 3, 64, 96)
    plain = vit.encode(image, with_prior=True).prior
    image[..., 16:32, 80:] = 1  # the patch in row 1, column 5
    change = (vit.encode(image, with_prior=True).prior - plain).abs()[0, 0]
    assert divmod(int(change.argmax()), 6) == (1, 5)


def test_without_a_prior_no_hooks_run(vit) -> None:
    assert vit.encode(torch.rand(1, 3, 64, 96), with_prior=False).prior.abs().max() == 0


def test_another_size(vit) -> None:
    encoder = VitEncoder(TINY, (1, 4), (64, 96))
    encoder.set_size_((32, 32))
    assert encoder(torch.rand(1, 3, 32, 32)).shape == (1, 192, 2, 2)
    with pytest.raises(ValueError, match=r"image size is \(40, 64\); .* needs multiples of its patches, 16x16"):
        encoder.set_size_((40, 64))


def test_weights_from_a_file(tmp_path) -> None:
    torch.manual_seed(2)
    source = timm.create_model(TINY)
    torch.save(source.state_dict(), tmp_path / "vit.pt")
    encoder = VitEncoder(TINY, (1, 4), (224, 224))
    encoder.load_(tmp_path / "vit.pt")
    torch.testing.assert_close(encoder.net.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)
    torch.testing.assert_close(encoder.net.pos_embed, source.pos_embed)
    small = VitEncoder(TINY, (1, 4), (64, 96))
    small.load_(tmp_path / "vit.pt")  # positions are resampled
    assert small.net.pos_embed.shape == (1, 25, 192)


@torch.no_grad()
def test_layer_norm_does_not_depend_on_scale_and_shift() -> None:
    features = torch.randn(2, 30, 3, 4)
    normal = layer_norm(features)
    torch.testing.assert_close(layer_norm(5 * features + 2), normal)
    torch.testing.assert_close(normal.var(1, correction=0), torch.ones(2, 3, 4))
    torch.testing.assert_close(normal, F.layer_norm(features.permute(0, 2, 3, 1), (30,), eps=1e-6).permute(0, 3, 1, 2))


@torch.no_grad()
def test_levels_of_a_cnn_lie_over_each_other(cnn) -> None:
    image = torch.full((1, 3, 128, 192), 0.5)
    plain = cnn(image)
    image[..., 72:76, 136:140] = 1  # within row 4, column 8 of stride 16
    change = (cnn(image) - plain).square()
    assert plain.shape == (1, 24 + 40 + 112, 8, 12)
    for level in change.split([24, 40, 112], 1):
        assert divmod(int(level.sum(1).argmax()), 12) == (4, 8)


@torch.no_grad()
def test_the_activation_prior_ignores_the_scale_of_channels(cnn) -> None:
    torch.manual_seed(3)
    images = [torch.rand(1, 3, 64, 64) for _ in range(3)]
    cnn.set_statistics_(iter(images))
    levels = [torch.cat(level) for level in zip(*(cnn._levels(image) for image in images), strict=True)]
    first = levels[0]
    torch.testing.assert_close(cnn.means[:24], first.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cnn.deviations[:24], first.std((0, 2, 3), correction=0), rtol=1e-3, atol=1e-3)
    prior = cnn.encode(images[0], with_prior=True).prior
    assert 0 <= prior.min() < prior.max() <= 1
    factors = torch.rand(24, 1, 1) + 0.5
    original, cnn._levels = cnn._levels, lambda image: [factors * original(image)[0], *original(image)[1:]]
    try:
        cnn.set_statistics_(iter(images))
        torch.testing.assert_close(cnn.encode(images[0], with_prior=True).prior, prior, rtol=1e-3, atol=1e-3)
    finally:
        del cnn._levels


def test_cells_at_the_border_take_their_neighbours_value() -> None:
    response = torch.arange(16.0).view(1, 1, 4, 4)
    expected = [[5, 5, 6, 6], [5, 5, 6, 6], [9, 9, 10, 10], [9, 9, 10, 10]]
    assert without_border(response)[0, 0].tolist() == expected
    assert without_border(response[..., :2, :]).shape == (1, 1, 2, 4)


def test_what_a_backbone_is() -> None:
    assert is_vit("vit_small_patch16_224.dino")
    assert not is_vit(OFFLINE_BACKBONE)
    assert not is_vit("resnet18")
    assert build_encoder(TINY, None, (32, 32)).layers == (2, 5, 8, 11)
    assert build_encoder(OFFLINE_BACKBONE, None, (32, 32)).layers == (1, 2, 3)


@pytest.mark.parametrize(
    ("name", "layers", "size", "message"),
    [
        (TINY, (2, 12), (64, 64), r"layers are \(2, 12\); vit_tiny_patch16_224 has blocks 0 to 11"),
        (TINY, (2,), (60, 64), r"image size is \(60, 64\); vit_tiny_patch16_224 needs multiples of its patches, 16x16"),
        ("vit_base_patch16_siglip_224", (2,), (64, 64), "has no class token, whose attention is the prior"),
        ("no_such_net", None, (64, 64), "timm has no backbone 'no_such_net'"),
        (OFFLINE_BACKBONE, (7,), (64, 64), r"has no feature maps \(7,\)"),
    ],
)
def test_what_does_not_fit__error(name: str, layers, size, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_encoder(name, layers, size)
