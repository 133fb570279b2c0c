"""The token engine: tokens in, tokens and behavior log-probs out. Knows no text, task or reward."""
