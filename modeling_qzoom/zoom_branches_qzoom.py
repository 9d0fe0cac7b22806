"""The two side branches on the hidden states after decoder layer K: gate (when) and region proposal (where)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from .backbone_cache_qzoom import Past
from .backbone_layers_qzoom import Mask, run_layers
from .backbone_plans_qzoom import LayerPlan
from .backbone_projections_qzoom import Rotary, project_heads, rotary_at
from .backbones_qzoom import BackboneSpec
from .configuration_qzoom import QZoomConfig
from .rows_qzoom import gather


def _layer_class(decoder: PreTrainedModel) -> type[nn.Module]:
    return type(decoder.layers[0])


class BranchLayers(nn.Module):
    """Decoder layers of the backbone's own class, indexed from 0, that share nothing with the backbone."""

    def __init__(self, decoder: PreTrainedModel, first: int, count: int):
        super().__init__()
        layer_class = _layer_class(decoder)
        self.layers = nn.ModuleList([layer_class(decoder.config, first + index) for index in range(count)])

    def run(
        self,
        hidden_states: Tensor,
        mask: Mask,
        position_embeddings: Rotary,
        plans: Sequence[LayerPlan | None] | None,
        past: Past | None = None,
    ) -> Tensor:
        """(B, n, D) → (B, n, D), causal; `plans` as for `run_layers`.

        Args:
            position_embeddings: of the same tokens, or of those in front of them as well.
            past: what the layers know of earlier tokens; its cache, in which they count on from layer K, is extended.
        """
        cos, sin = (part[:, part.shape[1] - hidden_states.shape[1] :] for part in position_embeddings)
        return run_layers(
            self,
            hidden_states,
            0,
            len(self.layers),
            mask=mask,
            position_embeddings=(cos, sin),
            cache=None if past is None else past.cache,
            plans=plans,
            cached=None if past is None else past.visible,
        )


class GateBranch(BranchLayers):
    """T decoder layers and a linear head on the last prompt token (paper III-B, eq. 3)."""

    def __init__(self, decoder: PreTrainedModel, first: int, depth: int):
        super().__init__(decoder, first, depth)
        self.head = nn.Linear(decoder.config.hidden_size, 1)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Mask,
        position_embeddings: Rotary,
        query_columns: Tensor,
        plans: Sequence[LayerPlan | None] | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Logit that the coarse view is not enough.

        Args:
            hidden_states: (B, n, D) after decoder layer K, of tokens behind those of `past`.
            mask, position_embeddings: the prompt's, as for the decoder.
            query_columns: (B, 1) column of the last prompt token among the n.
            plans: of the T layers; every layer updates every token by default.
            past: what the layers know of earlier tokens.

        Returns:
            (B,) float32.
        """
        hidden_states = self.run(hidden_states, mask, position_embeddings, plans, past)
        last = gather(hidden_states, query_columns)[:, 0]  # (B, D)
        return self.head(last.to(self.head.weight.dtype))[:, 0].float()


class RegionScorer(nn.Module):
    """What the region branch keeps of its last layer: input norm, query and key projections (and their norms)."""

    def __init__(self, decoder: PreTrainedModel, layer_index: int, rotary: bool):
        super().__init__()
        layer: Any = _layer_class(decoder)(decoder.config, layer_index)
        attention = layer.self_attn
        self.input_layernorm = layer.input_layernorm
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.head_dim = attention.head_dim
        self.rotary = rotary

    def _project(
        self,
        hidden_states: Tensor,
        columns: Tensor,
        position_embeddings: Rotary,
        projection: nn.Module,
        norm: nn.Module | None,
    ) -> Tensor:
        states = self.input_layernorm(gather(hidden_states, columns)).to(projection.weight.dtype)
        rotary = rotary_at(position_embeddings, columns) if self.rotary else None
        return project_heads(states, projection, norm, self.head_dim, rotary).float()

    def forward(
        self, hidden_states: Tensor, position_embeddings: Rotary, query_columns: Tensor, key_columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scaled dot products, averaged over heads (paper III-C, eq. 4 and 5).

        Args:
            hidden_states: (B, n, D).
            query_columns: (B, Q); column 0 of the result belongs to the first of them.
            key_columns: (B, V) columns of the visual tokens.

        Returns:
            (B, Q, V) float32 logits, and (B, Q, V) those of each query's first head alone.
        """
        queries = self._project(hidden_states, query_columns, position_embeddings, self.q_proj, self.q_norm)
        keys = self._project(hidden_states, key_columns, position_embeddings, self.k_proj, self.k_norm)
        keys = keys.repeat_interleave(queries.shape[2] // keys.shape[2], dim=2).to(queries.device)
        scale = self.head_dim**-0.5
        logits = torch.matmul(queries.flatten(2), keys.flatten(2).transpose(1, 2)) * scale / queries.shape[2]
        # "first head" pairs head 0 of the query with every head of the keys
        mean_keys = keys.mean(dim=2)  # (B, V, head_dim)
        return logits, torch.matmul(queries[:, :, 0], mean_keys.transpose(1, 2)) * scale


class RegionBranch(BranchLayers):
    """T - 1 decoder layers and the scorer (SD-RPN)."""

    def __init__(self, decoder: PreTrainedModel, first: int, depth: int, spec: BackboneSpec):
        super().__init__(decoder, first, depth - 1)
        norm_class, epsilon = type(decoder.norm), decoder.norm.variance_epsilon
        self.norm = norm_class(decoder.config.hidden_size, eps=epsilon) if spec.region_norm else None
        self.scorer = RegionScorer(decoder, first + depth - 1, spec.region_rotary)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Mask,
        position_embeddings: Rotary,
        query_columns: Tensor,
        key_columns: Tensor,
        plans: Sequence[LayerPlan | None] | None = None,
        past: Past | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Region logits of visual tokens.

        Args:
            hidden_states: (B, n, D) after decoder layer K, of tokens behind those of `past`.
            mask, position_embeddings: the prompt's, as for the decoder; positions of all tokens.
            query_columns: (B, Q) columns of the asking tokens (the last prompt token, or one per turn).
            key_columns: (B, V) columns of the visual tokens; shorter rows may repeat any column.
            plans: of the T - 1 layers; every layer updates every token by default.
            past: what the layers know of earlier tokens, and what they made of them.

        Returns:
            As `RegionScorer`.
        """
        hidden_states = self.run(hidden_states, mask, position_embeddings, plans, past)
        if past is not None and past.states is not None:
            hidden_states = torch.cat([past.states.to(hidden_states.device), hidden_states], dim=1)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        return self.scorer(hidden_states, position_embeddings, query_columns, key_columns)


class ZoomBranches(nn.Module):
    """Both branches of a model; `gate` is None in a checkpoint without one."""

    def __init__(self, config: QZoomConfig, decoder: PreTrainedModel, spec: BackboneSpec):
        super().__init__()
        first, depth = config.branch_layer, config.branch_depth
        self.gate = GateBranch(decoder, first, depth) if config.has_gate else None
        self.region = RegionBranch(decoder, first, depth, spec)
