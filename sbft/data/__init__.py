"""From a hub id, a file or a generated task to token ids and labels."""
