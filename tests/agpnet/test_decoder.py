import pytest
import torch

from anomalib_raad.agpnet.attention import received_attention
from anomalib_raad.agpnet.decoder import Decoder, positions


def make_decoder(**options) -> Decoder:
    torch.manual_seed(0)
    return Decoder(**({"channels": 6, "width": 16, "depth": 2, "heads": 4} | options)).eval()


def test_it_gives_a_map_of_the_same_shape() -> None:
    assert make_decoder()(torch.randn(2, 6, 3, 5)).shape == (2, 6, 3, 5)


def test_attention_is_the_mean_of_what_the_blocks_receive() -> None:
    decoder, features, inputs = make_decoder(), torch.randn(2, 6, 3, 5), []
    for block in decoder.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    decoder(features)
    received = [received_attention(block.attn, tokens) for block, tokens in zip(decoder.blocks, inputs, strict=True)]
    found = decoder.attention(features)
    torch.testing.assert_close(found.flatten(1), torch.stack(received).mean(0))
    assert found.shape == (2, 1, 3, 5)


def test_cells_keep_their_places() -> None:
    decoder, features = make_decoder(depth=0), torch.randn(1, 6, 3, 5)
    changed = features.clone()
    changed[0, :, 1, 4] += 1
    moved = (decoder(features) != decoder(changed)).any(1)[0]
    assert moved.nonzero().tolist() == [[1, 4]]


def test_positions_tell_rows_and_columns_apart() -> None:
    code = positions(3, 5, 16, torch.device("cpu")).view(3, 5, 16)
    assert len(code.flatten(0, 1).unique(dim=0)) == 15
    torch.testing.assert_close(code[1, 2, :4], (1e4 ** (-torch.arange(4) / 4)).sin())
    torch.testing.assert_close(code[1, 2, 12:], (2 * 1e4 ** (-torch.arange(4) / 4)).cos())


def test_width__error() -> None:
    with pytest.raises(ValueError, match="decoder_width is 18; a multiple of 4 and of decoder_heads, 4, is needed"):
        make_decoder(width=18)


def test_the_papers_size() -> None:
    # 3.16 million in blocks of width 256, 0.2 million in the layers from and to the 384 channels of ViT-S.
    assert sum(p.numel() for p in Decoder(384).parameters()) == 3_356_800
