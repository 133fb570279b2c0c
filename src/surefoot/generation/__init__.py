"""The token engine: tokens in, tokens and behaviour log-probs out. Knows no text, task or reward."""
