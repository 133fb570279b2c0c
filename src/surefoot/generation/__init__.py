"""The token engine: tokens in, tokens and log-probs out. Knows no task or reward; text in stop strings."""
