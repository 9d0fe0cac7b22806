"""FLOPs of decoder layers in closed form: plain ones, and those that run under a layer plan.

A multiplication and its addition are two FLOPs. Matrix products count, causal attention counts full, and what is
smaller by orders of magnitude (norms, activations, rotary tables) does not. Lengths are in tokens of the decoder.
"""

from transformers.configuration_utils import PreTrainedConfig


def layer_flops(queries: int, keys: int, width: int, heads: int, kv_heads: int, mlp: int) -> int:
    """FLOPs of one transformer layer.

    Args:
        queries: tokens that are updated.
        keys: tokens that they attend to.
        width: channels of the hidden states.
        heads, kv_heads: channels of the queries, and of the keys.
        mlp: FLOPs of the MLP a token.
    """
    projections = 2 * 2 * queries * width * (heads + kv_heads)
    return projections + 2 * 2 * queries * keys * heads + queries * mlp


class LayerCost:
    """FLOPs of the layers of a decoder, which its branches share in kind, and of its output layer.

    Args:
        text: the decoder's configuration.
    """

    def __init__(self, text: PreTrainedConfig):
        self.hidden, self.vocabulary = text.hidden_size, text.vocab_size
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.head_dim = getattr(text, "head_dim", None) or self.hidden // self.heads
        self.mlp = 3 * 2 * self.hidden * text.intermediate_size

    def layer(self, queries: int, keys: int) -> int:
        """A layer that updates `queries` tokens, which attend to `keys` tokens."""
        heads, kv_heads = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return layer_flops(queries, keys, self.hidden, heads, kv_heads, self.mlp)

    def keys_and_values(self, tokens: int) -> int:
        """Keys and values of tokens that a layer does not update."""
        return 2 * 2 * tokens * self.hidden * self.kv_heads * self.head_dim

    def of_all(self, tokens: int) -> int:
        """A layer that updates every token."""
        return self.layer(tokens, tokens)

    def of_last(self, tokens: int, known: int = 0) -> int:
        """A layer of which only the last token is read.

        Args:
            tokens: tokens that run.
            known: tokens in front of them, whose keys and values are at hand.
        """
        return self.keys_and_values(tokens - 1) + self.layer(1, known + tokens)

    def of_text(self, before: int, visual: int, after: int) -> int:
        """A layer that updates text, and of visual tokens only makes keys and values (a light branch).

        Args:
            before, after: tokens before the image, and behind it. A prompt that ends in its image asks with the last
                visual token, which is updated.
        """
        if not after:
            visual, after = visual - 1, 1
        return self.layer(before, before) + self.keys_and_values(visual) + self.layer(after, before + visual + after)

    def scorer(self, visual: int) -> int:
        """The region map: queries of two tokens, keys of all visual tokens, and their products."""
        projections = 2 * self.hidden * self.head_dim * (2 * self.heads + visual * self.kv_heads)
        return projections + 2 * 2 * visual * self.head_dim * (self.heads + 1)

    def head(self) -> int:
        """The logits of one token."""
        return 2 * self.hidden * self.vocabulary
