"""PPO mathematics: pure functions on tensors. No I/O, no modules, no config."""
