"""An LSTM language model (Hochreiter & Schmidhuber 1997) in the shape of one of transformers.

On import the Auto classes learn its kind, so that folders of it open like any other. Its recurrent state is
one (h, c) a layer and row, however long the row.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from surefoot.policies.lm.kv_cache import Window


class LstmConfig(PreTrainedConfig):
    """Sizes, by the names that transformers' models have for them."""

    model_type = "surefoot_lstm"

    vocab_size: int = 257
    hidden_size: int = 128
    num_hidden_layers: int = 2
    max_position_embeddings: int = 4096  # an LSTM has no longest context, but longer rows are refused
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False


class StateCache:
    """(h, c) of every slot, [2, layers, slots, width] float32, in the place of keys and values.

    A state holds a row's whole past: the window only says how many columns the engine's attention mask has.
    """

    def __init__(self, states: Tensor, *, columns: int):
        self.states = states
        self.window = Window(states.shape[2], columns)

    def move_rows(self, sources: list[int], targets: list[int]) -> None:
        """Copy whole rows over others."""
        self.states[:, :, targets] = self.states[:, :, sources]

    def copy_from(self, other: "StateCache", first_row: int, rows: int) -> None:
        """Take over the states of `other`'s first rows; they end wherever the window does."""
        self.states[:, :, first_row : first_row + rows] = other.states[:, :, :rows]

    def shift_to(self, new_end: int) -> None:
        """Move the window."""
        window = self.window
        window.begin, window.end = new_end - (window.end - window.begin), new_end


class _Body(nn.Module):
    def __init__(self, config: LstmConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        width = config.hidden_size
        self.lstm = nn.LSTM(width, width, config.num_hidden_layers, batch_first=True)

    def train(self, mode: bool = True) -> "_Body":
        super().train(mode)
        # cuDNN goes backward through an LSTM in training mode alone; without dropout it changes nothing else.
        self.lstm.train()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, D] float32. Where the mask [B, S] is 0, a state stays as it was."""
        rows, steps = input_ids.shape
        mask_BT = None if attention_mask is None else attention_mask[:, -steps:].bool()
        kept = self.zeros(rows) if past_key_values is None else past_key_values.states
        state = kept[:, :, :rows].contiguous()
        # In float32 always: in bfloat16 the state's rounding errors would add up over a row, and differ
        # between a row written one token at a time and one read at once.
        with torch.autocast(input_ids.device.type, enabled=False):
            embedded_BTD = self.embed_tokens(input_ids)
            if mask_BT is None or bool(mask_BT.all()):
                hidden_BTD, (h, c) = self.lstm(embedded_BTD, (state[0], state[1]))
                state = torch.stack([h, c])
            else:
                columns = []
                for t in range(steps):
                    column, (h, c) = self.lstm(embedded_BTD[:, t : t + 1], (state[0], state[1]))
                    state = torch.where(mask_BT[:, t, None], torch.stack([h, c]), state)
                    columns.append(column)
                hidden_BTD = torch.cat(columns, dim=1)
        if past_key_values is not None:
            past_key_values.states[:, :, :rows] = state
        return BaseModelOutputWithPast(last_hidden_state=hidden_BTD, past_key_values=past_key_values)

    def zeros(self, rows: int) -> Tensor:
        """States before the first token."""
        return self.embed_tokens.weight.new_zeros((2, self.lstm.num_layers, rows, self.lstm.hidden_size))


class LstmForCausalLM(PreTrainedModel):
    """The body and a separate output layer, without bias."""

    config_class = LstmConfig
    base_model_prefix = "model"

    def __init__(self, config: LstmConfig):
        super().__init__(config)
        self.model = _Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Embedding, nn.LSTM)):
            module.reset_parameters()  # torch's: gates would hardly see transformers' narrow embeddings
        else:
            super()._init_weights(module)

    def forward(self, input_ids: Tensor, **inputs: Any) -> CausalLMOutputWithPast:
        """Logits [B, T, V] and hidden states; `inputs` are `_Body.forward`'s, others change nothing."""
        out = self.model(input_ids, **inputs)
        hidden = out.last_hidden_state
        return CausalLMOutputWithPast(
            logits=self.lm_head(hidden), past_key_values=out.past_key_values, hidden_states=(hidden,)
        )

    def new_cache(self, *, slots: int, columns: int) -> StateCache:
        """What the token engine is to keep for `slots` rows: all zero, as before the first token."""
        return StateCache(self.model.zeros(slots), columns=columns)


AutoConfig.register(LstmConfig.model_type, LstmConfig, exist_ok=True)
AutoModelForCausalLM.register(LstmConfig, LstmForCausalLM, exist_ok=True)
