"""The loss from hidden states, without the logits of all tokens."""
