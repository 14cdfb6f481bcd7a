"""What the verbs share: options, errors, processes, progress."""
