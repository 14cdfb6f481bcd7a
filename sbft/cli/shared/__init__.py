"""What several verbs share: options, errors, processes, progress."""
