"""The encoder-decoder that reads a history and generates the semantic ID of the next item, code by code.

TIGER, section 3.2: an encoder over the history, a causal decoder over the target's codes. Pre-norm, and learned or
rotary positions instead of T5's relative biases: a bias with a gradient disables fused attention on CPU. The parts are
in files of their own: `items.py` (vectors of items), `encoder.py`, `decoder.py` and `softmax.py`.

Names of shapes: B batch, N items of a history, L levels of a semantic ID (the collision level counted), S = N * L
tokens, T targets, Q queries, H heads, E head dimension, M model dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tiger.models.padding import PAD
from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.decoder import CodeDecoder
from tiger.models.tiger.encoder import EncodedHistory, HistoryEncoder
from tiger.models.tiger.items import ItemEmbedding
from tiger.models.tiger.softmax import CodeSoftmax, TrieSoftmax
from tiger.semantic_ids.trie import Siblings, Trie


class TigerModel(nn.Module):
    """p(semantic ID of the next item | history), the product of one softmax per level."""

    def __init__(self, config: TigerConfig, trie: Trie, vectors: Tensor | None = None) -> None:
        """
        Args:
            trie: semantic IDs of the catalog.
            vectors: floating-point [items, d] text embeddings, for softmax = trie. They are not part of the state.
        """
        super().__init__()
        self.trie, self.config = trie, config
        self.items = ItemEmbedding(config, trie, vectors)
        self.encoder = HistoryEncoder(config, trie.depth)
        self.decoder = CodeDecoder(config, trie.depth)
        self.softmax: TrieSoftmax | CodeSoftmax
        if config.softmax == "trie":
            assert vectors is not None, "ItemEmbedding has refused this"
            self.softmax = TrieSoftmax(config, trie, vectors)
        else:
            self.softmax = CodeSoftmax(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize all weights from PyTorch's global generator."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.05)
        nn.init.normal_(self.decoder.bos_embedding, std=0.05)
        if self.encoder.start_embedding is not None:
            nn.init.normal_(self.encoder.start_embedding, std=0.05)
        self.items.reset_parameters()
        if isinstance(self.softmax, TrieSoftmax):
            self.softmax.reset_parameters()

    def node_vectors(self) -> list[Tensor]:
        """Return the output vectors of all trie nodes, made once for many searches; see `softmax.node_vectors`."""
        return self.softmax.node_vectors(self.items, self.trie)

    def set_training_counts(self, counts: Tensor) -> list[Tensor]:
        """Say how often training sees each item, int64 [items]; return which nodes hold such items, per level.

        Items that training never sees have no learned vector and are left out of the loss; at inference their text
        speaks for them.
        """
        self.items.set_training_counts(counts)
        known = self.trie.allowed_nodes(self.items.known)
        if isinstance(self.softmax, TrieSoftmax):
            self.softmax.set_known(known)
        return [mask.cpu() for mask in known]

    def forward(self, history: Tensor, target: Tensor, extra: Tensor | None = None, *siblings: Tensor) -> Tensor:
        """Return minus the log-probability of the targets of each row, by level: float32 [B, L].

        Args:
            history: int64 [B, N], PAD in front of shorter ones. With a causal encoder a sequence whose last items are
                targets, and histories of later targets, at once.
            target: int64 [B] items. With a causal encoder int64 [B], how many of the last items are targets; the loss
                is the sum over them.
            extra: int64 [B] user tokens, if the model has them. With a causal encoder int64 [T], the position of each
                target among the B x (N - 1) items that follow another one.
            siblings: the tensors of `trie.siblings(targets)`, level after level; a model that compares children of
                trie nodes needs them.
        """
        self.items.begin_step()
        among = [Siblings(*siblings[first : first + 4]) for first in range(0, len(siblings), 4)]
        if self.encoder.causal:
            assert extra is not None, "SequenceExamples.collate gives the positions of the targets"
            return self._causal_losses(history, target, extra, among)
        encoded = self.encode(history, extra)
        codes = self.items.codes(self.trie, target)[:, None]
        x_BLM = self.decoder(self.items, codes, encoded.key_values, encoded.mask, None)[:, 0]
        return self.softmax.losses(self.items, self.trie, x_BLM, encoded.user_state, encoded.items, target, among)

    def _causal_losses(
        self, sequence: Tensor, num_targets: Tensor, positions: Tensor, siblings: list[Siblings]
    ) -> Tensor:
        """Return the losses of all targets of sequences int64 [B, N] from one pass over them, float32 [B, L]."""
        levels, width = self.trie.depth, self.encoder.tokens_per_item
        history, target = sequence[:, :-1], sequence[:, 1:]
        shape = history.shape
        x_BSM = self.encoder(self.items, self.trie, history)
        item = torch.arange(shape[1], device=sequence.device)
        # Target t is item t + 1 of the sequence: it attends to the last `max_history_items` items up to t.
        is_target_BT = item >= shape[1] - num_targets[:, None]
        visible_BTN = self.encoder.window(shape[1], sequence.device) & (
            (history != PAD)[:, None, :] | ~is_target_BT[:, :, None]  # no query may be without any key
        )
        mask = visible_BTN.repeat_interleave(levels, 1).repeat_interleave(width, 2)[:, None]
        key_values = self.decoder.project_key_values(x_BSM, item.repeat_interleave(width))
        codes = self.items.codes(self.trie, target)
        x_BTLM = self.decoder(self.items, codes, key_values, mask, item + 1)

        def of_targets(x: Tensor) -> Tensor:
            """[B, T, ...] -> [targets of all rows, ...]."""
            return x.flatten(0, 1).index_select(0, positions)

        user_state = x_BSM.unflatten(1, (-1, width))[:, :, -1]
        history_items = torch.where(visible_BTN, history[:, None, :], PAD)
        losses_TL = self.softmax.losses(
            self.items,
            self.trie,
            of_targets(x_BTLM),
            of_targets(user_state),
            of_targets(history_items),
            of_targets(target),
            siblings,
        )
        summed = losses_TL.new_zeros(shape.numel(), levels).index_copy(0, positions, losses_TL)
        return summed.view(*shape, levels).sum(1)

    def encode(self, history: Tensor, user: Tensor | None = None) -> EncodedHistory:
        """Encode histories int64 [B, N] for the decoder; only the last items that can reach a prediction are read."""
        history = history[:, -self.encoder.context :]
        x_BSM = self.encoder(self.items, self.trie, history, user)
        positions = next_position = None
        if self.encoder.causal:
            item = torch.arange(history.shape[1] + 1, device=history.device)
            positions, next_position = item[:-1].repeat_interleave(self.encoder.tokens_per_item), item[-1:]
        return EncodedHistory(
            self.decoder.project_key_values(x_BSM, positions),
            self.encoder.key_mask(history),
            next_position,
            x_BSM[:, -1],
            history[:, -self.encoder.max_items :],
        )
