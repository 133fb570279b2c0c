"""A preallocated key/value cache whose rows share one write column.

Rows are right-aligned: whatever its length, a row's newest token stands in column `end - 1`, so a decoding
step writes one column for all rows and ragged prompts cost no gather. Columns before a row's first token are
hidden by the attention mask. The last row moves into a finished one's place; a new prompt ends at `end`.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, [slots, heads, columns, width], made at the first write."""

    is_compileable = False
    is_sliding = False  # the whole row is kept; a sliding layer's mask hides what is too old

    def __init__(self, shape: "Window"):
        super().__init__()
        self.window = shape

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        slots, columns = self.window.slots, self.window.columns
        # Zeros, not empty: a masked column is multiplied by probability 0, and 0 times a stray NaN is NaN.
        self.keys = key_states.new_zeros((slots, key_states.shape[1], columns, key_states.shape[3]))
        self.values = value_states.new_zeros((slots, value_states.shape[1], columns, value_states.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, begin, end = key_states.shape[0], self.window.begin, self.window.end
        new_end = end + key_states.shape[2]
        self.keys[:rows, :, end:new_end] = key_states
        self.values[:rows, :, end:new_end] = value_states
        return self.keys[:rows, :, begin:new_end], self.values[:rows, :, begin:new_end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.window.end - self.window.begin

    def get_max_length(self) -> int:
        return -1


class Window:
    """What all layers share: the size, and which columns `[begin, end)` are in use."""

    def __init__(self, slots: int, columns: int):
        self.slots, self.columns = slots, columns
        self.begin = self.end = 0


class SlotCache(Cache):
    """The cache of one batch. `window.begin` and `window.end` are moved by the engine."""

    def __init__(self, *, layers: int, slots: int, columns: int):
        self.window = Window(slots, columns)
        super().__init__(layers=[_Layer(self.window) for _ in range(layers)])

    def move_rows(self, sources: list[int], targets: list[int]) -> None:
        """Copy whole rows over others."""
        span = slice(self.window.begin, self.window.end)
        for layer in self.layers:
            layer.keys[targets, :, span] = layer.keys[sources, :, span]
            layer.values[targets, :, span] = layer.values[sources, :, span]

    def copy_from(self, other: "SlotCache", first_row: int, rows: int) -> None:
        """Append `rows` rows of `other`, right-aligned at `end`; the window widens to the left if it must."""
        width = other.window.end - other.window.begin
        self.window.begin = min(self.window.begin, self.window.end - width)
        target = slice(self.window.end - width, self.window.end)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if not mine.is_initialized:
                mine.lazy_initialization(theirs.keys, theirs.values)
            mine.keys[first_row : first_row + rows, :, target] = theirs.keys[:rows, :, :width]
            mine.values[first_row : first_row + rows, :, target] = theirs.values[:rows, :, :width]

    def shift_to(self, new_end: int) -> None:
        """Move the used columns, left or right, so that they end at `new_end`."""
        begin, end = self.window.begin, self.window.end
        new_begin = new_end - (end - begin)
        for layer in self.layers:
            layer.keys[:, :, new_begin:new_end] = layer.keys[:, :, begin:end].clone()
            layer.values[:, :, new_begin:new_end] = layer.values[:, :, begin:end].clone()
        self.window.begin, self.window.end = new_begin, new_end
