import pytest
import torch
from timm.models import create_model
from timm.models.vision_transformer import Block

from anomalib_raad.agpnet.attention import received_attention


@pytest.fixture
def layer() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Block(24, 3, qkv_bias=True, qk_norm=True).attn.eval(), torch.randn(2, 7, 24)


def test_it_equals_the_matrix_that_is_computed_token_by_token(layer) -> None:
    attention, tokens = layer
    found = received_attention(attention, tokens)
    query, key, _ = attention.qkv(tokens).reshape(2, 7, 3, 3, 8).unbind(2)
    query, key = attention.q_norm(query), attention.k_norm(key)
    for image in range(2):
        received = torch.zeros(7)
        for head in range(3):
            for asking in range(7):
                logits = torch.tensor([(query[image, asking, head] @ key[image, k, head]).item() for k in range(7)])
                received += (logits / 8**0.5).softmax(0) / 21
        torch.testing.assert_close(found[image], received)
    torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_it_is_the_attention_of_the_layer_itself(layer) -> None:
    attention, tokens = layer
    attention.fused_attn = False
    matrices = []
    attention.attn_drop.register_forward_hook(lambda module, args, output: matrices.append(args[0]))
    attention(tokens)
    (matrix,) = matrices
    torch.testing.assert_close(received_attention(attention, tokens), matrix.mean((1, 2)))
    torch.testing.assert_close(received_attention(attention, tokens, slice(1)), matrix[:, :, 0].mean(1))


def test_the_fused_kernel_and_the_plain_formula_agree(layer) -> None:
    attention, tokens = layer
    fused = attention(tokens)
    attention.fused_attn = False
    torch.testing.assert_close(attention(tokens), fused)


def test_a_network_with_registers() -> None:
    net = create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=28, depth=2, embed_dim=24, num_heads=3)
    tokens = torch.randn(1, net.num_prefix_tokens + 4, 24)
    assert received_attention(net.blocks[0].attn, tokens, slice(1)).shape == (1, 9)
